"""AdamW that shows each gradient to an observer in the moment before it is used.

Inside DeepSpeed the optimizer's own `step()` is the one place where every ZeRO stage hands over
fp32 gradient partitions after clipping.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class ObservedAdamW(torch.optim.AdamW):
    """torch's AdamW; `observe(flat, gradient)` is called for each flat partition before its update.
    Where `refuse()` says so, nothing is updated: no weight, no moment, no count.

    Parameter groups carry `learning_rate_multiplier` beside torch's own keys.
    """

    observe: Callable[[Tensor, Tensor], None] | None = None
    refuse: Callable[[], bool] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of the groups present (DeepSpeed calls this per group, or once in all)."""
        if self.observe is not None:
            for group in self.param_groups:
                for flat in group["params"]:
                    if flat.grad is not None:
                        self.observe(flat, flat.grad)
        if self.refuse is not None and self.refuse():
            return None
        return self._update(closure)

    def _update(self, closure: Any) -> Any:
        return super().step(closure)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give every group the step's rate times its own multiplier."""
        for group in self.param_groups:
            group["lr"] = learning_rate * group["learning_rate_multiplier"]

    def create_state(self, flat: Tensor) -> dict[str, Tensor]:
        """The state torch would create at the first step, so that it can be saved and restored
        before one. Existing state is returned as it is."""
        state = self.state[flat]
        if not state:
            on_device = self.defaults["fused"] or self.defaults["capturable"]
            device = flat.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for moment in MOMENTS:
                state[moment] = self._zeros(flat)
        return state

    def _zeros(self, flat: Tensor) -> Tensor:
        return torch.zeros_like(flat)
