"""One run of a study, in a process of its own: train, then score, then keep the result."""

import contextlib
import ctypes
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megahybrid.config.packaged import beside
from megahybrid.config.study import Study
from megahybrid.data.manifest import write_durably
from megahybrid.errors import EXIT_DONE, MegahybridError

EXIT_FAILURE = 1


@dataclass(frozen=True)
class StudyRun:
    """One run: a variant with a seed. `folder` is the study's, `out` where everything is kept."""

    plan: Study
    folder: Path
    out: Path
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.variant}-seed{self.seed}"

    def file(self, name: str) -> Path:
        """Return the path of a run file or a suite that the study names."""
        return beside(self.folder / "study.yaml", name)

    @property
    def result(self) -> Path:
        """The path of the result; a run that has one is not repeated."""
        return self.out / "results" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """The path of its commands' output."""
        return self.out / "logs" / f"{self.name}.log"

    def overrides(self) -> list[str]:
        """Return the fields in which it differs from the study's run file."""
        paths = [f"data.sources.{name}.path={self.out / 'data' / name}" for name in self.plan.data]
        said = [*self.plan.common, *self.plan.variants[self.variant]]
        own = [word.replace("{out}", str(self.out)) for word in said]
        if self.trunk is not None:
            trunk = str(self.trunk.directory)
            own = [word.replace("{trunk}", trunk) for word in own]
            own = [f"start.checkpoint={trunk}", "start.take=all", *own]
        return [*paths, *own, f"seed={self.seed}", f"directory={self.directory}"]

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return self.out / "runs" / self.name

    @property
    def trunk(self) -> "StudyRun | None":
        """Return the run with whose checkpoint this one begins."""
        trunk = self.plan.branches.get(self.variant)
        return None if trunk is None else replace(self, variant=trunk)

    def start(self, fork: bool = True) -> int:
        """Start a process that does the work; returns its id.

        Forked, it shares what was imported here; call it before any computing, because threads are
        not shared. Otherwise it is a new Python.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        child = os.fork()
        if child:
            return child
        code = EXIT_FAILURE
        try:
            _end_with(parent)
            with open(self.log, "a", buffering=1) as log:
                os.dup2(log.fileno(), sys.stdout.fileno())
                os.dup2(log.fileno(), sys.stderr.fileno())
            if not fork:
                arguments = [self.folder, self.out, self.variant, self.seed]
                command = [sys.executable, "-m", __name__, *map(str, arguments)]
                os.execv(sys.executable, command)
            code = self.work()
        except MegahybridError as error:
            print(f"megahybrid: {error}", file=sys.stderr)
            code = error.exit_code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def work(self) -> int:
        """Train where that is not done, score, and keep the result. Returns the exit code."""
        from megahybrid.commands.analyse import analyse
        from megahybrid.commands.context_gain import context_gain
        from megahybrid.commands.evaluate import evaluate
        from megahybrid.commands.suite import evaluate_suite
        from megahybrid.commands.train import train
        from megahybrid.parallel.mesh import ParallelMesh, choose_device

        plan, run = self.plan, self.directory
        began = time.monotonic()
        code = train(self.file(plan.run), self.overrides(), processes=1)
        if code != EXIT_DONE:
            return code
        trained = time.monotonic()
        mesh = ParallelMesh.single(choose_device("auto", 0))
        result: dict[str, Any] = {"variant": self.variant, "seed": self.seed}
        result["overrides"] = plan.variants[self.variant]
        if plan.suite is not None:
            suite = self.file(plan.suite)
            result["suite"] = _json_output(lambda: evaluate_suite(run, suite, mesh, as_json=True))
        if plan.analyse is not None:
            looked_at = self.file(plan.analyse)
            told = _json_output(lambda: analyse(run, mesh, suite_file=looked_at, as_json=True))
            result["attention"] = without_curves(told)
        if plan.held_out is not None:
            length, most = plan.held_out.length, plan.held_out.max_tokens
            result["held_out"] = _json_output(
                lambda: evaluate(run, mesh, length=length, max_tokens=most, as_json=True)
            )
            if contexts := plan.held_out.context_gain:
                result["context_gain"] = _json_output(
                    lambda: context_gain(
                        run, mesh, contexts, length=length, max_tokens=most, as_json=True
                    )
                )
        spent = os.times()
        result["seconds"] = {
            "train": round(trained - began, 2),
            "score": round(time.monotonic() - trained, 2),
            "cpu": round(spent.user + spent.system, 2),
        }
        self.result.parent.mkdir(parents=True, exist_ok=True)
        # Paths within the study's output: results are sent to others and published.
        text = json.dumps(result, indent=1).replace(f"{self.out}/", "")
        write_durably(self.result, (text + "\n").encode())
        return EXIT_DONE


def without_curves(attention: dict[str, Any]) -> dict[str, Any]:
    """Return an analysis without its long lists (attention by position, logits by lag, heads).

    Those stay in the run's `evaluations`.
    """
    kept = (
        "mass",
        "entropy_bits",
        "max_logit",
        "distance",
        "sink",
        "retrieval",
        "near_share",
        "layers",
    )

    def short(part: dict[str, Any]) -> dict[str, Any]:
        return {name: part[name] for name in kept if name in part}

    groups = []
    for group in attention["results"]:
        told = group["attention"]
        looked = {
            "all": short(told["all"]),
            "by_kind": {kind: short(part) for kind, part in told["by_kind"].items()},
            "layers": [
                {"layer": part["layer"], "kind": part["kind"], **short(part)}
                for part in told["layers"]
            ],
            "retrieval_heads": told["retrieval_heads"],
        }
        groups.append(group | {"attention": looked})
    return attention | {"results": groups}


def _json_output(command: Callable[[], int]) -> dict[str, Any]:
    """Return the JSON that a command prints."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        command()
    return dict(json.loads(heard.getvalue()))


def _end_with(parent: int) -> None:
    """Ask the kernel to end this process when the study dies, however it dies (Linux).

    Two studies after one another must not train the same run.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    from megahybrid.config import load

    FOLDER, OUT, VARIANT, SEED = sys.argv[1:]
    PLAN = load(Path(FOLDER) / "study.yaml", type=Study)
    try:
        sys.exit(StudyRun(PLAN, Path(FOLDER), Path(OUT), VARIANT, int(SEED)).work())
    except MegahybridError as mistake:
        print(f"megahybrid: {mistake}", file=sys.stderr)
        sys.exit(mistake.exit_code)
