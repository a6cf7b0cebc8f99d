"""The model card of an export: what the model is, how it was trained, and how it was verified."""

import re
from collections.abc import Sequence
from pathlib import Path

from megahybrid.checkpoint.manifest import Manifest
from megahybrid.config import RunConfig
from megahybrid.config.attention import AttentionScheme, rotation_of
from megahybrid.config.describe import function_in_words, position_in_words, views_in_words
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.interop.architectures.base import Architecture
from megahybrid.interop.logit_proof import Row
from megahybrid.interop.tokenizer import WrittenTokenizer
from megahybrid.ledger import EvaluateEvent, read_ledger
from megahybrid.printable import printable

CONTINUATION = (
    'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
    "print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))",
)
ANSWER = (
    'messages = [{"role": "user", "content": "What do you know?"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    ")",
    "answer = model.generate(**inputs, max_new_tokens=64)[0, inputs['input_ids'].shape[1] :]",
    "print(tokenizer.decode(answer, skip_special_tokens=True))",
)


def model_card(
    run: RunConfig,
    plan: LayerPlan,
    manifest: Manifest,
    architecture: Architecture,
    dtype: str,
    rows: Sequence[Row],
    tokenizer: WrittenTokenizer,
    parameters: int,
    evaluations: Sequence[str] = (),
    *,
    chats: bool = False,
) -> str:
    """Return the text of README.md; chats: whether a chat template is among the files."""
    model = run.model
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [megahybrid]",
        "---",
        "",
        f"# {parameters:,} parameters, {plan.num_layers} layers, {architecture.name}ForCausalLM",
        "",
        "```python",
        *_snippet(bool(architecture.code_files), tokenizer, chats),
        "```",
        "",
        f"Hidden size {model.hidden_size}, {model.num_heads} query and {model.num_kv_heads} key "
        f"heads of {model.head_dim}, MLP {model.intermediate_size}, vocabulary {model.vocab_size}, "
        f"{model.block} blocks with {model.norm} norms (eps {model.eps:g}), "
        f"{'tied' if model.tie_embeddings else 'untied'} embeddings, logits times "
        f"{', '.join([f'{model.logit_scale:g}', *function_in_words(model)])}. Weights in {dtype}.",
        "",
        "## Layers",
        "",
        "| layers | scheme | position | theta | window (keys, own included) | QK-norm | scale |",
        "|---|---|---|---|---|---|---|",
        *_layer_rows(plan),
        "",
        "## Training",
        "",
        f"Step {manifest.step:,}, {manifest.tokens:,} tokens. Trained on documents that "
        f"{'do not see one another' if run.data.documents == 'masked' else 'are joined'}, without "
        "a token at the beginning.",
        "",
        "| stage | tokens | lengths (ratio) | batch tokens |",
        "|---|---|---|---|",
        *_stage_rows(run),
        "",
        *(["## Evaluation", "", *evaluations, ""] if evaluations else []),
        "## Verified",
        "",
        "Every tensor was read back: the bits are those of the model that was trained, rounded to "
        f"{dtype}. Loaded with transformers on a CPU in fp32 and compared with it on random ids, "
        "below and above the window (long windows shrunk in both); `generate` wrote the last ones:",
        "",
        "| run | tokens | largest logit difference | bound | largest logit |",
        "|---|---|---|---|---|",
        *(
            f"| {row.what} | {row.length} | {row.difference:.2e} | {row.bound:.1e} "
            f"| {row.largest:.3g} |"
            for row in rows
        ),
        "",
        *(f"{line[0].upper()}{line[1:]}." for line in tokenizer.words),
        "",
    ]
    return "\n".join(lines)


def _snippet(trusted: bool, tokenizer: WrittenTokenizer, chats: bool) -> list[str]:
    """Return the lines of a program that generates text with the export, or an answer."""
    trust = ", trust_remote_code=True" if trusted else ""
    loads = f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})'
    if not tokenizer.shipped:
        return [
            "import torch",
            "from transformers import AutoModelForCausalLM",
            loads,
            "ids = torch.tensor([[0, 1, 2]])  # of your tokenizer",
            "print(model.generate(ids, max_new_tokens=32))",
        ]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        loads,
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        *(ANSWER if chats else CONTINUATION),
    ]


def evaluations_of(checkpoint: Path, step: int) -> list[str]:
    """Return a table of the held-out losses that the checkpoint's own run measured at that step."""
    ledger = checkpoint.parent.parent / "ledger.jsonl"
    if not ledger.exists():
        return []
    rows = {
        (score.set, score.length, score.loss, score.tokens)
        for line, score in read_ledger(ledger).of(EvaluateEvent)
        if line.step == step
    }
    if not rows:
        return []
    return [
        "| held out | length | loss (nats per token) | tokens |",
        "|---|---|---|---|",
        *(
            f"| {_cell(name)} | {length} | {'–' if loss is None else format(loss, '.4f')} "
            f"| {tokens:,} |"
            for name, length, loss, tokens in sorted(rows, key=lambda row: (*row[:2], row[3]))
        ),
    ]


def _cell(text: str) -> str:
    """Return a name for a table of Markdown, where it can end no cell and be no HTML."""
    return re.sub(r"([\\`*<>|&~$]|\[|\])", r"\\\1", printable(text))


def _layer_rows(plan: LayerPlan) -> list[str]:
    """Return one row for each stretch of layers of one scheme."""
    names, rows, start = plan.names(), [], 0
    for index in range(1, len(names) + 1):
        if index == len(names) or names[index] != names[start]:
            layers = f"{start}" if index == start + 1 else f"{start}-{index - 1}"
            scheme = plan.schemes[names[start]]
            rows.append(f"| {layers} | {names[start]} | {_scheme_cells(scheme)} |")
            start = index
    return rows


def scheme_in_words(scheme: AttentionScheme) -> str:
    """Return a scheme for a line of text: "rope theta 10000, window 4096"."""
    words = position_in_words(scheme)
    if (rope := rotation_of(scheme.position)) is not None:
        words += f" theta {rope.theta:g}"
    if scheme.chunk is not None:
        words += f", chunks of {scheme.chunk}"
    else:
        words += ", all keys" if scheme.window is None else f", window {scheme.window}"
    if scheme.qk_norm.kind != "none":
        words += f", QK-norm {scheme.qk_norm.kind} over {scheme.qk_norm.over}"
    if scheme.score_scale.kind != "sqrt_dim":
        words += f", scale {scheme.score_scale.kind}"
    if scheme.sink:
        words += ", learned sinks"
    return words if scheme.near is None else f"{words}; {views_in_words(scheme)}"


def _scheme_cells(scheme: AttentionScheme) -> str:
    rope = rotation_of(scheme.position)
    theta = "-" if rope is None else f"{rope.theta:g}"
    norm = scheme.qk_norm
    words = "-" if norm.kind == "none" else f"{norm.kind} over {norm.over}"
    window = "all" if scheme.window is None else str(scheme.window)
    if scheme.chunk is not None:
        window = f"chunk {scheme.chunk}"
    position = position_in_words(scheme)
    if scheme.near is not None:
        position += f"; {views_in_words(scheme)}"
    return " | ".join((position, theta, window, words, scheme.score_scale.kind))


def _stage_rows(run: RunConfig) -> list[str]:
    rows = []
    for index, stage in enumerate(run.stages):
        lengths = ", ".join(f"{length} ({ratio})" for length, ratio in stage.lengths.items())
        tokens = run.stage_plan.stage_tokens[index]
        rows.append(f"| {stage.name} | {tokens:,} | {lengths} | {stage.batch_tokens} |")
    return rows
