"""Validation on a run's held-out sets, during training and at the end of its stages."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megahybrid.config import RunConfig
from megahybrid.data.dataset import TokenDataset
from megahybrid.data.held_out import Rows, evaluation_batches
from megahybrid.evaluate.loss import HeldOutLoss, TokenLoss, held_out_loss
from megahybrid.parallel.mesh import ParallelMesh

FAR = 4  # loss by position is measured up to this many times the longest trained length


class HeldOutSets:
    """The sets that data.held_out names, open for scoring. Collective over the data axis."""

    def __init__(self, run: RunConfig, mesh: ParallelMesh) -> None:
        self.run = run
        self.mesh = mesh
        self.sets = {
            name: TokenDataset(source.path, vocab_size=run.model.vocab_size)
            for name, source in run.data.held_out.items()
        }
        self.longest = FAR * max(length for stage in run.stages for length in stage.lengths)

    def score(
        self,
        token_loss: TokenLoss,
        length: int,
        tell: Callable[[str, HeldOutLoss, Rows], None],
    ) -> None:
        """The whole file of each set, cut every `length` tokens."""
        for name in self.sets:
            tell(name, self._score(token_loss, name, length, "stream"), "stream")

    def score_far(
        self, token_loss: TokenLoss, tell: Callable[[str, HeldOutLoss, Rows], None]
    ) -> None:
        """Loss by position within single documents, to FAR times the longest trained length."""
        for name in self.sets:
            tell(name, self._score(token_loss, name, self.longest, "documents"), "documents")

    def _score(self, token_loss: TokenLoss, name: str, length: int, rows: Rows) -> HeldOutLoss:
        return held_out_loss(
            token_loss,
            self._rows(name, length, rows),
            length,
            self.longest,
            self.mesh.data,
            self.mesh.device,
        )

    def _rows(self, name: str, length: int, rows: Rows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        micro_batch = max(stage.micro_batch_tokens for stage in self.run.stages)
        for batch in evaluation_batches(
            self.sets[name],
            length,
            max(1, micro_batch // length),
            rows=rows,
            # A document that ends before the shortest length says nothing about far positions.
            min_tokens=1 if rows == "stream" else min(map(min, self._lengths())),
            max_tokens=self.run.evaluate.max_tokens,
            rank=self.mesh.data.rank,
            world_size=self.mesh.data.size,
            documents=self.run.data.documents,
        ):
            moved = batch.tensors(self.mesh.device)
            yield moved.tokens, moved.targets, moved.starts

    def _lengths(self) -> list[list[int]]:
        return [list(stage.lengths) for stage in self.run.stages]


def evaluation_loss(
    model: torch.nn.Module,
) -> TokenLoss:
    """Each token's loss under `model`, without gradients. Rows that are one document go without
    boundaries, because kernels are faster so."""

    def token_loss(tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad():
            boundaries = starts if bool(starts.any()) else None
            return model(tokens, targets, boundaries)[1]

    return token_loss
