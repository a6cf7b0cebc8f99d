"""Run both models with one layer in memory at a time, where they do not fit as a whole.

They are the same classes, built without storage; a layer's weights are read when it is called and
forgotten when it returns. The embedding is read by the rows that are asked for, the head in bands.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megahybrid.checkpoint.fragments import whole
from megahybrid.checkpoint.parameter_io import fill
from megahybrid.checkpoint.reader import Reader
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.interop.architectures.tensor_names import is_norm
from megahybrid.interop.hf_weights import ForeignWeights
from megahybrid.interop.shards import BAND_BYTES, as_read
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
    """Return the rows of a matrix in pieces of BAND_BYTES."""
    band = max(1, BAND_BYTES // (4 * columns))
    return [(start, min(start + band, rows)) for start in range(0, rows, band)]


class StreamedOurs:
    """Our model out of a checkpoint, its weights rounded to `dtype`; looks like a Transformer to
    `compare`. `reader` stays open while it is used."""

    def __init__(
        self,
        model: ModelConfig,
        plan: LayerPlan,
        reader: Reader,
        dtype: torch.dtype,
        norm_offset: float = 0.0,
    ) -> None:
        self.config, self.reader, self.dtype = model, reader, dtype
        self.norm_offset = norm_offset
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
        hidden = hidden * self.config.embedding_scale
        context = SequenceContext(tokens.shape[1], None, tokens.device, hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, context)
        hidden = self.final_norm(hidden)  # [seq, batch, hidden]
        name = "embedding.weight" if self.config.tie_embeddings else "head.weight"
        parts = [
            hidden @ self._rows(name, start, stop).T
            for start, stop in bands(self.config.vocab_size, self.config.hidden_size)
        ]
        logits = torch.cat(parts, dim=-1).transpose(0, 1) * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _load(self, name: str, parameter: nn.Parameter) -> Tensor:
        spec = shard_spec(parameter)
        values = fill(self.reader, spec, "weight", 0, parameter.numel())
        self.reader.close()
        offset = self.norm_offset if is_norm(spec.segments[0].name) else 0.0
        return as_read(torch.from_numpy(values), self.dtype, offset).view(parameter.shape)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        box = ((start, stop), *whole((self.config.hidden_size,)))
        values = self.reader.read(name, "weight", box)
        self.reader.close()
        return torch.from_numpy(values).to(self.dtype).float()


def streamed_theirs(
    folder: Path,
    config: Any,
    weights: ForeignWeights,
    own: bool,
    file_name: Callable[[str], str] = str,
) -> Any:
    """Return the class of transformers that `folder` names, reading its weights as they are needed.
    `file_name` gives the name in files of a tensor of its layers.

    Only its three readers of weights are replaced, so that its own forward and `generate` run.
    """
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": own, **({} if own else {"attn_implementation": "eager"})}
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    _make_rotations(whole)

    def load(name: str, parameter: nn.Parameter) -> Tensor:
        return _rows_of(weights, file_name(name), 0, parameter.shape[0])

    for index, layer in enumerate(whole.model.layers):
        lend(layer, f"model.layers.{index}.", load)
    lend(whole.model.norm, "model.norm.", load)
    embedding = "model.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    # A class may multiply in its own kind of embedding (Gemma3TextScaledWordEmbedding).
    scale = getattr(whole.model.embed_tokens, "scalar_embed_scale", 1.0)
    whole.model.embed_tokens = _StreamedEmbedding(weights, embedding, scale)
    whole.lm_head = _StreamedHead(weights, head)
    return whole.eval()


def _rows_of(weights: ForeignWeights, name: str, start: int, stop: int) -> Tensor:
    # Closing lets go of the mapped pages, which would otherwise count as memory.
    values = torch.from_numpy(weights.rows(name, start, stop).copy())
    weights.close()
    return values


class _StreamedEmbedding(nn.Module):
    """An embedding that reads the rows it is asked for, times `scale`."""

    def __init__(self, weights: ForeignWeights, name: str, scale: float) -> None:
        super().__init__()
        self.weights, self.name, self.scale = weights, name, scale
        # `generate` asks the model's first parameter for the device of its inputs.
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq, hidden]"""
        ids, place = tokens.unique(return_inverse=True)
        rows = [_rows_of(self.weights, self.name, int(t), int(t) + 1) for t in ids]
        return torch.cat(rows)[place] * self.scale


class _StreamedHead(nn.Module):
    """A head without bias that reads its matrix in bands."""

    def __init__(self, weights: ForeignWeights, name: str) -> None:
        super().__init__()
        self.weights, self.name = weights, name
        self.rows, self.columns = weights.shape(name)
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, vocab]"""
        parts = [
            hidden @ _rows_of(self.weights, self.name, start, stop).T
            for start, stop in bands(self.rows, self.columns)
        ]
        return torch.cat(parts, dim=-1)


def _make_rotations(model: nn.Module) -> None:
    """Build the rotary tables again, with storage: they are computed and stand in no file."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(module, name, type(child)(child.config))
