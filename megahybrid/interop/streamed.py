"""Both models with one layer in memory at a time, for those that do not fit as a whole.

They are the same classes, built without storage; a layer's weights are read when it is called and
forgotten when it returns. The embedding is read by the rows that are asked for, the head in bands.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megahybrid.checkpoint.fragments import whole
from megahybrid.checkpoint.reader import Reader
from megahybrid.checkpoint.shards import fill
from megahybrid.config.attention import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.interop.foreign import ForeignWeights
from megahybrid.interop.shards import BAND_BYTES
from megahybrid.model.context import SequenceContext
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import shard_spec

Load = Callable[[str, nn.Parameter], Tensor]


def lend(module: nn.Module, prefix: str, load: Load) -> None:
    """Give `module` its weights whenever it is called, and take them back afterwards."""
    empty = {
        (owner, key): (f"{prefix}{path}.{key}" if path else f"{prefix}{key}", parameter)
        for path, owner in module.named_modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None
    }

    def take(*_: Any) -> None:
        for (owner, key), (name, parameter) in empty.items():
            owner._parameters[key] = nn.Parameter(load(name, parameter), requires_grad=False)

    def give_back(*_: Any) -> None:
        for (owner, key), (_name, parameter) in empty.items():
            owner._parameters[key] = parameter

    module.register_forward_pre_hook(take)
    module.register_forward_hook(give_back, always_call=True)


def bands(rows: int, columns: int) -> list[tuple[int, int]]:
    """The rows of a matrix in pieces of BAND_BYTES."""
    band = max(1, BAND_BYTES // (4 * columns))
    return [(start, min(start + band, rows)) for start in range(0, rows, band)]


class StreamedOurs:
    """Our model out of a checkpoint, its weights rounded to `dtype`; looks like a Transformer to
    `compare`. `reader` stays open while it is used."""

    def __init__(
        self, model: ModelConfig, plan: LayerPlan, reader: Reader, dtype: torch.dtype
    ) -> None:
        self.config, self.reader, self.dtype = model, reader, dtype
        empty = Transformer(model, ParallelMesh.single("meta"), plan=plan).eval()
        self.blocks, self.final_norm = empty.blocks, empty.final_norm
        for block in self.blocks:
            lend(block, "", self._load)
        lend(self.final_norm, "", self._load)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq, vocab]"""
        rows = [self._rows("embedding.weight", int(t), int(t) + 1) for t in tokens.T.flatten()]
        hidden = torch.cat(rows).unflatten(0, (tokens.shape[1], tokens.shape[0]))
        context = SequenceContext(tokens.shape[1], None, tokens.device, hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, context)
        hidden = self.final_norm(hidden)  # [seq, batch, hidden]
        name = "embedding.weight" if self.config.tie_embeddings else "head.weight"
        parts = [
            hidden @ self._rows(name, start, stop).T
            for start, stop in bands(self.config.vocab_size, self.config.hidden_size)
        ]
        return torch.cat(parts, dim=-1).transpose(0, 1) * self.config.logit_scale

    def _load(self, name: str, parameter: nn.Parameter) -> Tensor:
        spec = shard_spec(parameter)
        values = fill(self.reader, spec, "weight", 0, parameter.numel())
        self.reader.close()
        return torch.from_numpy(values).to(self.dtype).float().view(parameter.shape)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        box = ((start, stop), *whole((self.config.hidden_size,)))
        values = self.reader.read(name, "weight", box)
        self.reader.close()
        return torch.from_numpy(values).to(self.dtype).float()


class StreamedTheirs:
    """What a folder holds, run by transformers' own class; is called as the class is."""

    def __init__(self, folder: Path, config: Any, weights: ForeignWeights, own: bool) -> None:
        from transformers import AutoModelForCausalLM

        self.weights = weights
        options = {"trust_remote_code": own, **({} if own else {"attn_implementation": "eager"})}
        with torch.device("meta"):
            self.whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        self.whole.eval()
        self.model = self.whole.model
        self.config = config
        _make_rotations(self.whole)
        for index, layer in enumerate(self.model.layers):
            lend(layer, f"model.layers.{index}.", self._load)
        lend(self.model.norm, "model.norm.", self._load)

    def named_buffers(self) -> Any:
        """Of the whole model: the frequencies are real."""
        return self.whole.named_buffers()

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, use_cache: bool = False, past_key_values: Any = None
    ) -> Any:
        """The class's output for tokens [batch, seq], which may go on from a cache."""
        name = "model.embed_tokens.weight"
        rows = [self._rows(name, int(t), int(t) + 1) for t in input_ids.flatten()]
        embedded = torch.cat(rows).unflatten(0, tuple(input_ids.shape))
        found = self.model(
            inputs_embeds=embedded, use_cache=use_cache, past_key_values=past_key_values
        )
        # The class's own head and scale, on bands of the vocabulary, over the states it just made.
        self.whole.model = _Said(found)
        tied = self.config.tie_word_embeddings
        name = name if tied else "lm_head.weight"
        parts = []
        for start, stop in bands(self.config.vocab_size, self.config.hidden_size):
            band = nn.Parameter(self._rows(name, start, stop), requires_grad=False)
            self.whole.lm_head._parameters["weight"] = band
            out = self.whole(inputs_embeds=embedded, use_cache=False)
            parts.append(out.logits)
        self.whole.model = self.model
        out.logits = torch.cat(parts, dim=-1)
        return out

    def _load(self, name: str, parameter: nn.Parameter) -> Tensor:
        values = self.weights.rows(name, 0, parameter.shape[0])
        self.weights.close()
        return torch.from_numpy(values)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        values = torch.from_numpy(self.weights.rows(name, start, stop).copy())
        self.weights.close()
        return values


class _Said(nn.Module):
    """Says what a model said before, whatever it is asked."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *_: Any, **__: Any) -> Any:
        """The answer."""
        return self.answer


def _make_rotations(model: nn.Module) -> None:
    """Build the rotary tables again, with storage: they are computed and stand in no file."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(module, name, type(child)(child.config))
