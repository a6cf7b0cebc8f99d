"""`describe`: everything that config alone can tell about a run, as a dict and as tables."""

import io
from dataclasses import asdict
from typing import Any, assert_never

from megahybrid.config import counting
from megahybrid.config.architecture_fit import Fits
from megahybrid.config.attention import rotation_of
from megahybrid.config.context_memory import context_memory
from megahybrid.config.describe_context import context_tables, describe_context, legal_in_words
from megahybrid.config.explain import show
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.memory_estimate import memory_per_rank
from megahybrid.config.model import ModelConfig
from megahybrid.config.parallel import legal_tensor_degrees
from megahybrid.config.run import RunConfig
from megahybrid.config.scheme_words import (
    norm_scale_and_beside,
    position_in_words,
    views_in_words,
)


def describe(
    run: RunConfig, world_size: int | None = None, fits: Fits | None = None
) -> dict[str, Any]:
    """The run in numbers, ready for JSON. Layers and KV cache are those of the last stage at its
    longest length; memory is for `world_size` ranks (one data rank when left out); `fits` tells
    which Hugging Face classes support the model (left out: none is listed)."""
    last = len(run.stages) - 1
    plan, length = run.plan_at(last), max(run.stages[last].lengths)
    cache = counting.kv_cache_bytes(run.model, length, plan)
    full_cache = counting.kv_cache_bytes(run.model, length, counting.full_attention(plan))
    world_size = world_size or run.parallel.model_ranks
    return {
        "parameters": counting.parameters(run.model),
        "length": length,
        "function": function_in_words(run.model),
        "layers": _layers(run, plan, length),
        "kv_cache_bytes": cache,
        "kv_cache_bytes_full": full_cache,
        "kv_cache_ratio": cache / full_cache,
        "stages": [_stage(run, index, world_size) for index in range(len(run.stages))],
        "total_steps": run.stage_plan.total_steps,
        "total_tokens": run.stage_plan.total_tokens,
        "world_size": world_size,
        "tensor": run.parallel.tensor,
        "context_axis": run.parallel.context_axis,
        "data_degree": run.parallel.data_degree(world_size),
        "zero_stage": run.parallel.zero_stage,
        "precision": run.precision,
        "legal_tensor_degrees": legal_tensor_degrees(run.model),
        "context": describe_context(run, run.parallel.data_degree(world_size)),
        "huggingface": [
            {
                "architecture": fit.architecture,
                "can": fit.can,
                "how": fit.how,
                "why_not": fit.reasons,
            }
            for fit in (fits(run.model, plan) if fits is not None else ())
        ],
    }


def function_in_words(model: ModelConfig) -> list[str]:
    """The choices of a model's function beside its layers that differ from their defaults."""
    words = []
    match model.activation:
        case "silu":
            pass
        case "gelu_tanh":
            words.append("GeGLU (activation gelu_tanh)")
        case never:
            assert_never(never)
    if model.embedding_scale != 1:
        words.append(f"embedding times {model.embedding_scale:g}")
    if model.residual_scale != 1:
        words.append(f"blocks add {model.residual_scale:g} f(x)")
    if model.logit_softcap is not None:
        words.append(f"logits capped at {model.logit_softcap:g}")
    return words


def _layers(run: RunConfig, plan: LayerPlan, length: int) -> list[dict[str, Any]]:
    return [
        {
            "layer": index,
            "scheme": name,
            "position": position_in_words(scheme),
            "theta": rope.theta if (rope := rotation_of(scheme.position)) else None,
            "window": scheme.window,
            "chunk": scheme.chunk,
            "qk_norm": scheme.qk_norm.kind,
            "score_scale": scheme.score_scale.kind,
            "with": norm_scale_and_beside(scheme),
            **({} if scheme.near is None else {"views": views_in_words(scheme)}),
            "parameters": counting.layer_parameters(run.model, scheme),
            "kv_cache_bytes": counting.layer_kv_cache_bytes(run.model, scheme, length),
            "flops_per_token": counting.layer_flops_per_token(run.model, scheme, length),
        }
        for index, (name, scheme) in enumerate(zip(plan.names(), plan.expand(), strict=True))
    ]


def _span(window: int | None, chunk: int | None) -> str:
    if chunk is not None:
        return f"chunk {chunk:,}"
    return f"{window:,}" if window else "all"


def _stage(run: RunConfig, index: int, world_size: int) -> dict[str, Any]:
    stage, plan = run.stages[index], run.plan_at(index)
    data_degree = run.parallel.data_degree(world_size)
    return {
        "name": stage.name,
        "tokens": run.stage_plan.stage_tokens[index],
        "steps": run.stage_plan.stage_steps[index],
        "lengths": [
            {
                "length": length,
                "ratio": ratio,
                "flops_per_token": counting.flops_per_token(run.model, length, plan),
                "flops_per_token_full": counting.flops_per_token(
                    run.model, length, counting.full_attention(plan)
                ),
                "ideal_speedup": counting.ideal_speedup(run.model, length, plan),
            }
            for length, ratio in stage.lengths.items()
        ],
        "flops": stage_flops(run, index),
        "recompute": stage.recompute
        if isinstance(stage.recompute, str | list)
        else stage.recompute.model_dump(),
        "schemes": stage.schemes,
        "anneal": anneal_steps(run, index),
        "memory_per_rank": {zero: _memory(run, index, data_degree, zero) for zero in range(4)},
    }


def _memory(run: RunConfig, index: int, data_degree: int, zero_stage: int) -> dict[str, int]:
    memory = memory_per_rank(
        run.model,
        run.stages[index],
        tensor=run.parallel.tensor,
        data_degree=data_degree,
        zero_stage=zero_stage,
        precision=run.precision,
        offload=run.parallel.offload,
        context=context_memory(run, index),
    )
    return {**asdict(memory), "total": memory.total}


def stage_flops(run: RunConfig, index: int) -> float:
    """Training FLOPs of a whole stage when every row is one document."""
    stage, parts = run.stages[index], run.plans[index]
    shares = {length: length * ratio for length, ratio in stage.lengths.items()}
    ends = [*(part.tokens for part in parts[1:]), run.stage_plan.stage_tokens[index]]
    return sum(
        (end - part.tokens)
        * counting.flops_per_token(run.model, length, part.plan)
        * (share / sum(shares.values()))
        for part, end in zip(parts, ends, strict=True)
        for length, share in shares.items()
    )


def anneal_steps(run: RunConfig, index: int) -> list[dict[str, Any]]:
    """Return the changes of layers while a stage runs: the step and the tokens of the stage from
    which values hold, those it begins with first. Empty where nothing is annealed."""
    anneal, stage = run.stages[index].anneal, run.stages[index]
    if anneal is None:
        return []
    rows = []
    for part in run.plans[index]:
        values: dict[str, float | int | None] = {}
        for name, end in anneal.schemes.items():
            scheme = part.plan.schemes[name]
            if end.window is not None:
                values[f"{name}.window"] = scheme.window
            rope = rotation_of(scheme.position)
            if end.position is not None and rope is not None:
                values[f"{name}.position.theta"] = rope.theta
        rows.append(
            {
                "step": run.stage_plan.first_step(index, part.tokens),
                "tokens": part.tokens,
                "values": values,
                "flops_per_token": counting.flops_per_token(
                    run.model, max(stage.lengths), part.plan
                ),
            }
        )
    return rows


def render(description: dict[str, Any], width: int = 110) -> str:
    """The description as text: tables of layers, stages, memory and Hugging Face architectures."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False, markup=False, color_system=None)
    console.print(
        f"{description['parameters']:,} parameters · KV cache at {description['length']:,} tokens "
        f"{_bytes(description['kv_cache_bytes'])}, {description['kv_cache_ratio']:.3f} of full "
        f"({_bytes(description['kv_cache_bytes_full'])})"
    )
    if description["function"]:
        console.print(" · ".join(description["function"]))
    degrees = ", ".join(str(n) for n in description["legal_tensor_degrees"])
    console.print(f"legal tensor degrees: {degrees}")
    for line in legal_in_words(description["context"]):
        console.print(line)
    console.print(_layer_table(description))
    for line in _with_lines(description["layers"]):
        console.print(line)
    console.print(_stage_table(description))
    if any(row["epochs"] is not None for row in description.get("data", ())):
        console.print(_data_table(description["data"]))
    for changes in filter(None, map(_changes, description["stages"])):
        console.print(changes)
    for stage in description["stages"]:
        if stage["anneal"]:
            console.print(_anneal_table(stage))
    console.print(_memory_table(description))
    for table in context_tables(description["context"], _table):
        console.print(table)
    if description["huggingface"]:
        console.print(_huggingface_table(description))
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _layer_table(description: dict[str, Any]) -> Any:
    table = _table(
        f"Layers at {description['length']:,} tokens (each of a range)",
        ("layers", "scheme", "position"),
        ("theta", "window", "parameters", "KV cache", "MFLOP/token"),
    )
    for first, last, layer in _equal_runs(description["layers"]):
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            layer["scheme"],
            layer["position"] if "views" not in layer else f"{layer['position']}; {layer['views']}",
            f"{layer['theta']:,.0f}" if layer["theta"] else "-",
            _span(layer["window"], layer["chunk"]),
            f"{layer['parameters']:,}",
            _bytes(layer["kv_cache_bytes"]),
            f"{layer['flops_per_token'] / 1e6:,.2f}",
        )
    return table


def _with_lines(layers: list[dict[str, Any]]) -> list[str]:
    """ "  global layers have QK-norm rms over head, gate per head", where any are."""
    lines = [
        f"  {layer['scheme']} layers have {', '.join(layer['with'])}"
        for layer in layers
        if layer["with"]
    ]
    return list(dict.fromkeys(lines))


def _equal_runs(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """(first, last, layer) of consecutive layers that differ only in their number."""
    runs: list[tuple[int, int, dict[str, Any]]] = []
    for layer in layers:
        if runs and {**layer, "layer": 0} == {**runs[-1][2], "layer": 0}:
            runs[-1] = (runs[-1][0], layer["layer"], runs[-1][2])
        else:
            runs.append((layer["layer"], layer["layer"], layer))
    return runs


def _stage_table(description: dict[str, Any]) -> Any:
    table = _table(
        "Stages",
        ("stage",),
        ("steps", "tokens", "length", "ratio", "GFLOP/token", "full", "ideal speed-up"),
    )
    for stage in description["stages"]:
        for index, row in enumerate(stage["lengths"]):
            table.add_row(
                stage["name"] if index == 0 else "",
                f"{stage['steps']:,}" if index == 0 else "",
                _count(stage["tokens"]) if index == 0 else "",
                f"{row['length']:,}",
                str(row["ratio"]),
                f"{row['flops_per_token'] / 1e9:.4g}",
                f"{row['flops_per_token_full'] / 1e9:.4g}",
                f"{row['ideal_speedup']:.3f}",
            )
    return table


def _data_table(data: list[dict[str, Any]]) -> Any:
    right = ("share", "tokens", "epochs", "targets, about")
    table = _table("Data on this machine", ("stage", "source"), right)
    for row in data:
        epochs, targets = row["epochs"], row["targets"]
        table.add_row(
            row["stage"],
            row["source"],
            f"{row['share']:.3g}",
            f"{row['tokens']:,}",
            "–" if epochs is None else f"{epochs:.3g}",
            "–" if targets is None else f"{targets:,}",
        )
    return table


def _changes(stage: dict[str, Any]) -> str:
    """ "  from long on: global.position.theta=100000" or nothing."""

    def walk(tree: Any, path: str) -> list[str]:
        if isinstance(tree, dict):
            return [line for key, value in tree.items() for line in walk(value, f"{path}.{key}")]
        return [f"{path}={show(tree)}"]

    changes = [line for name, fields in stage["schemes"].items() for line in walk(fields, name)]
    return f"  from {stage['name']} on: {', '.join(changes)}" if changes else ""


def _anneal_table(stage: dict[str, Any]) -> Any:
    rows = stage["anneal"]
    length = max(row["length"] for row in stage["lengths"])
    names = tuple(rows[0]["values"])
    table = _table(
        f"Annealed in {stage['name']}, from these steps and tokens of the stage on",
        (),
        ("step", "tokens", *names, f"GFLOP/token at {length:,}"),
    )
    for row in rows:
        table.add_row(
            f"{row['step']:,}",
            _count(row["tokens"]),
            *(f"{row['values'][name]:,.10g}" for name in names),
            f"{row['flops_per_token'] / 1e9:.4g}",
        )
    return table


def _memory_table(description: dict[str, Any]) -> Any:
    axis = description["context_axis"]
    context = f" x context {axis}" if axis > 1 else ""
    degrees = f"tensor {description['tensor']}{context} x data {description['data_degree']}"
    table = _table(
        f"Memory per rank, {degrees}, {description['precision']} "
        f"(this run: ZeRO {description['zero_stage']})",
        ("stage", "ZeRO"),
        ("weights", "gradients", "optimizer", "activations", "working", "total"),
    )
    for stage in description["stages"]:
        for zero, memory in stage["memory_per_rank"].items():
            table.add_row(
                stage["name"] if zero == 0 else "",
                str(zero),
                *(_bytes(memory[name]) for name in ("weights", "gradients", "optimizer")),
                *(_bytes(memory[name]) for name in ("activations", "working", "total")),
            )
    return table


def _huggingface_table(description: dict[str, Any]) -> Any:
    table = _table(
        "Hugging Face architectures", ("architecture", "supported", "how, or why not"), ()
    )
    for fit in description["huggingface"]:
        table.add_row(
            fit["architecture"],
            "yes" if fit["can"] else "no",
            fit["how"] if fit["can"] else "; ".join(fit["why_not"]),
        )
    return table


def _count(number: int) -> str:
    """A number of tokens with up to six digits."""
    for unit, size in (("T", 10**12), ("B", 10**9)):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number:,}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB" if count < 10_000 else f"{count / 1024:,.2f} TiB"
