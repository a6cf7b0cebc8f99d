"""What a model makes of whole rows, wherever their tokens lie: on tensor and on context ranks."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megahybrid.model.context import Watch
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.collectives import gather_sequence


class HiddenRows:
    """The final norm's output on rows, of which a context rank holds its own tokens.

    Rows are filled up where their ranks do not divide them, and nothing sees it. Everything here is
    collective over the tensor axis and the context ranks of a row. `watch` as in
    `Transformer.hidden`; it meets the tokens that fill rows up as well.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Transformer,
        tokens: Int[Tensor, "batch seq"],
        starts: Int[Tensor, "batch seq"] | None = None,
        watch: Watch | None = None,
    ) -> None:
        fill = model.filled(tokens.shape[1]) - tokens.shape[1]
        tokens = F.pad(tokens, (0, fill))
        if starts is not None:
            starts = torch.cat((starts, starts[:, -1:].expand(-1, fill)), dim=1)
        self._shards = model.shards(tokens.shape[1])
        hidden = model.hidden(tokens, starts, watch)
        self._local = gather_sequence(hidden, model.mesh.tensor)  # [seq_local, batch, hidden]

    def at(
        self, positions: Int[Tensor, "rows"], row: int | None = None
    ) -> Float[Tensor, "rows *batch hidden"]:
        """Return the output at these positions, of all rows or of one."""
        local = self._local if row is None else self._local[:, row]
        return local[positions] if self._shards is None else self._shards.pick(local, positions)
