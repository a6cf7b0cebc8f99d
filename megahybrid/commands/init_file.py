"""The run file that `megahybrid init` writes: its values, each beside where it comes from."""

import json
import re
import shlex
from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from megahybrid import __version__
from megahybrid.commands.init_chats import chat_commands, chat_findings
from megahybrid.commands.init_machine import CORE_FLOPS, Machine
from megahybrid.commands.init_recipe import TOKENS_PER_PARAMETER, Recipe
from megahybrid.commands.init_texts import Texts
from megahybrid.config.counting import flops_per_token
from megahybrid.config.explain import show
from megahybrid.printable import printable

SCHEMA_FILE = "run.schema.json"
COMMENT_COLUMN = 50
WORDS = ("null", "true", "false")


def commands(folder: str, target: str, texts: Texts, found: Recipe) -> list[str]:
    """The commands that follow: a tokenizer, tokens, training; conversations between them."""
    model, data = f"{target}/tokenizer.model", f"{target}/data"
    held_out: list[str] = []
    if texts.held_out is not None:
        held_out = ["--held-out", f"{texts.held_out.fraction:g}"]
        held_out += ["--seed", str(texts.held_out.seed)] if texts.held_out.seed else []
    vocab = str(found.run.model.vocab_size)
    words = [
        ["tokenizer", folder, "--output", model, "--vocab-size", vocab],
        ["tokenize", folder, "--tokenizer", model, "--output", data, *held_out],
    ]
    behind: list[list[str]] = []
    if found.chats is not None:
        if found.chats.chats.template.tokens:
            words[0] += ["--chat", found.chats.chats.template.name]
        of_chats, behind = chat_commands(target, found.chats)
        words += of_chats
    lines = [["data", *line] for line in words] + [["train", f"{target}/run.yaml"], *behind]
    return [shlex.join(["megahybrid", *line]) for line in lines]


def findings(folder: str, texts: Texts, machine: Machine, found: Recipe) -> list[str]:
    """What was found and what follows from it, a line each: the arithmetic behind the numbers."""
    model, run = found.run.model, found.run
    shares = [(name, share) for name, share in texts.scripts.items() if share >= 0.005]
    scripts = ", ".join(f"{name} {share:.0%}" for name, share in shares[:4])
    per_token = texts.characters_per_token(model.vocab_size)
    looked = "" if texts.whole else " (a part was looked at)"
    lines = [
        f"text: {_many(texts.files, 'file')}, {_many(texts.documents, 'document')}, "
        f"{texts.bytes:,} bytes"
        f"{looked}; letters: {scripts or 'none'}",
        f"documents: {texts.median:,} characters in the middle, {texts.longest:,} the longest",
        f"tokens: {texts.characters:,} characters / {per_token:.1f} (an estimate at "
        f"vocab_size {model.vocab_size:,}; `tokenize` counts) = {found.text_tokens:,}",
        f"held out: {_held_out(texts)}",
        f"model: {found.size}, {found.parameters:,} parameters, plan {found.plan}",
        f"training: {found.tokens:,} tokens = {found.tokens / found.text_tokens:.2g} times the "
        f"text, {found.tokens / found.parameters:.2g} tokens a parameter "
        f"({TOKENS_PER_PARAMETER} are plenty, arXiv 2203.15556); bound by {found.limited_by}",
    ]
    if machine.device == "cpu":
        flops = flops_per_token(model, found.lengths[0])
        speed = machine.cores * CORE_FLOPS / flops
        lines.append(
            f"speed: {machine.cores} cores x {CORE_FLOPS / 1e9:.0f} GFLOP/s / {flops / 1e6:.1f} "
            f"MFLOP a token = {speed:,.0f} tokens/s, a cautious guess; `train` measures"
        )
    if found.chats is not None:
        lines += chat_findings(found.chats, per_token)
    if found.left_out:
        names = ", ".join(f"{length:,}" for length in found.left_out)
        lines.append(f"rows of {names} are left out: no document is as long")
    for stage, size in zip(run.stages, found.memory, strict=True):
        steps, length = stage.tokens // int(str(stage.batch_tokens)), max(stage.lengths)
        what = "conversations in rows" if stage.name == "chats" else "rows"
        lines.append(
            f"{what} of {length:,}: {stage.tokens:,} tokens / {stage.batch_tokens:,} a batch "
            f"({_many(int(str(stage.batch_tokens)) // length, 'row')}) = {steps:,} steps; "
            f"{size / 2**30:.2f} GiB a rank of {machine.words}"
        )
    return lines


def _held_out(texts: Texts) -> str:
    if texts.held_out is None:
        return "nothing, no few of these documents are a small part; cut them to hold some out"
    held = texts.held_out
    return f"{_many(held.documents, 'document')}, {held.share:.1%} of the text, drawn by hash"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def run_file(folder: str, target: str, texts: Texts, machine: Machine, found: Recipe) -> str:
    """The text of the run file."""
    told = [
        f"Made by megahybrid {__version__} (init) of {show(folder)}. "
        "Every line is yours to change.",
        *findings(folder, texts, machine, found),
    ]
    head = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        *(
            f"# {part}"
            for line in told
            for part in wrap(printable(line), 96, subsequent_indent="  ")
        ),
        "# Then:",
        *(f"#   {printable(line)}" for line in commands(folder, target, texts, found)),
    ]
    return "\n".join([*head, *_body(found)]) + "\n"


def _body(found: Recipe) -> Iterator[str]:
    tree = found.tree
    yield "seed: 1"
    yield f"directory: {_flow(tree['directory'])}"
    yield _told(
        f"precision: {tree['precision']}",
        "bf16 on a GPU" if tree["precision"] == "fp32" else "of weights and activations",
    )
    degrees = _flow(tree["parallel"])
    yield _told(f"parallel: {degrees}", "the other ranks, if any, share the batch")
    yield from _model(tree["model"])
    yield from _data(tree["data"])
    yield f"optimizer: {_flow(tree['optimizer'])}"
    yield "stages:"
    for index, stage in enumerate(tree["stages"]):
        yield from _stage(stage, index)
    for name in ("checkpoint", "evaluate", "log"):
        yield f"{name}: {_flow(tree[name])}"


def _model(model: dict[str, Any]) -> Iterator[str]:
    plan = model["layer_plan"]
    yield "model:"
    notes = {
        "vocab_size": "as many as the tokenizer has",
        "num_kv_heads": "keys and values are shared by some query heads",
    }
    for name, value in model.items():
        if name != "layer_plan":
            yield _told(f"  {name}: {_flow(value)}", notes.get(name, ""))
    yield "  layer_plan:"
    yield f"    num_layers: {plan['num_layers']}"
    yield _told(f"    pattern: {_flow(plan['pattern'])}", "repeats down the layers")
    yield "    schemes:"
    for name, scheme in plan["schemes"].items():
        note = "a query sees so many keys, itself included" if scheme.get("window") else ""
        yield _told(f"      {name}: {_flow(scheme)}", note)


def _data(data: dict[str, Any]) -> Iterator[str]:
    yield _told("data:", "paths are relative to where commands are given")
    yield f"  sources: {_flow(data['sources'])}"
    if data["held_out"]:
        yield f"  held_out: {_flow(data['held_out'])}"
    yield f"  tokenizer: {_flow(data['tokenizer'])}"
    yield _told(f"  block_tokens: {data['block_tokens']}", "16 of the longest rows")


def _stage(stage: dict[str, Any], index: int) -> Iterator[str]:
    length, batch = next(iter(stage["lengths"])), stage["batch_tokens"]
    first = {name: stage[name] for name in ("name", "lengths", "weights")}
    yield f"  - {{{_flow(first)[1:-1]},"
    rest = f"     tokens: {stage['tokens']:_}, batch_tokens: {batch}, "
    rest += f"micro_batch_tokens: {stage['micro_batch_tokens']},"
    yield _told(rest, f"{stage['tokens'] // batch:,} steps of {_many(batch // length, 'row')}")
    if "recompute" in stage:
        yield _told(f"     recompute: {stage['recompute']},", "so that it fits in memory")
    rate = f"     learning_rate: {_flow(stage['learning_rate'])}}}"
    yield _told(rate, "of AdamW, at the ends of the stage" if not index else "")


def _told(line: str, why: str) -> str:
    return f"{line:{COMMENT_COLUMN - 1}} # {why}" if why else line


def _flow(value: Any) -> str:
    """A value in YAML on one line; text in quotes where it would be read as something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9/_.-]*", value)
        # JSON's strings are YAML's; `null` and `true` are none.
        return value if plain and value.lower() not in WORDS else json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value)
