"""Tokenizers: the only door to sentencepiece and Hugging Face's tokenizers."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.token_file import Array
from megahybrid.data.word_cache import (
    SEPARATORS,
    SPACE_SIGN,
    SplitPatterns,
    WordCache,
    hugging_face_splits,
    sentencepiece_splits,
)
from megahybrid.errors import DataError
from megahybrid.plain_file import read_plain_file

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|END_OF_TURN_TOKEN|>", "<eos>", "</s>", "<eod>")
SENTENCE_BYTES = 16_384  # sentencepiece drops what is longer than its limit, silently
TRAINER_THREADS = 4  # written into the model file, so a constant: its hash must not depend on cores


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. `encode` adds no special token and reads none in the text; it takes
    several texts, and raises TypeError for one that is not in a list."""

    info: TokenizerInfo

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        ...

    def encode_arrays(self, texts: Sequence[str]) -> list[Array]:
        """The same ids in the dtype of `info`; the fast way for much text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; eod and other control tokens give none."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a token by its own name, special ones too; None where there is none."""
        ...


class _Arrays:
    """`encode_arrays` of what has `encode` and `info`."""

    info: TokenizerInfo
    _word_cache: WordCache | None = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        raise NotImplementedError

    def encode_arrays(self, texts: Sequence[str]) -> list[Array]:
        """Ids of each text in the dtype of `info`, word by word where that gives the same."""
        if self._word_cache is not None:
            return self._word_cache.encode(several(texts))
        return [np.asarray(ids, self.info.dtype) for ids in self.encode(texts)]

    def _use_word_cache(self, cuts: SplitPatterns | None, whole: re.Pattern[str]) -> None:
        if cuts is not None:
            self._word_cache = WordCache(self.encode, np.dtype(self.info.dtype), cuts, whole)


class SentencePieceTokenizer(_Arrays):
    """A sentencepiece model file; eod is its end-of-sentence piece."""

    def __init__(self, path: Path, eod: str | None = None, threads: int = 1) -> None:
        from sentencepiece import SentencePieceProcessor

        self._threads = threads
        raw = _read(path)
        try:
            self._processor = SentencePieceProcessor(model_proto=raw)
        except RuntimeError:
            raise DataError(
                f"{path} is not a sentencepiece model (damaged?). Train or copy it again."
            ) from None
        piece = self._processor
        eod_id = piece.eos_id() if eod is None else piece.piece_to_id(eod)
        if eod_id < 0 or (eod is not None and piece.id_to_piece(eod_id) != eod):
            raise DataError(
                f"{path} has no piece {eod or 'for the end of a sentence'}. Name one with --eod."
            )
        self.info = TokenizerInfo(
            kind="sentencepiece", sha256=_sha256(raw), vocab_size=piece.vocab_size(), eod_id=eod_id
        )
        names = [piece.id_to_piece(token) for token in range(piece.vocab_size())]
        self._use_word_cache(sentencepiece_splits(raw, names), re.compile(SPACE_SIGN))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return self._processor.encode(several(texts), num_threads=self._threads)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids."""
        return self._processor.decode([int(token) for token in ids])

    def token_id(self, token: str) -> int | None:
        """The id of a piece; that of what stands for every unknown one is none."""
        found = int(self._processor.piece_to_id(token))
        return found if self._processor.id_to_piece(found) == token else None


class HuggingFaceTokenizer(_Arrays):
    """A `tokenizer.json`; eod is the token named, or the first of EOD_NAMES that it has."""

    def __init__(self, path: Path, eod: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise DataError(
                f"{path} needs the package tokenizers, which is not installed. "
                "Run `pip install tokenizers`."
            ) from None
        raw = _read(path)
        try:
            backend: Any = Backend.from_buffer(raw)
        except Exception:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json (damaged?). Copy it again.") from None
        backend.no_truncation()
        backend.no_padding()
        # Text that spells a special token is text: otherwise a document could end itself.
        backend.encode_special_tokens = True
        names = EOD_NAMES if eod is None else (eod,)
        eod_id = next((i for i in map(backend.token_to_id, names) if i is not None), None)
        if eod_id is None:
            raise DataError(f"{path} has no token {' or '.join(names)}. Name its eod with --eod.")
        size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self._backend = backend
        self.info = TokenizerInfo(
            kind="huggingface", sha256=_sha256(raw), vocab_size=size, eod_id=eod_id
        )
        self._use_word_cache(hugging_face_splits(backend.to_str()), SEPARATORS)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        encoded = self._backend.encode_batch_fast(several(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)


def several(texts: Sequence[str]) -> list[str]:
    """A list of texts; raises TypeError for one text, which is itself a sequence: of letters."""
    if isinstance(texts, str | bytes | bytearray):
        raise TypeError(
            f"encode takes a list of texts, not one {type(texts).__name__} (whose letters it would "
            "take for texts). Pass [text], and take [0] of what comes back."
        )
    return list(texts)


def load_tokenizer(path: str | Path, eod: str | None = None, threads: int = 1) -> Tokenizer:
    """A `.model` or a `tokenizer.json` (or a folder that holds one of either).

    `eod` names the token that follows every document, where the file's own end-of-text is not it.
    `threads` is for sentencepiece; the other library has TOKENIZERS_PARALLELISM.
    """
    file = Path(path)
    if file.is_dir():
        found = [file / "tokenizer.json", *sorted(file.glob("*.model"))]
        file = next((entry for entry in found if entry.exists()), found[0])
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file, eod)
    return SentencePieceTokenizer(file, eod, threads)


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    special_tokens: Sequence[str] = (),
    digits_apart: bool = True,
    space_runs: bool = True,
) -> bytes:
    """The model file trained on `texts`: lossless on any text, the same bytes for the same texts.

    Identity normalisation, spaces kept, runs of spaces and newlines may be pieces (space_runs),
    digits apart (digits_apart), bytes for characters it does not know. Id 0 is <unk> (never
    produced), 1 is </s> (eod).
    Raises DataError when the texts cannot fill the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=space_runs,
            split_digits=digits_apart,
            user_defined_symbols=list(special_tokens),
            max_sentence_length=8 * SENTENCE_BYTES,
            num_threads=TRAINER_THREADS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise DataError(
            f"vocab_size={vocab_size} cannot be trained on these texts ({reason}). "
            "Use a smaller vocabulary or more text."
        ) from None
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterable[str]:
    """Texts in pieces of at most SENTENCE_BYTES characters, cut after a newline where one is."""
    for text in texts:
        start = 0
        while start < len(text):
            stop = start + SENTENCE_BYTES
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            yield text[start:stop]
            start = stop


def _read(path: Path) -> bytes:
    try:
        return read_plain_file(path)
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be read ({error.strerror}). Correct the path, or train one "
            "with `megahybrid data tokenizer`."
        ).because(error) from None


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
