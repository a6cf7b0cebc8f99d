"""`megahybrid checkpoint …`: a function for each command, and what it prints."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megahybrid.errors import EXIT_DONE, CheckpointError, tell
from megahybrid.printable import printable


def chosen(path: Path) -> Path:
    """A checkpoint's own folder, or the newest one of a run's (its bytes are not read). One that is
    named after another step is passed over, and told."""
    from megahybrid.checkpoint.folders import candidates
    from megahybrid.checkpoint.manifest import MANIFEST_NAME, Misnamed, read_manifest

    if (path / MANIFEST_NAME).exists():
        return path
    found = candidates(path)
    if not found:
        raise CheckpointError(
            f"{path} is no checkpoint and holds none (looked for {MANIFEST_NAME} and "
            "checkpoints/). Name a checkpoint's folder or a run's."
        )
    misnamed = []
    for folder in found:
        try:
            read_manifest(folder)
        except Misnamed as error:
            misnamed.append(f"Passing over {error}")
            continue
        except CheckpointError:
            pass  # whoever opens it says what is wrong
        for line in misnamed:
            tell(line)
        return folder
    raise CheckpointError(*misnamed)


def list_checkpoints(run_directory: Path, *, as_json: bool = False) -> int:
    """Print a run's checkpoints, newest first."""
    from megahybrid.checkpoint.folders import candidates
    from megahybrid.checkpoint.manifest import read_manifest
    from megahybrid.checkpoint.names import checkpoints_of
    from megahybrid.checkpoint.reader import quick_check

    paths = candidates(run_directory)
    if not paths:
        raise CheckpointError(
            f"{checkpoints_of(run_directory)} holds no checkpoint. Name a run's folder."
        )
    rows: list[dict[str, Any]] = []
    for path in paths:
        problem = quick_check(path)
        row: dict[str, Any] = {"name": path.name, "path": str(path), "problem": problem}
        if problem is None:
            rows.append(row | _summary(read_manifest(path)))
        else:
            rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
        return EXIT_DONE
    table = [("checkpoint", "tokens", "size", "ranks", "written (UTC)", "")]
    for row in rows:
        if row["problem"]:
            table.append((row["name"], "", "", "", "", row["problem"]))
        else:
            note = f"branch of {row['parent']['checkpoint']}" if row["parent"] else ""
            table.append(
                (row["name"], f"{row['tokens']:,}", _size(row["bytes"]), str(row["ranks"]),
                 _time(row["time_unix"]), note)
            )  # fmt: skip
    _print(table, right=(1, 2, 3))
    return EXIT_DONE


def show(checkpoint: Path, *, as_json: bool = False) -> int:
    """Print what one checkpoint, or a run's newest one, holds."""
    from megahybrid.checkpoint.manifest import read_manifest

    path = chosen(checkpoint)
    manifest = read_manifest(path)
    facts = _summary(manifest)
    tensors: list[dict[str, Any]] = [
        {
            "tensor": name,
            "shape": list(tensor.shape),
            "states": list(tensor.states),
            "fragments": sum(len(manifest.of(name, state)) for state in tensor.states),
        }
        for name, tensor in manifest.tensors.items()
    ]
    if as_json:
        whole = facts | {"path": str(path), "tensors": tensors, "config": manifest.config}
        print(json.dumps(whole, indent=2))
        return EXIT_DONE
    shown = {
        "checkpoint": str(path),
        "step": f"{facts['step']:,} ({facts['optimizer_step']:,} updates)",
        "tokens": f"{facts['tokens']:,}",
        "model": facts["model_fingerprint"],
        "parameters": f"{facts['parameters']:,}",
        "size": f"{_size(facts['bytes'])} in {facts['files']} files of {facts['ranks']} ranks",
        "written": f"{_time(facts['time_unix'])} UTC by megahybrid {facts['written_by']}",
        "format": f"version {manifest.version}",
    }
    if facts["parent"]:
        parent = facts["parent"]
        shown["branch of"] = f"{parent['checkpoint']} ({parent['take']})"
    for item in facts["averaged"] or ():
        shown.setdefault("mean of", "")
        shown["mean of"] += f"{item['share']:.3g} × {item['checkpoint']}  "
    if facts["resized"]:
        resized = facts["resized"]
        shown["resized"] = f"from {resized['vocab_size']:,} tokens, of {resized['checkpoint']}"
    if facts["schemes"]:
        shown["layers"] = "; ".join(f"{k}: {_scheme(v)}" for k, v in facts["schemes"].items())
    for name, text in shown.items():
        print(f"{name + ':':<12} {printable(text.strip())}")
    print()
    table = [("tensor", "shape", "states", "fragments")]
    table += [
        (row["tensor"], " × ".join(map(str, row["shape"])), " ".join(row["states"]),
         str(row["fragments"]))
        for row in tensors
    ]  # fmt: skip
    _print(table, right=(3,))
    return EXIT_DONE


def verify_checkpoints(place: Path, *, as_json: bool = False) -> int:
    """Read every byte of a checkpoint, or of all that a run has.

    Raises CheckpointError with a line for each that is damaged, when all are read.
    """
    from megahybrid.checkpoint.folders import candidates
    from megahybrid.checkpoint.manifest import MANIFEST_NAME
    from megahybrid.checkpoint.reader import verify

    single = (place / MANIFEST_NAME).exists()
    paths = [place] if single else candidates(place) or [chosen(place)]
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            manifest = verify(path)
        except CheckpointError as error:
            rows.append({"path": str(path), "problem": str(error)})
        else:
            size = sum(record.bytes for record in manifest.files.values())
            rows.append({"path": str(path), "problem": None, "bytes": size})
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            if row["problem"] is None:
                found = _size(row["bytes"])
                print(f"{printable(row['path'])}: every one of its {found} is as written")
    problems = [row["problem"] for row in rows if row["problem"]]
    if problems:
        raise CheckpointError(*problems)
    return EXIT_DONE


def diff(
    first: Path, second: Path, *, moments: bool = False, rows: int = 20, as_json: bool = False
) -> int:
    """Print which parameters changed from the first to the second, and by how much."""
    from megahybrid.checkpoint.diff import difference
    from megahybrid.checkpoint.fragments import STATES
    from megahybrid.checkpoint.reader import Reader

    with Reader(chosen(first)) as a, Reader(chosen(second)) as b:
        found = difference(a, b, STATES if moments else ("weight",))
    if as_json:
        facts = [{"field": name, "a": old, "b": new} for name, old, new in found.facts]
        changes = [
            vars(change) | {"relative": _finite(change.relative)} for change in found.changes
        ]
        whole = {"facts": facts, "only_a": found.only_a, "only_b": found.only_b, "changes": changes}
        print(json.dumps(whole, indent=2))
        return EXIT_DONE
    for name, old, new in found.facts:
        print(printable(f"{name}: {old} → {new}"))
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        for name in names:
            print(printable(f"only in {side}: {name}"))
    changed = [change for change in found.changes if change.changed]
    print(f"{len(changed)} of {len(found.changes)} tensors differ")
    table = [("tensor", "state", "changed", "‖B-A‖/‖A‖", "max |B-A|")]
    for change in changed[:rows]:
        share = f"{100 * change.changed / change.elements:.1f} %"
        table.append(
            (change.tensor, change.state, share, f"{change.relative:.3e}", f"{change.largest:.3e}")
        )
    if changed:
        _print(table, right=(2, 3, 4))
    if len(changed) > rows:
        print(f"and {len(changed) - rows} more (--rows)")
    return EXIT_DONE


def write_average(
    checkpoints: Sequence[Path], out: Path, shares: Sequence[float] | None = None
) -> int:
    """Write the mean of several checkpoints' weights to the folder `out`."""
    from megahybrid.checkpoint.average import average

    paths = [chosen(path) for path in checkpoints]
    result = average(paths, out, shares)
    if result.path is None:
        raise CheckpointError(f"--out={out} could not be written ({result.error}).")
    print(f"{printable(str(result.path))}: the mean of {len(paths)} checkpoints' weights")
    return EXIT_DONE


def fuse(checkpoint: Path, plan_file: Path, out: Path) -> int:
    """Write a checkpoint whose layers get a second view of their keys and compute what they did."""
    from megahybrid.interop import view_surgery

    return _operated(*view_surgery.fuse(chosen(checkpoint), plan_file, out), out)


def collapse(checkpoint: Path, out: Path, analysis: Path | None, within: float | None) -> int:
    """Write a checkpoint whose heads have one view of their keys where they use one."""
    from megahybrid.interop import view_surgery

    near = view_surgery.WITHIN if within is None else within
    return _operated(*view_surgery.collapse(chosen(checkpoint), out, analysis, near), out)


def _operated(path: Path, words: Sequence[str], out: Path) -> int:
    for line in words:
        print(printable(line))
    print(f"{printable(str(path))}: weights alone, and the layers in {printable(str(out))}")
    return EXIT_DONE


def _summary(manifest: Any) -> dict[str, Any]:
    return {
        "step": manifest.step,
        "tokens": manifest.tokens,
        "optimizer_step": manifest.optimizer_step,
        "model_fingerprint": manifest.model_fingerprint,
        "parameters": sum(math.prod(tensor.shape) for tensor in manifest.tensors.values()),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "files": len(manifest.files),
        "ranks": manifest.written_by.get("ranks"),
        "time_unix": manifest.written_by.get("time_unix", 0.0),
        "written_by": manifest.written_by.get("megahybrid"),
        "version": manifest.version,
        "parent": manifest.train_state.get("parent"),
        "averaged": manifest.train_state.get("averaged"),
        "resized": manifest.train_state.get("resized"),
        "schemes": manifest.train_state.get("schemes"),
    }


def _scheme(scheme: dict[str, Any]) -> str:
    """ "rope theta 10000, window 640"; of another version's scheme, what it says."""
    position, window = scheme.get("position"), scheme.get("window")
    if not isinstance(position, dict):
        return str(scheme)
    theta = f" theta {position['theta']}" if "theta" in position else ""
    keys = "all keys" if window is None else f"window {window}"
    return f"{position.get('kind')}{theta}, {keys}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _time(unix: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _print(table: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns; names and texts of a manifest cannot steer the terminal."""
    table = [[printable(cell) for cell in row] for row in table]
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    for row in table:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
