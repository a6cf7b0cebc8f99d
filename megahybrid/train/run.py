"""The composition root: from a checked `RunConfig`, the parts of a run are built here and handed
on."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megahybrid.checkpoint.directory import RunLock, check_model
from megahybrid.checkpoint.fingerprint import model_fingerprint
from megahybrid.config import RunConfig, dump_yaml
from megahybrid.data.mixture import open_mixture
from megahybrid.errors import MegahybridError, first_line, raise_in_training
from megahybrid.heartbeat import Heartbeat, write_whole
from megahybrid.ledger import WarningEvent
from megahybrid.model.kernels.choice import kinds_with_sinks, resolve_kernels
from megahybrid.model.kernels.chosen import ChosenKernels
from megahybrid.parallel.collectives import on_first
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.train.checkpointing import RunSaver, ranks_of
from megahybrid.train.kernel_selection import fewer_queries_in
from megahybrid.train.listeners import Listeners
from megahybrid.train.metrics import StepClock
from megahybrid.train.preflight import check_inputs
from megahybrid.train.profile import Profiler
from megahybrid.train.repeated import RepeatedSteps
from megahybrid.train.restore import ResumePoint, find_resume_point, locate
from megahybrid.train.rewind import past_spikes
from megahybrid.train.stage_loop import RunParts, StageLoop
from megahybrid.train.stage_model import DTYPES
from megahybrid.train.stop import StopRequest
from megahybrid.train.suites import Evaluations


def run_attempt(
    run: RunConfig,
    directory: Path,
    mesh: ParallelMesh,
    make_listeners: Callable[[], Listeners],
    stop: StopRequest,
    heartbeat: Heartbeat,
    allow: Sequence[str] = (),
) -> int:
    """Own the directory, find where to begin, and train. Collective; returns the exit code.

    `allow` names fields (dotted, or their head) that may differ from those the run began with.
    """
    if run.deterministic and mesh.device.type == "cuda":
        torch.use_deterministic_algorithms(True)
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(RunLock(directory)) if mesh.rank == 0 else None
        warnings: list[str] = []
        on_first(mesh.world, lambda: _claim(run, directory, allow))
        located = locate(run, directory, warnings.append, ranks_of(mesh))
        # One rank looks, so that all begin from the same checkpoint.
        start = on_first(
            mesh.world,
            lambda: past_spikes(directory, find_resume_point(run, directory, located, allow)),
        )
        listeners = make_listeners() if mesh.rank == 0 else Listeners([])
        if mesh.rank == 0:
            write_whole(directory / "config.yaml", dump_yaml(run))
        parts = build_parts(run, directory, mesh, listeners, stop, heartbeat, start, owner, allow)
        for warning in warnings:
            listeners.on_event(WarningEvent(message=warning))
        try:
            return StageLoop(parts, _first_kernels(run, mesh, start)).run(start)
        except BaseException as error:
            # The disk that ended the run may refuse its last line too: the cause is what is told.
            with contextlib.suppress(MegahybridError, OSError):
                listeners.on_end("failed", error=first_line(error))
            if listeners.began:
                raise_in_training(error)
            raise


def _claim(run: RunConfig, directory: Path, allow: Sequence[str]) -> None:
    check_inputs(run, directory, allow)
    check_model(directory, model_fingerprint(run.model))


def build_parts(
    run: RunConfig,
    directory: Path,
    mesh: ParallelMesh,
    listeners: Listeners,
    stop: StopRequest,
    heartbeat: Heartbeat,
    start: ResumePoint,
    owner: RunLock | None,  # on rank 0
    allow: Sequence[str] = (),
) -> RunParts:
    """Build what the stages of an attempt share, each part given what it needs."""
    mixture = open_mixture(run)
    files = {name: mixture.fingerprint(name) for name in mixture.datasets}
    held = None
    if start.resumes and start.checkpoint is not None:
        held = (start.state.step, start.checkpoint)
    saver = RunSaver(run, directory, mesh, listeners.on_event, owner, start.parent, held)

    def between_batches() -> None:
        """A validation may take long: publish what is written, and look for a stop. Collective."""
        saver.poll()
        stop.poll(mesh)

    return RunParts(
        run=run,
        directory=directory,
        mesh=mesh,
        listeners=listeners,
        stop=stop,
        heartbeat=heartbeat,
        mixture=mixture,
        saver=saver,
        evaluations=Evaluations(
            run, directory, mesh, listeners.on_event, between_batches, saver.scored
        ),
        repeats=RepeatedSteps(run, mesh, files, allow),
        profiler=Profiler(run.log.profile_steps, directory / "profile", mesh),
        clock=StepClock(),
        allow=allow,
    )


def _first_kernels(run: RunConfig, mesh: ParallelMesh, start: ResumePoint) -> ChosenKernels:
    """Return the kernels that the run file names or the checkpoint had; stages measure the rest."""
    dtype = DTYPES[run.precision]
    fewer = set().union(*(fewer_queries_in(run, index) for index in range(len(run.stages))))
    return resolve_kernels(
        run.kernels,
        mesh.device,
        dtype,
        run.model.head_dim,
        start.kernels,
        fewer,
        kinds_with_sinks(run.model.layer_plan.schemes.values()),
    )
