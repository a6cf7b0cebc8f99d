"""The lines that `check` prints when nothing is wrong."""

from megahybrid.config.counting import parameters
from megahybrid.config.describe import anneal_steps
from megahybrid.config.describe_context import context_lines
from megahybrid.config.run import RunConfig


def summary(run: RunConfig, world_size: int | None = None) -> str:
    """Parameters, stages with their steps, and the data degree when the world size is known."""
    plan = run.stage_plan
    degrees = f"tensor {run.parallel.tensor}"
    if run.parallel.context_axis > 1:
        degrees += f" x context {run.parallel.context_axis}"
    if world_size is not None:
        degrees += f" x data {run.parallel.data_degree(world_size)} = {world_size} ranks"
    lines = [
        f"{parameters(run.model):,} parameters, {run.model.layer_plan.num_layers} layers",
        f"{degrees}, ZeRO {run.parallel.zero_stage}, {run.precision}"
        + ", AdamW's moments in host memory" * (run.parallel.offload == "moments")
        + (f", z-loss {run.z_loss:g}" if run.z_loss else ""),
    ]
    for index, stage in enumerate(run.stages):
        lines.append(
            f"stage {stage.name}: {plan.stage_steps[index]:,} steps, "
            f"{plan.stage_tokens[index]:,} tokens, {lengths_in_words(stage.lengths)}"
        )
        lines += _anneal_in_words(run, index)
    lines += context_lines(run)
    lines.append(f"in all {plan.total_steps:,} steps, {plan.total_tokens:,} tokens")
    return "\n".join(lines)


def _anneal_in_words(run: RunConfig, index: int) -> list[str]:
    """ "  local.window 512, 640 from step 3, 768 from step 7", one line per field."""
    rows = anneal_steps(run, index)
    lines = []
    for name in rows[0]["values"] if rows else ():
        words: list[str] = []
        before = None
        for row in rows:
            value = row["values"][name]
            if value != before:
                words.append(f"{value:g}" + (f" from step {row['step']:,}" if words else ""))
            before = value
        lines.append(f"  {name} {', '.join(words)}")
    return lines


def lengths_in_words(lengths: dict[int, int]) -> str:
    """ "length 256", or "lengths 8192 : 65536 at 3 : 1"."""
    if len(lengths) == 1:
        return f"length {next(iter(lengths))}"
    names, ratios = (
        " : ".join(str(n) for n in part) for part in zip(*lengths.items(), strict=True)
    )
    return f"lengths {names} at {ratios} by sequences"
