"""Chat templates by name or file, and what they may see of a tokenizer."""

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from megahybrid.errors import DataError
from megahybrid.plain_file import read_plain_file

# The tokens of each shipped template, which `data tokenizer --chat NAME` reserves.
SHIPPED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "cohere": (
        "<BOS_TOKEN>",
        "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
        "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
    ),
    "plain": (),
}
OF_TOKENIZER = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class TemplateFile:
    """A template: the name it was given by, its text, and the tokens that it is known to write."""

    name: str
    source: str
    tokens: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """The hash of its text."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def read_template(name: str, option: str = "--template") -> TemplateFile:
    """A shipped template by its name, a .jinja file, or the template of a tokenizer_config.json.

    Raises DataError where there is none.
    """
    if name in SHIPPED:
        shipped = files("megahybrid.data.chat") / "templates" / f"{name}.jinja"
        return TemplateFile(name, shipped.read_text(encoding="utf-8"), SHIPPED[name])
    path = Path(name)
    try:
        source = read_plain_file(path).decode("utf-8")
        if path.suffix == ".json":
            source = json.loads(source)["chat_template"]
    except OSError as error:
        raise DataError(
            f"{option}={name} is none of {', '.join(SHIPPED)}, nor a file that can be read "
            f"({error.strerror}). Name one of these, or a .jinja file."
        ).because(error) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        source = None
    if not isinstance(source, str):
        raise DataError(
            f"{option}={name} holds no chat template. Name a .jinja file (UTF-8), or a "
            "tokenizer_config.json with a chat_template that is one text."
        )
    return TemplateFile(name, source)


def template_variables(tokenizer: Path) -> dict[str, str]:
    """Special tokens that templates call by name, of the tokenizer_config.json beside a file."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    path = folder / "tokenizer_config.json"
    if tokenizer.suffix == ".model" or not path.exists():
        return {}
    try:
        settings = json.loads(read_plain_file(path))
        found = {name: _text(settings.get(name)) for name in OF_TOKENIZER}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise DataError(f"{path} is damaged. Copy it again, or remove it.") from None
    return {name: text for name, text in found.items() if text is not None}


def _text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
