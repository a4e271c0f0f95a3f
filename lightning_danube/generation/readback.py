"""Values that the host reads from a device without stopping the device."""

from typing import Any

import torch
from torch import Tensor


class Readback:
    """A copy of a tensor to the host, started now. The device continues meanwhile.

    A plain `tolist` of a tensor on a GPU waits for all work that was started before the call, also for work that was
    started after the tensor was made. This copy has its place in the order of the work: `values` waits for no more
    than what precedes the copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.is_late = tensor.device.type == "cuda"
        """Whether to read the values only after more work was started."""
        self._host, self._copied = tensor, None
        if self.is_late:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> Any:
        """Returns the tensor as `tolist` does."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
