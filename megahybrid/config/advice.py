"""What `check` tells of a run that can be meant, and seldom is."""

import math

from megahybrid.config.run import RunConfig


def warnings(run: RunConfig) -> list[str]:
    """Return a line for each choice that goes against a rule that the run itself names."""
    line = _tied_under_mup(run)
    return [] if line is None else [line]


def _tied_under_mup(run: RunConfig) -> str | None:
    """A tied head has the embedding's initial values and rate, so muP's division of the logits by
    the width ratio can stand nowhere but in the function."""
    if run.optimizer.parametrisation != "mup" or not run.model.tie_embeddings:
        return None
    wanted, found = 1 / run.optimizer.width_ratio(run.model.hidden_size), run.model.logit_scale
    if math.isclose(found, wanted, rel_tol=1e-6):
        return None
    return (
        f"warning: model.logit_scale={found:g} with tied embeddings is not muP's {wanted:g} "
        f"(optimizer.base_hidden_size={run.optimizer.base_hidden_size} over "
        f"model.hidden_size={run.model.hidden_size}), so the best learning rate moves with the "
        f"width. Set it to {_decimals(wanted)}, or tie_embeddings: false."
    )


def _decimals(number: float) -> str:
    """Enough digits that the number, written into a run file, is near enough."""
    return f"{number:.9g}"
