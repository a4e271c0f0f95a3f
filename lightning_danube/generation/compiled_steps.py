"""Decoding steps as one compiled program, on a GPU recorded as a CUDA graph: nothing runs between their kernels.

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
"""Of a cache, that a recorded step looks at; from there on twice as many, whenever a text has outgrown them."""


class CompiledStep:
    """Computes what `next_logits` does, of one decoder with the weights that it has at the first step. Compiled then,
    for all numbers of rows but 1, and once more for 1; streams of tokens may share it.

    Raises:
        ValueError: the decoder is on a CPU, and there is no C++ compiler; at the first step: it has layers that can not
            be compiled.
    """

    def __init__(self, decoder: "Decoder") -> None:
        self.decoder = decoder
        self.on_cpu = decoder.model.embed_tokens.weight.device.type == "cpu"
        if self.on_cpu:
            check_compiler("a compiled decoding step", "generate without")
        self._compiled = torch.compile(next_logits, fullgraph=True, dynamic=True)

    def __call__(self, ids_B: Tensor, cache: "KVCache") -> Tensor:
        """(B, V), of rows that have lengths of their own."""
        assert cache.lengths_B is not None
        try:
            # Frozen weights are constants of the program. Packed matrices, which only a CPU has, can be compiled in no
            # other way.
            with torch._inductor.config.patch(freezing=self.on_cpu):
                logits_BV: Tensor = self._compiled(self.decoder, ids_B, cache)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"the step can not be compiled: {str(error).splitlines()[0]}") from error
        return logits_BV


class StepsOfCache:
    """Runs a compiled step on one cache: on a GPU by graphs, one for each number of slots to look at.

    The cache has a slot more than it will ever hold tokens: a step that looked at all slots would see a tensor without
    gaps, and be compiled for that once more.
    """

    def __init__(self, step: CompiledStep, cache: "KVCache") -> None:
        self.step, self.cache = step, cache
        self._graphs: dict[int, RecordedStep] = {}

    def __call__(self, ids_B: Tensor, longest: int) -> Tensor:
        """
        Args:
            longest: tokens of the longest row, the new one included.
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
        """The cache has got other tensors for its lengths."""
        self._graphs.clear()


class RecordedStep:
    """The kernels of one step as a CUDA graph, which reads and writes where they did when it was recorded."""

    def __init__(self, step: CompiledStep, ids_B: Tensor, cache: "KVCache") -> None:
        assert cache.lengths_B is not None
        self.ids_B, lengths_B = ids_B.clone(), cache.lengths_B.clone()
        # What compiles, or sets a library up, has to have happened before: nothing of the kind can be recorded. These
        # steps write a token behind each row, where the replayed one will write it again.
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
        """(B, V), in memory that the next replay overwrites."""
        self.ids_B.copy_(ids_B)
        with torch.cuda.device(self.ids_B.device):
            self._graph.replay()
        return self._logits_BV


def next_logits(decoder: "Decoder", ids_B: Tensor, cache: "KVCache") -> Tensor:
    """(B, V) after one more token a row."""
    logits_BV: Tensor = decoder.lm_head(decoder.hidden_states(ids_B[:, None], cache=cache)[:, 0])
    return logits_BV
