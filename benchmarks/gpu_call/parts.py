"""What is run, in the order of its worth, and how long each part may take on a card."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_call.setting import LENGTHS, REHEARSAL_LENGTHS
from megahybrid.model.kernels import KERNELS

ROOT = Path(__file__).parents[2]
MEASURE = "benchmarks.gpu_call.measure"
# `blocked` and `reference` are for where there is nothing else.
ON_A_CARD = [name for name in KERNELS if name not in ("reference", "blocked")]
IN_A_REHEARSAL = ["sdpa", "blocked", "cudnn_frontend"]
# Each library in its best legal setting first.
PEERS = (
    "flex_attention+compile",
    "torchtitan+compile",
    "megatron+patched",
    "flex_attention+compile+liger",
    "sdpa+compile",
    "megatron",
)
PEERS_IN_A_REHEARSAL = ("sdpa", "sdpa+chunked", "megatron+patched", "megatron", "torchtitan")


@dataclass(frozen=True)
class Part:
    """A process of its own: a Python module with its arguments, and seconds after which it is
    killed. `rows`: it writes figures to the descriptor that it is told."""

    name: str
    command: tuple[str, ...]
    limit_seconds: float
    rows: bool = True


def parts(rehearse: bool, results: Path) -> list[Part]:
    """Every part of a call; `results` is where a part reads what earlier ones found."""
    shared = ("--earlier", str(results), *(("--rehearse",) if rehearse else ()))
    lengths = REHEARSAL_LENGTHS if rehearse else LENGTHS
    made = [
        *before(rehearse, shared),
        *tests(),
        *ours(lengths, shared, results.parent),
        *peers(rehearse, lengths, shared),
        *others(lengths, shared),
    ]
    # On a CPU everything is tiny and the machine is shared.
    return [Part(p.name, p.command, 240.0, p.rows) for p in made] if rehearse else made


def before(rehearse: bool, shared: tuple[str, ...]) -> Iterator[Part]:
    """The machine, its ceilings, the attention kernels alone, and what must agree."""
    yield Part("machine", (MEASURE, "machine", *shared), 30)
    yield Part("ceilings", (MEASURE, "ceilings", *shared), 60)
    for name in IN_A_REHEARSAL if rehearse else ON_A_CARD:
        # flex compiles a program for each window and length.
        limit = 120 if name == "flex" else 40
        yield Part(f"attention {name}", (MEASURE, "attention", name, *shared), limit)
    yield Part("agreement", (MEASURE, "agreement", *shared), 60)


def tests() -> Iterator[Part]:
    """What only a card can answer: the product's engine and its commands, then whatever else is
    marked. By file: others need packages that such a machine lacks. A test that fails hides none,
    and each is named as it runs, should it be the last.
    In a rehearsal, which has no card, they are collected and skip with their reason."""
    how = ("-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", "--timeout=100")
    folder = ROOT / "tests"
    own = ("gpu/test_engine.py", "gpu/test_commands.py")
    for path, limit in zip(own, (150, 90), strict=True):
        yield Part(f"tests/{path}", ("pytest", f"tests/{path}", *how), limit, rows=False)
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted(folder.rglob("test_*.py"))
        if path.parent.name != "gpu" and "@pytest.mark.gpu" in path.read_text()
    ]
    yield Part("tests marked gpu", ("pytest", *marked, *how), 120, rows=False)


def ours(lengths: tuple[int, ...], shared: tuple[str, ...], out: Path) -> Iterator[Part]:
    """The headline and what it stands beside: through the engine, compiled and plain, hybrid and
    full."""
    first, *longer = lengths

    def part(name: str, kind: str, length: int, limit: float, *more: str) -> Part:
        command = (MEASURE, "step", kind, "--lengths", str(length), *more, *shared)
        return Part(name, command, limit)

    profile = str(out / "profile.txt")
    compiled, plain = ("--blocks", "compiled"), ("--blocks", "plain")
    yield part(
        f"hybrid {first}", "hybrid", first, 120, *compiled, "--steps", "20", "--profile", profile
    )
    yield part(f"hybrid {first} plain", "hybrid", first, 60, *plain)
    yield part(f"full {first}", "full", first, 90)
    for length, steps in zip(longer, ("8", "4"), strict=True):
        yield part(f"hybrid {length}", "hybrid", length, 120, "--steps", steps)
        yield part(f"full {length}", "full", length, 150, "--steps", steps)


def peers(rehearse: bool, lengths: tuple[int, ...], shared: tuple[str, ...]) -> Iterator[Part]:
    """Other libraries at the two shorter lengths, and ours with the block that two of them have."""
    sequential = (MEASURE, "step", "sequential-rms", "--lengths")
    yield Part("sequential", (*sequential, *map(str, lengths[:2]), *shared), 120)
    names = PEERS_IN_A_REHEARSAL if rehearse else PEERS
    for name in names:
        at = [str(length) for length in lengths[:2]]
        command = (MEASURE, "peer", name, "--lengths", *at, "--steps", "5", *shared)
        yield Part(f"peer {name}", command, 150)


def others(lengths: tuple[int, ...], shared: tuple[str, ...]) -> Iterator[Part]:
    """Packed rows, the comparisons that decide what stays, the longest rows, 8B off-loaded."""
    first, last = lengths[0], lengths[-1]
    step = (MEASURE, "step")
    at_first = ("--lengths", str(first))
    yield Part("packed", (*step, "hybrid", *at_first, "--packed", *shared), 60)
    for size in ("256", "512", "1024"):
        yield Part(
            f"loss parts of {size}", (*step, "hybrid", *at_first, "--loss-part", size, *shared), 60
        )
    compiled = ("--blocks", "compiled")
    yield Part(
        "without the patch", (*step, "hybrid", *at_first, *compiled, "--without-patch", *shared), 90
    )
    twice = ("--lengths", str(2 * last), "--steps", "2")
    yield Part("longest", (*step, "hybrid", *twice, *shared), 120)
    # Locking its 64 GB of host memory alone takes half a minute.
    eight = ("--offload", "moments", "--steps", "3")
    yield Part("8B, moments off-loaded", (*step, "8b", *at_first, *eight, *shared), 150)
    at = [str(length) for length in lengths[2:]]
    for name in PEERS[:3] if lengths == LENGTHS else ():
        yield Part(
            f"peer {name} longest",
            (MEASURE, "peer", name, "--lengths", *at, "--steps", "3", *shared),
            150,
        )
