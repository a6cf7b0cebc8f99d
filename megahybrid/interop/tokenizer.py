"""The tokenizer of an export, in the form that AutoTokenizer reads, and the proof of its ids.

Ours adds no special token and reads none in a text, so the written one does neither: no
post-processor, and `split_special_tokens`.
"""

import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.checkpoint import durable
from megahybrid.config import RunConfig
from megahybrid.data.run_tokenizer import known_tokenizer
from megahybrid.data.tokenizer import Tokenizer, load_tokenizer
from megahybrid.errors import DataError, InteropError
from megahybrid.interop.logit_proof import quiet
from megahybrid.interop.sentencepiece_model import CONTROL, UNKNOWN, parse, tokenizer_json
from megahybrid.plain_file import read_plain_file

TEXT_CHARACTERS = 1_000_000
FUZZ = 2000
NONE = "none"


@dataclass(frozen=True)
class WrittenTokenizer:
    """The tokenizer as written: the id that ends documents, and lines for the user."""

    eod_id: int | None
    words: tuple[str, ...]
    shipped: bool = True


def write_tokenizer(folder: Path, run: RunConfig, named: str | None) -> WrittenTokenizer:
    """Write the tokenizer and compare its ids with ours on a megabyte of text and on fuzz.

    `named` is a file or "none"; the run's own when None. Raises MegahybridError where it is not the
    one that made the data, or where one id differs.
    """
    known = known_tokenizer(run)
    eod_id = None if known is None else known[0].eod_id
    file = named or run.data.tokenizer
    if file is None or file == NONE:
        return WrittenTokenizer(eod_id, ("no tokenizer: ship it beside",), shipped=False)
    ours = load_tokenizer(file)
    if ours.info.vocab_size > run.model.vocab_size:
        raise DataError(
            f"tokenizer {file} has {ours.info.vocab_size} tokens, more than the model knows "
            f"(model.vocab_size={run.model.vocab_size}). Name the tokenizer that made the data."
        )
    if known is not None and known[0].sha256 != ours.info.sha256:
        raise DataError(
            f"tokenizer {file} has sha256 {ours.info.sha256[:12]}, but {known[1]} was made with "
            f"{known[0].sha256[:12]}. Name the tokenizer that made the data."
        )
    eod_id = ours.info.eod_id if eod_id is None else eod_id
    kinds = _forms(_file(Path(file)), eod_id)
    words = []
    for number, files in enumerate(kinds, 1):
        for name, content in files.items():
            durable.write(folder / name, [memoryview(content)])
        try:
            words.append(check_ids(folder, ours, eod_id))
            break
        except InteropError:
            if number == len(kinds):
                raise
            for name in files:
                (folder / name).unlink()
            words.append(
                "tokenizer: as tokenizer.json it breaks ties otherwise, so it left as the "
                "sentencepiece file, whose ids are ours; transformers strips the ends of decoded "
                "text and shows bytes as <0x0A>"
            )
    return WrittenTokenizer(eod_id, tuple(words))


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / "tokenizer.json", *sorted(path.glob("*.model"))]
    return next(entry for entry in found if entry.exists())


def _forms(file: Path, eod_id: int) -> list[dict[str, bytes]]:
    """Files by name, for each form that may give the same ids, the better one first."""
    raw = read_plain_file(file)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    if file.suffix == ".json":
        tokenizer = json.loads(raw) | {
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        settings["eos_token"] = _token(tokenizer, eod_id)
        return [_files(tokenizer, settings)]
    model = parse(raw)
    settings["eos_token"] = model.pieces[eod_id][0]
    settings["unk_token"] = next(text for text, _, kind in model.pieces if kind == UNKNOWN)
    slow = settings | {"tokenizer_class": "SentencePieceBackend"}
    control = [text for text, _, kind in model.pieces if kind == CONTROL]
    slow["additional_special_tokens"] = control
    return [
        _files(tokenizer_json(model), settings),
        {"tokenizer.model": raw, "tokenizer_config.json": _bytes(slow)},
    ]


def _files(tokenizer: dict[str, Any], settings: dict[str, Any]) -> dict[str, bytes]:
    return {"tokenizer.json": _bytes(tokenizer), "tokenizer_config.json": _bytes(settings)}


def _bytes(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _token(tokenizer: dict[str, Any], token_id: int) -> str:
    """The text of an id in a tokenizer.json."""
    for added in tokenizer.get("added_tokens") or []:
        if added["id"] == token_id:
            return added["content"]
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, dict):
        return next(text for text, index in vocab.items() if index == token_id)
    return vocab[token_id][0]


def check_ids(folder: Path, ours: Tokenizer, eod_id: int) -> str:
    """Load what `folder` holds and compare ids; returns the proof in words, or raises."""
    from transformers import AutoTokenizer

    texts = list(probe_texts(ours))
    with quiet():
        try:
            theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # what a foreign file makes the library raise
            raise InteropError(
                f"transformers cannot read the tokenizer ({str(error).splitlines()[0][:120]}). "
                "Export with --tokenizer none, and ship it beside."
            ) from None
        found = theirs(texts)["input_ids"]
    for text, mine, other in zip(texts, ours.encode(texts), found, strict=True):
        if list(mine) != list(other):
            at = next(
                (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b),
                min(len(mine), len(other)),
            )
            raise InteropError(
                f"the written tokenizer gives other ids for {text[:40]!r} (token {at}: "
                f"{other[at : at + 3]}, ours {list(mine[at : at + 3])}). "
                "Export with --tokenizer none, and ship it beside."
            )
    if theirs.eos_token_id != eod_id:
        raise InteropError(
            f"the written tokenizer ends documents with id {theirs.eos_token_id} (ours with "
            f"{eod_id}). Export with --tokenizer none, and ship it beside."
        )
    characters = sum(len(text) for text in texts)
    return f"tokenizer ids: the same for {characters:,} characters in {len(texts):,} texts"


def probe_texts(ours: Tokenizer, seed: int = 1) -> Iterator[str]:
    """A megabyte of source text that every Python has, and fuzz: control words, spaces, any script,
    and texts of random tokens."""
    held = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if held >= TEXT_CHARACTERS:
            break
        text = path.read_text(encoding="utf-8", errors="ignore")[: TEXT_CHARACTERS - held]
        held += len(text)
        yield text
    generator = random.Random(seed)
    words = ["</s>", "<unk>", "<|endoftext|>", "<0x0A>", " ", "  ", "\t", "\n", "▁", "0", "12", "é"]
    words += [
        "e\u0301",
        "漢",
        "字",
        "😀",
        "\u200d",
        "عربي",
        "क्ष",
        "\x00",
        "\ufeff",
        "a",
        "The",
        "'s",
        ".",
    ]
    for _ in range(FUZZ):
        yield "".join(generator.choices(words, k=generator.randint(0, 24)))
        yield "".join(chr(_scalar(generator)) for _ in range(generator.randint(1, 12)))
        ids = generator.choices(range(ours.info.vocab_size), k=generator.randint(1, 24))
        yield ours.decode(ids)
    yield from (" " * spaces for spaces in range(48))


def _scalar(generator: random.Random) -> int:
    """A code point that is a character: surrogates are not."""
    code = generator.choice((0x2FF, 0xFFFF, 0x10FFFF))
    found = generator.randrange(1, code)
    return found if not 0xD800 <= found < 0xE000 else 0x20
