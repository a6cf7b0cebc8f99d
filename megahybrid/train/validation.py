"""Validation on held-out sets: during training, at the end of its stages, and of a checkpoint."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid.config import RunConfig
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.held_out import Rows, evaluation_batches, evaluation_tokens
from megahybrid.evaluate.loss import HeldOutLoss, TokenLoss, held_out_loss, sliding
from megahybrid.model.row_shards import ContextRanks
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh

FAR = 4  # loss by position is measured up to this many times the longest trained length

# Told the set, its score and what the rows were.
ScoreSink = Callable[[str, HeldOutLoss, Rows], None]


class HeldOutSets:
    """Sets open for scoring: those that data.held_out names, or `sets`. Collective over the mesh.

    `longest` is how far loss by position reaches (default: FAR times the run's longest length);
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
        self.longest = longest or FAR * max(lengths)
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
            tell(name, self._score(token_loss, name, length, "stream", length), "stream")

    def score_far(self, token_loss: TokenLoss, tell: ScoreSink) -> None:
        """Loss by position within single documents, to `longest` tokens."""
        for name in self.sets:
            score = self._score(token_loss, name, self.longest, "documents")
            tell(name, score, "documents")

    def score_sliding(
        self, token_loss: TokenLoss, window: int, length: int, tell: ScoreSink
    ) -> None:
        """The rows of `score` at `length`, by a model that sees the last `window` tokens, moved on
        by half of that."""
        by_window = sliding(token_loss, window, max(1, window // 2))
        for name in self.sets:
            tell(
                name, self._score(by_window, name, length, "stream", min(window, length)), "stream"
            )

    def _score(
        self,
        token_loss: TokenLoss,
        name: str,
        length: int,
        rows: Rows,
        shown: int | None = None,
    ) -> HeldOutLoss:
        """The score of a set in rows of `length`, of which the model is shown `shown` tokens at a
        time (None: each row as it is)."""

        def sharing(tokens: int) -> int:
            return self._ranks_of(tokens if shown is None else shown)

        return held_out_loss(
            token_loss,
            self._rows(name, length, rows, sharing, shown),
            length,
            self.longest,
            self.mesh.replica,
            self.mesh.device,
            lambda tokens: self.mesh.replica.rank % sharing(tokens) == 0,
            turns=rows == "documents" and self.sets[name].masked,
        )

    def _ranks_of(self, tokens: int) -> int:
        """Return how many ranks share a row of `tokens`, filled up."""
        if self.context is None:
            return 1
        return self.context.parallel.context_degree(self.context.filled(tokens))

    def _rows(
        self,
        name: str,
        length: int,
        rows: Rows,
        sharing: Callable[[int], int],
        shown: int | None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        micro_batch = max(stage.micro_batch_tokens for stage in self.run.stages)
        for batch in evaluation_batches(
            self.sets[name],
            length,
            max(1, micro_batch // length),
            rows=rows,
            min_tokens=1 if rows == "stream" or self.sets[name].masked else self.min_tokens,
            max_tokens=self.max_tokens,
            rank=self.mesh.replica.rank,
            world_size=self.mesh.replica.size,
            documents=self.run.data.documents,
            multiple=self.mesh.tensor.size,
            sharing=sharing,
            most_sharing=self.mesh.context.size,
        ):
            self.poll()
            moved = batch.tensors(self.mesh.device)
            yield moved.tokens, moved.targets, moved.starts
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
