"""Validation on held-out sets: during training, at the end of its stages, and of a checkpoint."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid.config import RunConfig
from megahybrid.data.batches import Tensors
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.held_out import Rows, evaluation_plans, evaluation_tokens, numbered_batches
from megahybrid.data.run_tokenizer import bytes_of_ids
from megahybrid.evaluate.context_gain import ContextGain, Windows, context_gains, default_stride
from megahybrid.evaluate.loss import HeldOutLoss, TokenLoss, held_out_loss, sliding
from megahybrid.evaluate.loss_by_document import loss_by_document
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import on_first
from megahybrid.parallel.mesh import ParallelMesh

# Told the set, its score and what the rows were.
ScoreSink = Callable[[str, HeldOutLoss, Rows], None]
GainSink = Callable[[str, ContextGain], None]


class HeldOutSets:
    """Sets open for scoring: those that data.held_out names, or `sets`. Collective over the mesh.

    `longest` is how far loss by position reaches (default: four times the run's longest length);
    `max_tokens` of each set are used (default: evaluate.max_tokens). `poll` is called before each
    batch, on every rank; what it raises ends the scoring. `advance` is told after each batch how
    many tokens of rows all ranks have read meanwhile; `work` says beforehand how many it will be.
    `context` is the model's: ranks that share a row are all given it, and it counts once.
    """

    def __init__(
        self,
        run: RunConfig,
        mesh: ParallelMesh,
        *,
        sets: dict[str, TokenDataset] | None = None,
        longest: int | None = None,
        max_tokens: int | None = None,
        poll: Callable[[], object] = bool,
        advance: Callable[[int], object] = bool,
        context: ContextRanks | None = None,
    ) -> None:
        self.run, self.context = run, context
        self.poll, self.advance = poll, advance
        self.mesh = mesh
        self.sets = open_held_out(run) if sets is None else sets
        lengths = [length for stage in run.stages for length in stage.lengths]
        self.longest = longest or run.far_length
        self.max_tokens = max_tokens or run.evaluate.max_tokens
        # A document that ends before the shortest length says nothing about far positions; of
        # conversations, which are short, each is asked for its turns.
        self.min_tokens = min(self.longest, *lengths)

    def work(self, length: int, rows: Rows, window: int | None = None) -> int:
        """Return the tokens that scoring every set in rows of `length` reads: as they are, or
        through a window that slides over them."""
        tokens = sum(
            evaluation_tokens(
                dataset,
                length,
                rows,
                1 if rows == "stream" or dataset.masked else self.min_tokens,
                self.max_tokens,
                self.mesh.tensor.size,
            )
            for dataset in self.sets.values()
        )
        return round(tokens * _times_read(length, window))

    def score(self, token_loss: TokenLoss, length: int, tell: ScoreSink) -> None:
        """The file of each set, cut every `length` tokens."""
        for name in self.sets:
            tell(name, self._score(token_loss, name, length, length), "stream")

    def score_far(self, token_loss: TokenLoss, tell: ScoreSink) -> None:
        """Loss by position within single documents, to `longest` tokens."""
        for name, dataset in self.sets.items():
            fewest = 1 if dataset.masked else self.min_tokens
            score = loss_by_document(
                self._polled(token_loss),
                self._documents(name, self._ranks_of, fewest),
                self._sizes(name, fewest),
                self.longest,
                self.mesh.replica,
                self.mesh.device,
                lambda tokens: self.mesh.replica.rank % self._ranks_of(tokens) == 0,
                self._token_bytes,
                turns=dataset.masked,
            )
            tell(name, score, "documents")

    def score_sliding(
        self, token_loss: TokenLoss, window: int, length: int, tell: ScoreSink
    ) -> None:
        """The rows of `score` at `length`, by a model that sees the last `window` tokens, moved on
        by half of that."""
        by_window = sliding(token_loss, window, max(1, window // 2))
        for name in self.sets:
            tell(name, self._score(by_window, name, length, min(window, length)), "stream")

    def score_gain(
        self,
        token_loss: TokenLoss,
        contexts: Sequence[int],
        tell: GainSink,
        stride: int | None = None,
    ) -> None:
        """Context gain beyond each of `contexts`, by position within single documents, to
        `longest` tokens. `stride`: default_stride of each."""
        windows = [self._windows(one, stride or default_stride(one)) for one in contexts]
        fewest = min(contexts) + 2  # a document's last token has no target

        def sharing(tokens: int) -> int:
            return self._meeting(tokens, windows)

        for name in self.sets:
            for gain in context_gains(
                self._polled(token_loss),
                self._documents(name, sharing, fewest),
                windows,
                len(self._sizes(name, fewest)),
                self.longest,
                self.mesh.replica,
                self.mesh.device,
                lambda tokens: self.mesh.replica.rank % sharing(tokens) == 0,
                self._token_bytes,
            ):
                tell(name, gain)

    @cached_property
    def _token_bytes(self) -> Tensor | None:
        """Bytes of text of each id, where the run's tokenizer is here. Collective."""
        if self.run.data.tokenizer is None:
            return None
        sizes = on_first(self.mesh.world, lambda: bytes_of_ids(self.run))
        return None if sizes is None else torch.from_numpy(sizes).to(self.mesh.device)

    def _sizes(self, name: str, fewest: int) -> list[int]:
        """The tokens of each document that is scored, in the order of `_documents`' numbers."""
        plans = evaluation_plans(
            self.sets[name], self.longest, "documents", fewest, self.max_tokens
        )
        return [plan.spans[0][1] for plan in plans]

    def _polled(self, token_loss: TokenLoss) -> TokenLoss:
        def polled(*rows: Tensor) -> Tensor:
            self.poll()
            return token_loss(*rows)

        return polled

    def _windows(self, context: int, stride: int) -> Windows:
        """Return the windows of a context; as many are computed together as tokens of training."""
        tokens = context + stride
        together = self._micro_batch * self._ranks_of(tokens) // self.mesh.context.size
        return Windows(context, stride, max(1, together // tokens))

    def _meeting(self, tokens: int, windows: Sequence[Windows]) -> int:
        """Return how many ranks need the same rows of `tokens`: those that share one, and those
        that share a window of one, which several groups of ranks then compute alike."""
        shown = (min(each.tokens, tokens) for each in windows)
        return math.lcm(self._ranks_of(tokens), *map(self._ranks_of, shown))

    def _documents(
        self, name: str, sharing: Callable[[int], int], fewest: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield rows of one document each, and the number of each one's document."""
        for numbers, batch in self._batches(name, self.longest, "documents", sharing, fewest):
            yield torch.tensor(numbers), *batch

    def _score(self, token_loss: TokenLoss, name: str, length: int, shown: int) -> HeldOutLoss:
        """The score of a set's file in rows of `length`, of which the model is shown `shown` tokens
        at a time."""
        together = self._ranks_of(shown)

        def rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for _, batch in self._batches(
                name, length, "stream", lambda tokens: together, 1, shown
            ):
                self.poll()
                yield batch

        return held_out_loss(
            token_loss,
            rows(),
            length,
            self.longest,
            self.mesh.replica,
            self.mesh.device,
            lambda tokens: self.mesh.replica.rank % together == 0,
            token_bytes=self._token_bytes,
        )

    def _ranks_of(self, tokens: int) -> int:
        """Return how many ranks share a row of `tokens`, filled up."""
        if self.context is None:
            return 1
        return self.context.parallel.context_degree(self.context.filled(tokens))

    @property
    def _micro_batch(self) -> int:
        return max(stage.micro_batch_tokens for stage in self.run.stages)

    def _batches(
        self,
        name: str,
        length: int,
        rows: Rows,
        sharing: Callable[[int], int],
        fewest: int,
        shown: int | None = None,
    ) -> Iterator[tuple[list[int], Tensors]]:
        for numbers, batch in numbered_batches(
            self.sets[name],
            length,
            max(1, self._micro_batch // length),
            rows=rows,
            min_tokens=fewest,
            max_tokens=self.max_tokens,
            rank=self.mesh.replica.rank,
            world_size=self.mesh.replica.size,
            documents=self.run.data.documents,
            multiple=self.mesh.tensor.size,
            sharing=sharing,
            most_sharing=self.mesh.context.size,
        ):
            moved = batch.tensors(self.mesh.device)
            yield numbers, moved
            tokens = moved.tokens.shape[1]
            groups = self.mesh.replica.size // sharing(tokens)
            self.advance(round(moved.tokens.numel() * groups * _times_read(tokens, shown)))


def _times_read(length: int, window: int | None) -> float:
    """Return how often each token of a row is read, in the mean, where a window slides over it."""
    if window is None or window >= length:
        return 1.0
    return window * (1 + -(-(length - window) // max(1, window // 2))) / length


def open_held_out(run: RunConfig) -> dict[str, TokenDataset]:
    """The run's held-out sets by name. Raises DataError for one that is missing or damaged."""
    return {
        name: TokenDataset(source.path, vocab_size=run.model.vocab_size)
        for name, source in run.data.held_out.items()
    }


def evaluation_loss(model: Transformer) -> TokenLoss:
    """Each token's loss under `model`, without gradients.

    Rows that are one document go without boundaries, because kernels are faster so. Rows that
    tensor and context ranks do not divide are filled up: what comes later is seen by no counted
    token.
    """

    def token_loss(tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        model.eval()
        length = tokens.shape[1]
        if fill := model.filled(length) - length:
            tokens, targets = F.pad(tokens, (0, fill)), F.pad(targets, (0, fill), value=-100)
            starts = torch.cat((starts, starts[:, -1:].expand(-1, fill)), dim=1)
        with torch.no_grad():
            boundaries = starts if bool(starts.any()) else None
            return model(tokens, targets, boundaries)[1][:, :length]

    return token_loss
