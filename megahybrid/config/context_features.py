"""What else a run or a command does, and what context ranks make of it: one table.

`check` refuses by it, docs/context_parallel.md holds it (a test says how to write it there), and
tests check all of its pairs and train with what is served.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megahybrid.config.run import RunConfig
from megahybrid.errors import ConfigError


@dataclass(frozen=True)
class Feature:
    """Something that can be asked beside context ranks.

    `asked` are fields of a run file as key=value, or a command. `refused` says in one line why a
    run with context ranks cannot have it, and a way out, where the run asks for it; it is None
    where context ranks serve it.
    """

    name: str
    asked: tuple[str, ...]
    how: str
    refused: Callable[[RunConfig], str | None] | None = None

    @property
    def is_command(self) -> bool:
        """True where a command asks for it, and not a run file."""
        return not any("=" in words for words in self.asked)


def _ranks(run: RunConfig) -> str:
    return f"{run.parallel.context_axis} context ranks (parallel.context)"


def _zero_0(run: RunConfig) -> str | None:
    if run.parallel.zero_stage != 0:
        return None
    return (
        f"parallel.zero_stage=0 does not sum gradients over the {_ranks(run)}. Use zero_stage: 1."
    )


def _study(run: RunConfig) -> str:
    return (
        f"a study trains each of its runs in one process, not on {_ranks(run)}. "
        "Leave parallel.context out."
    )


FEATURES: tuple[Feature, ...] = (
    Feature(
        "validation while training",
        ("evaluate.every_steps=2",),
        "a group is given whole rows, which count once; shorter rows with a smaller degree go to "
        "all of its ranks",
    ),
    Feature(
        "loss by position, `--beyond`",
        ("evaluate --context",),
        "rows are filled up to what the ranks divide",
    ),
    Feature(
        "needles and puzzles",
        ("evaluate.suites={puzzles: {path: puzzles.yaml, every_steps: 4}}",),
        "the states of answers come from the ranks that hold them",
    ),
    Feature(
        "RULER, generation, KV cache",
        ("evaluate --context SUITE.yaml",),
        "every rank of a group generates the same text, and keeps the keys and values of all of it",
    ),
    Feature(
        "lm-evaluation-harness",
        ("evaluate --context --lm-eval",),
        "likelihoods as needles, generation as RULER",
    ),
    Feature(
        "`sample`",
        ("sample",),
        "on tensor ranks only: its `--context` says how many tokens the model sees",
    ),
    Feature(
        "attention analysis",
        ("analyse --context",),
        "each rank adds up what its own keys get; the sums are joined",
    ),
    Feature(
        "attention samples while training",
        ("evaluate.attention_every_steps=3",),
        "4,096 tokens, whole on each rank",
    ),
    Feature("studies", ("study",), "each of its runs trains in one process", _study),
    Feature(
        "ZeRO stages 1 and 2",
        ("parallel.zero_stage=2",),
        "cut over data × context ranks",
    ),
    Feature(
        "ZeRO stage 3", ("parallel.zero_stage=3",), "weights too are cut over data × context ranks"
    ),
    Feature(
        "ZeRO stage 0",
        ("parallel.zero_stage=0",),
        "gradients would not be summed over context ranks",
        _zero_0,
    ),
    Feature(
        "gradient accumulation",
        ("stages.1.micro_batch_tokens=512",),
        "one sum over all micro batches and ranks, divided once",
    ),
    Feature(
        "recompute, activation offload",
        ("stages.0.recompute=offload",),
        "an exchange is repeated with the forward that is repeated",
    ),
    Feature(
        "offload of optimizer moments",
        ("parallel.offload=moments",),
        "each rank those of its part",
    ),
    Feature(
        "compiled layers",
        ("kernels.blocks=compiled",),
        "the exchange lies between two regions, with attention",
    ),
    Feature(
        "spikes skipped or rewound",
        ("optimizer.skip_spikes={action: rewind, sigmas: 1000.0, over_steps: 4}",),
        "judged by loss and norm of all ranks",
    ),
    Feature(
        "joined documents",
        ("data.documents=joined",),
        "a row is one document for all of its ranks",
    ),
    Feature(
        "fewer KV heads than ranks",
        ("model.num_kv_heads=1",),
        "ranks share the one that their queries read",
    ),
    Feature(
        "a degree for each length",
        ("parallel.context={64: 1, 512: 2}",),
        "groups of the axis that divide it",
    ),
    Feature(
        "fused views, split heads",
        (
            "model.layer_plan.schemes.local.near={position: {kind: nope}, window: 2}",
            "model.layer_plan.schemes.local.fuse={gate: token}",
        ),
        "keys and values are sent once, unrotated: each rank rotates what it receives, for both "
        "views; of split heads each view has an exchange of its own",
    ),
    Feature("resume on other ranks", ("train",), "a checkpoint does not know of context ranks"),
    Feature(
        "spare nodes under Slurm",
        ("launch submit --spares",),
        "ranks are counted anew on the nodes that remain",
    ),
)


def feature_problems(run: RunConfig) -> Iterator[str]:
    """Yield a line for each thing that a run file asks for and its context ranks refuse."""
    if run.parallel.context_axis == 1:
        return
    for feature in FEATURES:
        if feature.refused and not feature.is_command and (line := feature.refused(run)):
            yield line


def check_study(run: RunConfig) -> None:
    """Raise ConfigError where a run of a study has context ranks."""
    if run.parallel.context_axis > 1:
        raise ConfigError(_study(run))


def table() -> str:
    """The table in Markdown."""
    lines = ["| what | asked by, for example | with context ranks |", "|---|---|---|"]
    for feature in FEATURES:
        asked = ", ".join(f"`{words}`" for words in feature.asked)
        served = "**refused**: " if feature.refused else ""
        lines.append(f"| {feature.name} | {asked} | {served}{feature.how} |")
    return "\n".join(lines)
