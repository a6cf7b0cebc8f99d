"""The decoder: a list of blocks, each given its scheme. The sequence of schemes is the model."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.config.stages import Recompute
from megahybrid.model.attention import Attention
from megahybrid.model.block import Block, block_class
from megahybrid.model.compiled import prepare_compiler, traced_whole, whole_serves
from megahybrid.model.context import SequenceContext, Watch
from megahybrid.model.kernels.documents import Documents
from megahybrid.model.norm import make_norm
from megahybrid.model.recompute import run_block
from megahybrid.model.row_shards import ContextRanks, RowShards
from megahybrid.parallel.mesh import ParallelMesh
from megahybrid.parallel.sharding import ShardSpec, shard_spec
from megahybrid.parallel.vocab import VocabParallelEmbedding, VocabParallelHead


class Transformer(nn.Module):
    """Tokens and document boundaries in, loss out; logits of a whole batch are never held.

    Each rank of the tensor axis holds its share of every matrix and of the sequence between
    blocks. `plan` is config.layer_plan or a stage's changed copy of it; `kernels` and `recompute`
    have one entry per layer; `norm` names the implementation of RMSNorm. With `compiler`, torch's
    name of one (inductor), training goes through blocks compiled by it, for which `keeps_weights`
    says whether a rank has its weights at all times: under ZeRO-3 it has not. With `context`, ranks
    that share rows are given the whole of these, and hold a part between embedding and loss.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: ParallelMesh,
        *,
        plan: LayerPlan | None = None,
        kernels: Sequence[str] | None = None,
        recompute: Sequence[Recompute] | None = None,
        norm: str = "torch",
        compiler: str | None = None,
        keeps_weights: bool = True,
        context: ContextRanks | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.context = plan or config.layer_plan, context
        self._shards: dict[int, RowShards | None] = {}  # by length, under this plan
        self.config = config
        self.mesh = mesh
        schemes = self.plan.expand()
        kernels = tuple(kernels or ("auto",) * len(schemes))
        nothing: list[Recompute] = ["none"] * len(schemes)
        self.recompute = tuple(recompute or nothing)
        self.embedding = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            "embedding.weight",
            mesh,
            scale=config.embedding_scale,
        )
        block = block_class(config.block)
        self.blocks = nn.ModuleList(
            block(index, config, scheme, mesh, kernel, policy, norm)
            for index, (scheme, kernel, policy) in enumerate(
                zip(schemes, kernels, self.recompute, strict=True)
            )
        )
        self.final_norm = make_norm(config, "final_norm", mesh, norm)
        self.head = (
            VocabParallelHead.tied(self.embedding, mesh)
            if config.tie_embeddings
            else VocabParallelHead(config.vocab_size, config.hidden_size, "head.weight", mesh)
        )
        self.head.softcap = config.logit_softcap
        if compiler is not None:
            self.compile_blocks(compiler, keeps_weights)

    def compile_blocks(self, compiler: str, keeps_weights: bool = True) -> None:
        """Have every block, and the loss's softmax, compiled at first use, by kind and shape.

        Whole but for attention; only its pieces where it is cut over tensor ranks, as collectives
        cannot be traced, where weights come and go inside of a layer (not `keeps_weights`), or
        where products go to a routine that the compiler does not call.
        Layers of a kind share their programs.
        """
        prepare_compiler()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile_pieces(compiler)  # used too where an MLP runs in chunks
            if keeps_weights and self.mesh.tensor.size == 1 and whole_serves():
                block.compile_regions(compiler)
        self.head.fuse(partial(traced_whole, backend=compiler))

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        starts: Int[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch seq"]]:
        """Sum of the losses in nats over targets that are not -100, and each token's own loss. The
        sum is that of this rank's part of the rows, the losses are those of whole rows.

        `starts` holds the index within the row of the first token of each token's document; None
        means that every row is one document. On the host, where batches are made, it spares an
        accelerator the wait for its own boundaries. The per-token losses carry no gradient.
        """
        shards = self.shards(tokens.shape[1])
        hidden = self.hidden(tokens, starts)
        if shards is None:
            return self.head(hidden, targets, self.config.logit_scale)
        # Cut here, behind the shift by one that made them: what comes after a part is its target.
        loss, per_token = self.head(hidden, shards.cut(targets, 1), self.config.logit_scale)
        return loss, shards.gather(per_token, 1)

    def context_degree(self, length: int) -> int:
        """Return how many context ranks share a row of `length` tokens."""
        return 1 if self.context is None else self.context.parallel.context_degree(length)

    def filled(self, length: int) -> int:
        """Return the tokens to which a row of `length` is filled up where it is not trained on.
        What fills it up comes later, and no token of it sees that."""
        if self.context is None:
            return length + -length % self.mesh.tensor.size
        return self.context.filled(length)

    def shards(self, length: int) -> RowShards | None:
        """Return how rows of `length` tokens lie on context ranks; None where they are whole."""
        if self.context is None:
            return None
        if length not in self._shards:
            self._shards[length] = self.context.shards(self.plan, length)
        return self._shards[length]

    def hidden(
        self,
        tokens: Int[Tensor, "batch seq"],
        starts: Int[Tensor, "batch seq"] | None = None,
        watch: Watch | None = None,
    ) -> Float[Tensor, "seq_local batch hidden"]:
        """The final norm's output on this rank's part of the sequence. `watch` is told what each
        layer's attention is asked."""
        shards = self.shards(tokens.shape[1])
        hidden = self.embedding(tokens if shards is None else shards.cut(tokens, 1))
        context = SequenceContext(
            length=tokens.shape[1],
            documents=None if starts is None else Documents(starts).to(tokens.device),
            device=tokens.device,
            dtype=hidden.dtype,
            shards=shards,
            watch=watch,
        )
        for block, policy in zip(self.blocks, self.recompute, strict=True):
            hidden = run_block(block, hidden, context, policy)
        return self.final_norm(hidden)

    @torch.no_grad()
    def logits(
        self, tokens: Int[Tensor, "batch seq"], starts: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """All logits, gathered: for sampling and for tests on short inputs."""
        logits = self.head.logits(self.hidden(tokens, starts), self.config.logit_scale)
        shards = self.shards(tokens.shape[1])
        logits = logits if shards is None else shards.gather(logits, 0)
        return logits.transpose(0, 1)

    def adopt(self, plan: LayerPlan, kernels: Sequence[str]) -> None:
        """Have the layers see as `plan` says from the next forward on: other windows, thetas and
        scales for the same parameters. `kernels` has one entry per layer."""
        self.plan, self._shards = plan, {}
        for block, scheme, kernel in zip(self.blocks, plan.expand(), kernels, strict=True):
            attention = block.get_submodule("attention")
            assert isinstance(attention, Attention)
            attention.adopt(scheme, kernel)

    def sharded_parameters(self) -> dict[str, tuple[nn.Parameter, ShardSpec]]:
        """Every parameter once, by module name, with the one description of how it lies."""
        return {
            name: (parameter, shard_spec(parameter)) for name, parameter in self.named_parameters()
        }

    @torch.no_grad()
    def load_canonical(self, tensors: dict[str, Tensor]) -> None:
        """Set this rank's shards from whole canonical tensors (for small models and tests)."""
        for parameter, spec in self.sharded_parameters().values():
            parameter.copy_(spec.split(tensors).to(parameter.dtype))
