"""Whether another tree of this project computes the same: a dozen small runs in both, compared.

    python -m benchmarks.same_bits PARENT [--only CASE …]

PARENT is a checkout, or a revision, of which a worktree is made. Both trees are driven by their
command line alone and read by their files alone, so that names inside may change between them.
Losses, gradient norms, learning rates, cursors and the last checkpoint's weights and moments must
be equal to the bit; with compiled blocks, whose programs may be written differently, within 1e-6.
Then each tree's run is cut back to a checkpoint in its middle and the new tree goes on with what
the parent began.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ruamel.yaml import YAML
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
BOUND = 1e-6  # of compiled programs, relative, in the 2-norm of a tensor
LIMIT_SECONDS = 600

ROPE = {"position": {"kind": "rope", "theta": 10000}}
NOPE: dict[str, Any] = {"position": {"kind": "nope"}}
WINDOW = {"window": 24}


def rope(**fields: Any) -> dict[str, Any]:
    """A rotated scheme with more said about its rotation."""
    return {"position": ROPE["position"] | fields}


@dataclass(frozen=True)
class Case:
    """One run: its two schemes, what differs from the shared run file, and how it is started."""

    schemes: tuple[dict[str, Any], dict[str, Any]]
    overrides: tuple[str, ...] = ()
    processes: int = 1
    exact: bool = True


CASES: dict[str, Case] = {
    "rnope-swa": Case((ROPE | WINDOW, NOPE)),
    "rope-post_norm-selective": Case(
        (ROPE, ROPE), ("model.block=post_norm", "stages.0.recompute=selective")
    ),
    "nope-parallel-layernorm": Case(
        (NOPE, NOPE | WINDOW), ("model.block=parallel", "model.norm=layernorm")
    ),
    "qk_norm-rms-full": Case(
        (ROPE | WINDOW | {"qk_norm": {"kind": "rms"}}, NOPE | {"qk_norm": {"kind": "rms"}}),
        ("stages.1.recompute=full",),
    ),
    "qk_norm-per_head-tensor2": Case(
        (
            ROPE | {"qk_norm": {"kind": "layernorm", "weight": "per_head"}},
            NOPE | WINDOW | {"qk_norm": {"kind": "rms", "weight": "per_head"}},
        ),
        ("parallel.tensor=2",),
        2,
    ),
    "qk_norm-projection-untied": Case(
        (
            ROPE | {"qk_norm": {"kind": "rms", "over": "projection"}},
            NOPE | {"qk_norm": {"kind": "layernorm", "over": "projection"}},
        ),
        ("model.tie_embeddings=false",),
    ),
    "linear-ntk-chunked": Case(
        (
            rope(scaling={"kind": "linear", "factor": 3.0}),
            rope(scaling={"kind": "ntk", "factor": 4.0}),
        ),
        ("stages.2.recompute=chunked",),
    ),
    "yarn-llama3-partial": Case(
        (
            rope(scaling={"kind": "yarn", "factor": 4.0, "original_length": 64}),
            rope(
                rotary_fraction=0.5,
                scaling={"kind": "llama3", "factor": 8.0, "original_length": 64},
            ),
        )
    ),
    "llama4-log": Case(
        (
            NOPE | {"logit_scale": {"kind": "llama4", "floor": 32, "coefficient": 0.4}},
            ROPE | WINDOW | {"logit_scale": {"kind": "log", "base": 16.0}},
        )
    ),
    "ssmax-zero3-tensor2": Case(
        (NOPE | {"logit_scale": {"kind": "ssmax"}}, ROPE | WINDOW),
        ("parallel.tensor=2", "parallel.zero_stage=3"),
        2,
    ),
    "zero1-data2-bf16": Case((ROPE | WINDOW, NOPE), ("precision=bf16",), 2),
    "zero3-data2": Case((ROPE | WINDOW, NOPE), ("parallel.zero_stage=3",), 2),
    "compiled": Case((ROPE | WINDOW, NOPE), ("kernels.blocks=compiled",), exact=False),
    "compiled-tensor2": Case(
        (ROPE | WINDOW, NOPE), ("kernels.blocks=compiled", "parallel.tensor=2"), 2, exact=False
    ),
}

RUN: dict[str, Any] = {
    "seed": 1,
    "precision": "fp32",
    "device": "cpu",
    "model": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "data": {"sources": {"text": {"path": "data/train"}}, "block_tokens": 512, "lanes": 4},
    "checkpoint": {"every_steps": 4, "keep_last": 99},
    "evaluate": {"every_steps": None},
    "log": {"audit_every_steps": 4},
}
MIDDLE = 8  # of 14 steps: inside of the second stage
STEP_FIELDS = (
    "step", "stage", "tokens", "length", "source_tokens", "cursor_crc", "learning_rate", "loss",
    "gradient_norm", "gradient_norm_by_kind", "skipped",
)  # fmt: skip
EXACT_FIELDS = ("step", "stage", "tokens", "length", "source_tokens", "cursor_crc", "skipped")


def run_file(case: Case) -> dict[str, Any]:
    """The run file of a case: three stages, the last with two lengths."""
    first, second = case.schemes
    plan = {
        "num_layers": 4,
        "pattern": ["first", "second"],
        "schemes": {"first": first, "second": second},
    }
    rate = {"kind": "linear", "start": 3e-3, "end": 1e-3, "warmup_tokens": 1500}
    shared = {"batch_tokens": 1024, "micro_batch_tokens": 512, "weights": {"text": 1}}
    stages = [
        {"name": "short", "tokens": 4096, "lengths": {64: 1}, "learning_rate": rate},
        {"name": "middle", "tokens": 5120, "lengths": {256: 1}},
        {"name": "long", "tokens": 5120, "lengths": {128: 1, 512: 1}},
    ]
    constant = {"kind": "linear", "start": 1e-3, "end": 5e-4}
    return {
        **RUN,
        "model": RUN["model"] | {"layer_plan": plan},
        "stages": [{"learning_rate": constant, **stage, **shared} for stage in stages],
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a run differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parent", help="a checkout of the project, or a revision of this one")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder")
    options = parser.parse_args(arguments)
    failed = 0
    with tree(options.parent) as parent, folder(options.keep) as work:
        make_data(parent, work)
        for name in options.only or CASES:
            faults = list(compare(name, CASES[name], parent, work))
            failed += bool(faults)
            print(f"{name}: {'; '.join(faults) or 'the same'}", flush=True)
    return int(failed > 0)


@contextmanager
def tree(parent: str) -> Iterator[Path]:
    """The parent's checkout; one that is made here goes again."""
    if Path(parent).is_dir():
        yield Path(parent).resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="parent-")) / "tree"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "-f", str(made), parent], check=True)
    try:
        yield made
    finally:
        subprocess.run([*git, "remove", "--force", str(made)], check=True)


@contextmanager
def folder(keep: Path | None) -> Iterator[Path]:
    """Where the runs lie."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="same-bits-") as made:
        yield Path(made)


def command(checkout: Path, work: Path, *words: str) -> None:
    """`megahybrid …` of a tree, in `work`. Raises RuntimeError with its last words."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megahybrid", *words],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"{checkout}: {' '.join(words)}: code {done.returncode}: {said[-1:]}")


def make_data(checkout: Path, work: Path) -> None:
    """A few thousand tokens of drawn words, tokenized by the parent."""
    if (work / "data").exists():
        return
    draw = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(draw.choice(letters, draw.integers(2, 8))) for _ in range(300)]
    ranks = draw.zipf(1.3, 40_000) % len(words)
    text = iter(words[rank] for rank in ranks)
    with open(work / "text.jsonl", "w") as file:
        for length in draw.integers(10, 400, 150):
            file.write(json.dumps({"text": " ".join(next(text) for _ in range(length))}) + "\n")
    command(
        checkout, work, "data", "tokenizer", "text.jsonl",
        "--output", "words.model", "--vocab-size", "512",
    )  # fmt: skip
    command(
        checkout, work, "data", "tokenize", "text.jsonl",
        "--tokenizer", "words.model", "--output", "data",
    )  # fmt: skip


def compare(name: str, case: Case, parent: Path, work: Path) -> Iterator[str]:
    """What differs between the two trees; nothing where they compute the same."""
    with open(work / f"{name}.yaml", "w") as file:
        YAML(typ="safe").dump(run_file(case), file)

    def train(checkout: Path, where: str) -> None:
        words = (f"{name}.yaml", f"directory={where}", *case.overrides)
        command(checkout, work, "train", *words, "--processes", str(case.processes))

    before, now, resumed = (f"{name}/{part}" for part in ("parent", "new", "resumed"))
    try:
        train(parent, before)
        train(ROOT, now)
        yield from differences(work / before, work / now, case.exact, "")
        shutil.copytree(work / before, work / resumed)
        cut_back(work / resumed)
        train(ROOT, resumed)
        yield from differences(work / before, work / resumed, case.exact, "resumed: ")
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        yield str(error)


def cut_back(run: Path) -> None:
    """The run as a kill in its middle would have left it."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > MIDDLE:
            shutil.rmtree(path)


def differences(before: Path, now: Path, exact: bool, prefix: str) -> Iterator[str]:
    """The first step and the first tensor that differ."""
    old, new = steps(before), steps(now)
    if [line["step"] for line in old] != [line["step"] for line in new]:
        yield f"{prefix}{len(old)} and {len(new)} steps"
        return
    for mine, other in zip(new, old, strict=True):
        apart = [
            field
            for field in STEP_FIELDS
            if not alike(mine.get(field), other.get(field), exact or field in EXACT_FIELDS)
        ]
        if apart:
            shown = ", ".join(f"{f} {other.get(f)} -> {mine.get(f)}" for f in apart)
            yield f"{prefix}step {mine['step']}: {shown}"
            break
    theirs, ours = tensors(before), tensors(now)
    if theirs.keys() != ours.keys():
        yield f"{prefix}other tensors: {sorted(theirs.keys() ^ ours.keys())[:3]}"
        return
    for key, value in theirs.items():
        error = relative(ours[key], value)
        if error > (0.0 if exact else BOUND):
            yield f"{prefix}{' '.join(key)} off by {error:.1e}"
            return


def steps(run: Path) -> list[dict[str, Any]]:
    """The step lines that hold: of each step that of the last attempt."""
    found: dict[int, dict[str, Any]] = {}
    for text in (run / "ledger.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "step":
            found[line["step"]] = line
    return [found[step] for step in sorted(found)]


def alike(mine: Any, other: Any, exact: bool) -> bool:
    """Whether two values of a line are equal, or numbers of them within the bound."""
    if isinstance(mine, dict) and isinstance(other, dict):
        return mine.keys() == other.keys() and all(alike(mine[k], other[k], exact) for k in mine)
    if exact or not isinstance(mine, float) or not isinstance(other, float):
        return bool(mine == other)
    return abs(mine - other) <= BOUND * max(abs(other), 1e-30)


def tensors(run: Path) -> dict[tuple[str, str], NDArray[np.float32]]:
    """(tensor, state) of the last checkpoint, put together from its fragments."""
    newest = max((run / "checkpoints").glob("step-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    files = {name: load_file(newest / name) for name in manifest["files"]}
    found: dict[tuple[str, str], list[tuple[Any, Any, NDArray[np.float32]]]] = {}
    for part in manifest["fragments"]:
        values = files[part["file"]][part["key"]]
        found.setdefault((part["tensor"], part["state"]), []).append(
            (part["box"], part["flat"], values)
        )
    joined = {}
    for key, parts in found.items():
        shape = [max(box[axis][1] for box, _, _ in parts) for axis in range(len(parts[0][0]))]
        whole = np.full(shape, np.nan, dtype=np.float32)
        for box, (start, stop), values in parts:
            place = whole[tuple(slice(*span) for span in box)]
            flat = place.reshape(-1).copy()
            flat[start:stop] = values.reshape(-1)
            place[...] = flat.reshape(place.shape)
        joined[key] = whole
    return joined


def relative(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """‖a - b‖ / ‖b‖, 0 where all bits are equal."""
    if ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes():
        return 0.0
    if ours.shape != theirs.shape:
        return float("inf")
    apart, size = (np.linalg.norm(x.astype(np.float64)) for x in (ours - theirs, theirs))
    return float(apart / max(size, 1e-30)) or float("inf")


if __name__ == "__main__":
    sys.exit(main())
