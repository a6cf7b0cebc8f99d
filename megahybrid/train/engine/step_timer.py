"""The seconds of each part of a step, without stopping a device to ask."""

import time

import torch


class StepTimer:
    """Moments of a step in order, the first when it is made.

    On CUDA they are events in the stream: the host runs ahead and asks once, when the device is
    done. On a CPU they are the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[float | torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        """Note this moment."""
        if not self._cuda:
            self._moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._moments.append(event)

    def seconds(self) -> list[float]:
        """Seconds between each moment and the next, now being the last. Waits for the device."""
        self.lap()
        if not self._cuda:
            return [b - a for a, b in zip(self._moments, self._moments[1:], strict=False)]  # type: ignore[operator]
        self._moments[-1].synchronize()  # type: ignore[union-attr]
        pairs = zip(self._moments, self._moments[1:], strict=False)
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]  # type: ignore[union-attr,arg-type]
