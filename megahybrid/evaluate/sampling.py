"""Sampling with a cache of keys and values, as long as the model sees the whole text.

Where the text outgrows what the model is to see, its beginning is dropped with every token and the
rest is computed anew: kept values would still know what was dropped.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from megahybrid.errors import MegahybridError
from megahybrid.evaluate.generation import Decoder
from megahybrid.evaluate.hidden_rows import HiddenRows
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.random import key


@torch.no_grad()
def next_token_logits(
    model: Transformer, tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch vocab"]:
    """Return logits of the token that follows each row, without vocabulary padding.

    All ranks of tensor and context axes call it alike.
    """
    last = HiddenRows(model, tokens).at(torch.tensor([tokens.shape[1] - 1], device=tokens.device))
    return model.head.logits(last, model.config.logit_scale)[0]


def sample_tokens(
    model: Transformer,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float,
    seed: int,
    context_tokens: int,
    vocab_size: int,
    eod_id: int,
    ends: Collection[int] = (),
    cropped: Callable[[], None] = lambda: None,
) -> list[int]:
    """Up to `tokens` ids that follow `prompt`, without it; the document's end, or one of the ids in
    `ends`, ends them.

    temperature 0 takes the likeliest id (of equals the lowest). Otherwise token n is drawn by a
    number keyed by (seed, n), so that a longer sample begins like a shorter one. Only ids below
    `vocab_size`, the tokenizer's, are taken. The model sees the last `context_tokens` tokens;
    `cropped` is called once, when that first leaves some out. Raises MegahybridError where the
    model's logits are not finite.
    """
    known = list(prompt)
    warned = False
    decoder: Decoder | None = None
    for number in range(tokens):
        if len(known) > context_tokens:
            if not warned:
                cropped()
            warned, decoder = True, None
            context = torch.tensor([known[-context_tokens:]], device=model.embedding.weight.device)
            all_logits = next_token_logits(model, context)
        elif decoder is None:
            decoder = Decoder(model, [known], min(tokens, context_tokens - len(known)))
            all_logits = decoder.prefill()
        else:
            all_logits = decoder.step(torch.tensor(known[-1:]))
        logits = all_logits[0, :vocab_size].double().cpu().numpy()
        if not np.isfinite(logits).all():
            raise MegahybridError(
                f"the model's logits are not finite after {len(known)} tokens: its weights are "
                "broken. Use an earlier checkpoint."
            )
        chosen = _choose(logits, temperature, seed, number)
        if chosen == eod_id or chosen in ends:
            break
        known.append(chosen)
    return known[len(prompt) :]


def _choose(logits: np.ndarray, temperature: float, seed: int, number: int) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # Relative to the largest first: a small temperature must not overflow.
    heights = np.cumsum(np.exp((logits - logits.max()) / temperature))
    stream = np.random.Philox(key=key(seed, "sample", number))
    drawn = np.random.Generator(stream).random() * heights[-1]
    return int(np.searchsorted(heights[:-1], drawn, side="right"))
