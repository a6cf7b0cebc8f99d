"""The subject of the self-test: a block as it trains, without the projections around attention."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid.config.attention import AttentionScheme
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.model.attention import BranchInputs, Heads
from megahybrid.model.block import Block
from megahybrid.model.compiled import prepare_compiler
from megahybrid.model.context import SequenceContext
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.layer_parts import LayerParts
from megahybrid.model.row_shards import RowShards
from megahybrid.model.selftest.whole_rows import own_tokens, whole_rows
from megahybrid.parallel.mesh import ParallelMesh

# Relative, of one number: half a unit in its last place and that again for what it is made of.
ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
EPS = 1e-5  # of QK-norm; what it is called with in the run moves nothing here


class Violation(Exception):
    """A scheme did what it must not; the message follows its name. `token` is where it was seen, if
    at one token of a row."""

    def __init__(self, message: str, token: int | None = None) -> None:
        super().__init__(message)
        self.token = token


@dataclass(frozen=True)
class HeadShape:
    """One rank's heads, and what they are computed in and on."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def features(self) -> int:
        """Queries, keys and values of a token side by side."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def smaller(self) -> "HeadShape | None":
        """Return the shape with half the KV heads, or with half the queries of the last one."""
        group = self.heads // self.kv_heads
        if self.kv_heads > 1:
            kv_heads = self.kv_heads // 2
            return replace(self, heads=group * kv_heads, kv_heads=kv_heads)
        return replace(self, heads=self.heads // 2) if self.heads > 1 else None


@dataclass(frozen=True)
class Rows:
    """Rows of one length by the lengths of their documents."""

    documents: tuple[tuple[int, ...], ...]
    edges: tuple[int, ...] = ()  # tokens before which the rows are cut over context ranks

    @classmethod
    def of(cls, *rows: Sequence[int]) -> "Rows":
        """Rows that are cut so."""
        return cls(tuple(tuple(row) for row in rows))

    def joined(self) -> "Rows":
        """Return rows of the same length, each a single document."""
        return Rows(tuple((sum(row),) for row in self.documents), self.edges)

    def first(self, count: int) -> "Rows":
        """Return the first `count` of these rows, or all."""
        return Rows(self.documents[:count], self.edges)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return sum(self.documents[0])

    @property
    def several(self) -> bool:
        """True where some row holds several documents."""
        return any(len(row) > 1 for row in self.documents)

    @cached_property
    def starts(self) -> Tensor:
        """[row, token]: where the token's document begins."""
        starts: list[list[int]] = []
        for row in self.documents:
            starts.append([])
            for length in row:
                starts[-1] += [len(starts[-1])] * length
        return torch.tensor(starts)

    def borders(self, row: int) -> list[int]:
        """Return where the documents of a row begin, but for the first."""
        return sorted({int(start) for start in self.starts[row]} - {0})


class Contexts:
    """The values that all layers of a batch share, made once for each kind of rows: schemes that
    are asked one after the other share it as layers do, so that one which is given what another
    made is seen. With `shards` rows of every length lie on context ranks as these do."""

    def __init__(self, shape: HeadShape, shards: RowShards | None = None) -> None:
        self._shape, self._shards = shape, shards
        self._made: dict[Rows, SequenceContext] = {}

    def of(self, rows: Rows) -> SequenceContext:
        """The context of these rows; without documents where each row is one, as in training."""
        if rows not in self._made:
            device = self._shape.device
            documents = Documents(rows.starts).to(device) if rows.several else None
            shards = self._shards and replace(self._shards, length=rows.length)
            self._made[rows] = SequenceContext(
                rows.length, documents, device, self._shape.dtype, shards=shards
            )
        return self._made[rows]


class HeadsOnly(Block):
    """A block whose stream is [seq, batch, q, k and v side by side] and which leaves behind what
    attention mixed: norm, rotation, scale and kernel are reached by the code of every block."""

    def __init__(self, shape: HeadShape, scheme: AttentionScheme, kernel: str) -> None:
        config = ModelConfig(
            vocab_size=1,
            hidden_size=1,
            intermediate_size=1,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            eps=EPS,
            layer_plan=LayerPlan(num_layers=1, pattern=["only"], schemes={"only": scheme}),
        )
        super().__init__(0, config, scheme, ParallelMesh.single(shape.device), kernel, "none")
        self.sizes = [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        self.gates = scheme.token_gates(shape.heads, shape.kv_heads, shape.head_dim)
        self.names = (*Heads._fields, *self.gates)
        self.sizes += [gate.values for gate in self.gates.values()]
        self.to(shape.dtype)

    def add_parts(self, parts: LayerParts) -> None:
        """Attention alone."""
        self.attention = parts.attention()

    def enter(self, hidden: Tensor) -> tuple[Heads, BranchInputs]:
        """Slices of wide rows, as one product leaves them."""
        return self.entered(self.names, hidden.split(self.sizes, dim=-1))

    def leave(self, hidden: Tensor, attention_output: Tensor, inputs: BranchInputs) -> Tensor:
        """The gated attention output, and zeros: a stream is as wide behind a layer as before."""
        out = self.attention.gated(attention_output, inputs)
        return F.pad(out.flatten(-2), (0, sum(self.sizes[1:])))

    def attention_output(self, hidden: Tensor, context: SequenceContext) -> Tensor:
        """[seq, batch, heads, head_dim]: what the heads make of a stream, both of whole rows. Where
        context ranks share these, all of them call this alike, and so its backward."""
        out: Tensor
        if context.shards is None:
            out = self(hidden, context)
        else:
            mine = own_tokens(hidden, context.shards)
            out = whole_rows(self(mine, context), context.shards)
        return out[..., : self.sizes[0]].unflatten(-1, (-1, self.attention.head_dim))

    def compile_as(self, compiler: str, whole: bool) -> None:
        """Compile the block as `Transformer.compile_blocks` does: its pieces, or all of it."""
        prepare_compiler()
        self.compile_pieces(compiler)
        if whole:
            self.compile_regions(compiler)

    def learned(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters of attention beside its projections."""
        named = self.attention.named_parameters()
        return {name: each for name, each in named if not name.startswith("output.")}
