"""Our model as lm-evaluation-harness sees one (`lm_eval.api.model.TemplateLM`). Optional package.

The only import of lm_eval. Sequences are cut as the harness's own Hugging Face wrapper cuts them:
the last `max_length` tokens are seen.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import ConfigError
from megahybrid.evaluate.answers import score_answers
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.generation import greedy
from megahybrid.model.transformer import Transformer

GENERATED = 256  # tokens, where a task names no number, as in the harness


class HybridLM(TemplateLM):
    """Log-likelihoods in batches, rolling ones, and greedy generation with a cache of keys.

    On a tensor axis every rank calls everything alike and gets the same. Batches hold at most
    `batch_tokens` tokens.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        eod_id: int,
        max_length: int,
        batch_tokens: int = 16_384,
    ) -> None:
        super().__init__()
        self.model, self._tokenizer, self._eod_id = model, tokenizer, eod_id
        self.max_length, self.batch_tokens = max_length, batch_tokens

    @property
    def eot_token_id(self) -> int:
        """The id that follows every document; an empty context is replaced by it too."""
        return self._eod_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self._tokenizer.info.sha256[:16]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of the text alone: our tokenizers add nothing."""
        return self._tokenizer.encode([string])[0]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding writes it) of each continuation."""
        examples = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"--length={self.max_length} cannot hold a continuation of "
                    f"{len(continuation)} tokens. Raise it."
                )
            tokens = tuple((context + continuation)[-(self.max_length + 1) :])
            start = len(tokens) - len(continuation)
            examples.append(Example(tokens, start, start))
        scores = score_answers(self.model, examples, batch_tokens=self.batch_tokens)
        return [(score.log_likelihood, score.exact) for score in scores]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows that overlap by nothing but one token."""
        pieces: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *make_disjoint_window(window)) for window in windows]
            pieces += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(pieces))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each context, up to the first of its `until` strings.

        Raises ConfigError for a task that asks to sample: scores would depend on a seed.
        """
        asked = [self._asked(*request.args) for request in requests]
        texts: dict[int, str] = {}
        order = sorted(range(len(asked)), key=lambda n: (asked[n][1:], len(asked[n][0])))
        while order:
            first = asked[order[0]]
            batch = [order.pop(0)]
            while order and asked[order[0]][1:] == first[1:]:
                widest = len(asked[order[0]][0]) + first[1]
                if (len(batch) + 1) * widest > self.batch_tokens:
                    break
                batch.append(order.pop(0))
            added = greedy(
                self.model,
                [asked[n][0] for n in batch],
                first[1],
                vocab_size=self._tokenizer.info.vocab_size,
                ends=partial(self._ends, until=first[2]),
            )
            for n, tokens in zip(batch, added, strict=True):
                texts[n] = self._cut(tokens, first[2])
        return [texts[n] for n in range(len(asked))]

    def _asked(
        self, context: str, settings: dict[str, Any]
    ) -> tuple[list[int], int, tuple[str, ...]]:
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise ConfigError(
                f"generation_kwargs.do_sample=true (temperature "
                f"{settings.get('temperature', 1.0)}) is not offered. Use greedy decoding."
            )
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        tokens = int(settings.get("max_gen_toks", GENERATED))
        if tokens >= self.max_length:
            raise ConfigError(
                f"--length={self.max_length} leaves no room for max_gen_toks={tokens}. Raise it."
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return ids[-(self.max_length - tokens) :], tokens, tuple(until)

    def _ends(self, tokens: list[int], until: tuple[str, ...]) -> bool:
        if tokens[-1] == self._eod_id:
            return True
        text = self._tokenizer.decode(tokens)
        return any(stop and stop in text for stop in until)

    def _cut(self, tokens: list[int], until: tuple[str, ...]) -> str:
        text = self._tokenizer.decode([token for token in tokens if token != self._eod_id])
        for stop in until:
            if stop:
                text = text.split(stop)[0]
        return text
