"""Decoding steps as one compiled program. On a GPU the program is recorded as a CUDA graph.

Shapes: B batch, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_danube.model.compilation import check_compiler

if TYPE_CHECKING:
    from lightning_danube.model.cache import KVCache
    from lightning_danube.model.decoder import Decoder

FEWEST_SLOTS = 256
"""The slots of the cache that the first recorded step reads. The number doubles when a text exceeds it."""


class CompiledStep:
    """`next_logits` of one decoder, compiled at the first step with the weights of that time.

    A second compilation follows for batches of one row. Several token streams may share this object.

    Raises:
        ValueError: the decoder is on a CPU, and there is no C++ compiler. The first step raises it for layers that
            cannot be compiled.
    """

    def __init__(self, decoder: "Decoder") -> None:
        self.decoder = decoder
        self.on_cpu = decoder.model.embed_tokens.weight.device.type == "cpu"
        if self.on_cpu:
            check_compiler("a compiled decoding step", "generate without")
        self._compiled = torch.compile(next_logits, fullgraph=True, dynamic=True)

    def __call__(self, ids_B: Tensor, cache: "KVCache") -> Tensor:
        """The logits after one more token in each row, (B, V). The cache must have a length for each row."""
        assert cache.lengths_B is not None
        try:
            # Freezing makes the weights constants of the program. Packed matrices, which exist on a CPU only, cannot be
            # compiled otherwise.
            with torch._inductor.config.patch(freezing=self.on_cpu):
                logits_BV: Tensor = self._compiled(self.decoder, ids_B, cache)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"the step can not be compiled: {str(error).splitlines()[0]}") from error
        return logits_BV


class StepsOfCache:
    """Runs a compiled step on one cache. On a GPU there is a graph for each number of slots to read.

    The cache needs one slot that is never filled. A step that read all slots would see a contiguous tensor, and would
    be compiled again for it.
    """

    def __init__(self, step: CompiledStep, cache: "KVCache") -> None:
        self.step, self.cache = step, cache
        self._graphs: dict[int, RecordedStep] = {}

    def __call__(self, ids_B: Tensor, longest: int) -> Tensor:
        """The logits after one more token in each row, (B, V).

        Args:
            longest: the tokens of the longest row, including the new one.
        """
        if self.cache.device.type != "cuda":
            self.cache.visible = longest
            return self.step(ids_B, self.cache)
        slots = FEWEST_SLOTS
        while slots < longest:
            slots *= 2
        self.cache.visible = slots = min(slots, self.cache.capacity - 1)
        if slots not in self._graphs:
            self._graphs[slots] = RecordedStep(self.step, ids_B, self.cache)
        return self._graphs[slots].replay(ids_B)

    def forget(self) -> None:
        """Drops the graphs. Needed when the cache has new tensors for its lengths."""
        self._graphs.clear()


class RecordedStep:
    """The kernels of one step as a CUDA graph. It reads and writes the memory that was used when it was recorded."""

    def __init__(self, step: CompiledStep, ids_B: Tensor, cache: "KVCache") -> None:
        assert cache.lengths_B is not None
        self.ids_B, lengths_B = ids_B.clone(), cache.lengths_B.clone()
        # Compilation and the set-up of libraries cannot be recorded, so two steps run before. They write a token after
        # each row, where the recorded step writes it again.
        with torch.cuda.device(ids_B.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    step(self.ids_B, cache)
                    cache.lengths_B.copy_(lengths_B)
            torch.cuda.current_stream().wait_stream(aside)
            self._graph: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits_BV = step(self.ids_B, cache)

    def replay(self, ids_B: Tensor) -> Tensor:
        """The logits, (B, V). The next replay overwrites their memory."""
        self.ids_B.copy_(ids_B)
        with torch.cuda.device(self.ids_B.device):
            self._graph.replay()
        return self._logits_BV


def next_logits(decoder: "Decoder", ids_B: Tensor, cache: "KVCache") -> Tensor:
    """The logits after one more token in each row, (B, V)."""
    logits_BV: Tensor = decoder.lm_head(decoder.hidden_states(ids_B[:, None], cache=cache)[:, 0])
    return logits_BV
