"""`megahybrid evaluate CHECKPOINT --lm-eval TASK …`: lm-evaluation-harness on a checkpoint."""

import json
from pathlib import Path
from typing import Any

from megahybrid.commands.trained_model import header, keep, load_trained_model
from megahybrid.config.packaged import located
from megahybrid.data.run_tokenizer import tokenizer_of
from megahybrid.errors import EXIT_DONE, ConfigError
from megahybrid.parallel.mesh import ParallelMesh


def evaluate_lm_eval(
    path: Path,
    tasks: list[str],
    mesh: ParallelMesh,
    *,
    include: Path | None = None,
    length: int | None = None,
    limit: int | None = None,
    tokenizer: Path | None = None,
) -> int:
    """Print the harness's table of `tasks` and keep its figures in the run's `evaluations`.

    `include` is a folder of task files of one's own, for example over local data. The model sees
    `length` tokens (default: the longest it was trained on, as an export says). Raises
    MegahybridError, one line, for whatever the user can mend. Returns the exit code.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from megahybrid.evaluate.lm_eval_adapter import HybridLM
    except ImportError as error:
        raise ConfigError(
            f"--lm-eval={' '.join(tasks)} needs the package lm_eval ({error}). "
            "Run `pip install megahybrid[lm-eval]`."
        ) from None
    trained = load_trained_model(path, mesh)
    words, eod_id = tokenizer_of(trained.run, tokenizer)
    adapter = HybridLM(trained.model, words, eod_id=eod_id, max_length=length or trained.longest)
    manager = TaskManager(include_path=None if include is None else str(located(include)))
    found = lm_eval.simple_evaluate(
        model=adapter, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000
    )
    told: dict[str, Any] = {**header(trained), "limit": limit, "results": found["results"]}
    keep(trained, "lm_eval", "-".join(tasks)[:80], json.loads(json.dumps(told, default=str)))
    print(make_table(found))
    return EXIT_DONE
