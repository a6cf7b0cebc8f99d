"""Conversations for tests, and tokenizers that know the tokens of the shipped templates."""

import json
import random
from pathlib import Path
from typing import Any

from megahybrid.data.chat.template_file import SHIPPED

WORDS = "the a blue red cat dog sees runs to from why {x} é 漢字 😀 1 22".split()  # noqa: SIM905
EOD = "<|endoftext|>"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather <of> a "place" & its é.',
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
# One of the kind that released models have: no generation blocks, tools, loop controls, a date.
OF_MINE = """
{%- set ns = namespace(seen=false) -%}
{{ '<|im_start|>system\\n' }}{% if tools %}Tools: {{ tools | tojson }}{% endif %}
{{ strftime_now('%d %b %Y') }}<|im_end|>
{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}{{ call.function | tojson(indent=1) }}{% endfor %}
    {%- else %}{{ message['content'] | trim }}{% endif %}
    {{- '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def words(draw: random.Random) -> str:
    """A line or two, with spaces at the ends now and then."""
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
    return draw.choice(["", " ", "\n"]) + text + draw.choice(["", "\n", " \n\n", ".\n\nNo"])


def conversation(seed: int, *, tools: bool = False) -> list[dict[str, Any]]:
    """Turns of a user and the assistant, some with a system message; a call of a tool if asked."""
    draw = random.Random(seed)
    messages: list[dict[str, Any]] = []
    if draw.random() < 0.5:
        messages.append({"role": "system", "content": words(draw)})
    for number in range(draw.randint(1, 4)):
        messages.append({"role": "user", "content": words(draw)})
        if tools and number == 0:
            call = {"name": "weather", "arguments": {"place": words(draw)}}
            messages += [
                {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "content": words(draw)},
            ]
        messages.append({"role": "assistant", "content": words(draw)})
    return messages


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer.json with every token of the shipped templates, and two merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ċ", "Ċ"), ("a", "t"), ("Ġ", "c")]
    vocab = {token: index for index, token in enumerate(alphabet)}
    vocab |= {a + b: len(vocab) + n for n, (a, b) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    special = [EOD, *(token for tokens in SHIPPED.values() for token in tokens)]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    path = folder / "tokenizer.json"
    backend.save(str(path))
    settings = {"eos_token": EOD, "bos_token": {"content": "<|begin_of_text|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
