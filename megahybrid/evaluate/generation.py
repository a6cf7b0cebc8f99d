"""Text that goes on from prompts, with a cache of keys and values that knows the layer plan."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megahybrid.errors import ConfigError
from megahybrid.evaluate.cache import Cache
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import gather_sequence


class Decoder:
    """A batch of prompts and what follows them, token by token.

    The prompts may differ in length. At most `tokens` tokens can follow. Memory of keys and values
    is exactly `config.counting.kv_cache_bytes` of the longest prompt + `tokens`, per row, shared
    out over a tensor axis, whose ranks all call alike and all get the same.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        if not prompts or not all(prompts):
            raise ConfigError(
                f"prompts={[len(p) for p in prompts]} tokens long: a model continues text and "
                "does not begin it. Give each prompt at least one token."
            )
        self.model = model
        device = model.embedding.weight.device
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        columns = torch.arange(longest + tokens, device=device)
        self.starts = torch.where(columns >= padding[:, None], padding[:, None], 0)
        self.prompts = torch.tensor(
            [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device
        )
        self.cache = Cache(model, self.starts)
        self.columns = 0

    @torch.no_grad()
    def prefill(self, chunk_tokens: int = 512) -> Float[Tensor, "batch vocab"]:
        """Reads the prompts, `chunk_tokens` columns at a time; logits of each one's next token."""
        for first in range(0, self.prompts.shape[1], chunk_tokens):
            hidden = self._pass(self.prompts[:, first : first + chunk_tokens])
        return self._logits(hidden)

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, "batch"]) -> Float[Tensor, "batch vocab"]:
        """Adds one token to each row; logits of the token after it."""
        if self.columns == self.starts.shape[1]:
            raise ConfigError(
                f"tokens={self.starts.shape[1] - self.prompts.shape[1]} have been added and the "
                "cache is full. Ask for more tokens at the start."
            )
        return self._logits(self._pass(tokens[:, None].to(self.starts.device)))

    def _pass(self, tokens: Tensor) -> Tensor:
        """The last layer's output of new columns, [seq, batch, hidden], whole on every rank."""
        tensor, count = self.model.mesh.tensor, tokens.shape[1]
        hidden = self.model.embedding(F.pad(tokens, (0, -count % tensor.size)))
        layers = iter(range(len(self.model.blocks)))
        context = self.cache.context(layers, self.columns, count, hidden)
        for block in self.model.blocks:
            hidden = block(hidden, context)
        self.columns += count
        return gather_sequence(hidden, tensor)[:count]

    def _logits(self, hidden: Tensor) -> Tensor:
        last = self.model.final_norm(hidden[-1:])
        # The head joins what the ranks hold along the sequence: here the same row from each.
        return self.model.head.logits(last, self.model.config.logit_scale)[0]


def greedy(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    vocab_size: int | None = None,
    ends: Callable[[list[int]], bool] = lambda added: False,
    chunk_tokens: int = 512,
) -> list[list[int]]:
    """The likeliest token after each prompt, `tokens` times (of equals the lowest id).

    Only ids below `vocab_size` are taken. A row stops once `ends` says so of what was added to it;
    its last token is kept.
    """
    added: list[list[int]] = [[] for _ in prompts]
    if not tokens:
        return added
    done = [False] * len(prompts)
    decoder = Decoder(model, prompts, tokens - 1)
    logits = decoder.prefill(chunk_tokens)
    for number in range(tokens):
        chosen = logits[:, :vocab_size].argmax(dim=1)
        for row, token in enumerate(chosen.tolist()):
            if not done[row]:
                added[row].append(token)
                done[row] = ends(added[row])
        if all(done) or number == tokens - 1:
            break
        logits = decoder.step(chosen)
    return added
