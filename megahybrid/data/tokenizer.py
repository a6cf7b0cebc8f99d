"""Tokenizers: the only door to sentencepiece and Hugging Face's tokenizers."""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from megahybrid.data.manifest import TokenizerInfo
from megahybrid.data.token_file import Array
from megahybrid.data.word_cache import (
    SEPARATORS,
    SPACE_SIGN,
    SplitPatterns,
    WordCache,
    hugging_face_splits,
    sentencepiece_kinds,
    sentencepiece_splits,
)
from megahybrid.errors import DataError
from megahybrid.plain_file import read_plain_file

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|END_OF_TURN_TOKEN|>", "<eos>", "</s>", "<eod>")
SENTENCE_BYTES = 16_384  # sentencepiece drops what is longer than its limit, silently
TRAINER_THREADS = 4  # written into the model file, so a constant: its hash must not depend on cores


CONTROL_PIECE, USER_PIECE = 3, 4  # kinds of sentencepiece's pieces


class Marked(NamedTuple):
    """Ids of a text in which special tokens were read, and where in the text each one stands.

    special: whether it is one of the special tokens.
    """

    ids: Array
    begins: Array
    ends: Array
    special: Array


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. `encode` adds no special token and reads none in the text; it takes
    several texts, and raises TypeError for one that is not in a list.

    """

    info: TokenizerInfo

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of tokens that are found in a text before all others, by what spells them."""
        ...

    @property
    def control_tokens(self) -> frozenset[str]:
        """Those of `special_tokens` that stand for no text of their own."""
        ...

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        """Ids of texts that a program wrote: what spells a special token is that token."""
        ...

    def names(self) -> list[str]:
        """The token of each id as the file writes it; "" for an id that it has not."""
        ...

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
        kinds = sentencepiece_kinds(raw)
        self.special_tokens = {
            name: token
            for token, (name, kind) in enumerate(zip(names, kinds, strict=True))
            if kind in (CONTROL_PIECE, USER_PIECE)
        }
        self.control_tokens = frozenset(
            name for name, token in self.special_tokens.items() if kinds[token] == CONTROL_PIECE
        )
        self._use_word_cache(sentencepiece_splits(raw, names), re.compile(SPACE_SIGN))

    def names(self) -> list[str]:
        """The piece of each id."""
        return [self._processor.id_to_piece(token) for token in range(self.info.vocab_size)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return self._processor.encode(several(texts), num_threads=self._threads)

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        """Ids of texts that a program wrote: what spells a special token is that token."""
        # Longest first: one may begin as another does.
        names = sorted(self.special_tokens, key=len, reverse=True)
        cut = re.compile(f"({'|'.join(map(re.escape, names))})") if names else re.compile("(?!)()")
        return [self._marked(cut.split(text)) for text in several(texts)]

    def _marked(self, parts: Sequence[str]) -> Marked:
        """The ids of parts of a text, of which every other one is a special token."""
        encoded = self._processor.encode(list(parts[::2]), return_type="offset_mapping")
        ids, places, special = [], [], []
        place = 0
        for number, part in enumerate(parts):
            if number % 2:
                ids.append([self.special_tokens[part]])
                places.append(np.asarray([[place, place + len(part)]]))
            else:
                found = encoded[number // 2]
                ids.append(found["ids"])
                places.append(np.asarray(found["offsets"], np.int64).reshape(-1, 2) + place)
            special.append(np.full(len(ids[-1]), bool(number % 2)))
            place += len(part)
        begins, ends = np.concatenate(places).T
        whole = np.fromiter(chain.from_iterable(ids), np.int64)
        return Marked(whole, begins, ends, np.concatenate(special))

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
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items()}
        self.control_tokens = frozenset(one.content for one in added.values() if one.special)
        self.info = TokenizerInfo(
            kind="huggingface", sha256=_sha256(raw), vocab_size=size, eod_id=eod_id
        )
        self._use_word_cache(hugging_face_splits(backend.to_str()), SEPARATORS)

    def names(self) -> list[str]:
        """The token of each id as the file writes it; "" for an id that it has not."""
        return [self._backend.id_to_token(token) or "" for token in range(self.info.vocab_size)]

    def decoders(self) -> set[str]:
        """The kinds of the steps by which tokens become text, as the file names them."""
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        steps = decoder.get("decoders", [decoder])
        return {str(step.get("type")) for step in steps}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        encoded = self._backend.encode_batch_fast(several(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

    @cached_property
    def _reading(self) -> Any:
        """The same tokenizer, which reads special tokens in texts and says where tokens stand."""
        value = json.loads(self._backend.to_str())
        # It would move where tokens begin behind the space before a word.
        backend = type(self._backend).from_str(json.dumps(value | {"post_processor": None}))
        backend.encode_special_tokens = False
        return backend

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        """Ids of texts that a program wrote: what spells a special token is that token."""
        special = np.fromiter(self.special_tokens.values(), np.int64)
        marked = []
        for item in self._reading.encode_batch(several(texts), add_special_tokens=False):
            ids = np.asarray(item.ids, np.int64)
            begins, ends = np.asarray(item.offsets, np.int64).reshape(-1, 2).T
            marked.append(Marked(ids, begins, ends, np.isin(ids, special)))
        return marked

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
    control_tokens: Sequence[str] = (),
    digits_apart: bool = True,
    space_runs: bool = True,
) -> bytes:
    """The model file trained on `texts`: lossless on any text, the same bytes for the same texts.

    Identity normalisation, spaces kept, runs of spaces and newlines may be pieces (space_runs),
    digits apart (digits_apart), bytes for characters it does not know. Id 0 is <unk> (never
    produced), 1 is </s> (eod). `special_tokens` are one token wherever a text spells them;
    `control_tokens` only where a program, a chat template, writes them.
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
            control_symbols=list(control_tokens),
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
