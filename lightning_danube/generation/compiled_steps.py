"""Decoding steps of fixed shapes: on a GPU recorded as a CUDA graph, and on request compiled as one program.

Shapes: B batch, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_danube.model.compilation import check_compiler
from lightning_danube.model.decoder import Block

if TYPE_CHECKING:
    from lightning_danube.model.cache import KVCache
    from lightning_danube.model.decoder import Decoder

FEWEST_SLOTS = 256
"""The slots of the cache that the first recorded step reads. The number doubles when a text exceeds it."""
FEWEST_RECORDED = 16
"""New tokens from which on steps are recorded. Recording runs a step three times."""


class CompiledStep:
    """`next_logits` of one decoder, compiled at the first step with the weights of that time.

    On a CPU the whole step is one program. On a GPU one program serves all blocks, which compiles in a fraction of the
    time; what starts the blocks is recorded anyway. A second compilation follows for batches of one row. Several token
    streams may share this object.

    Raises:
        ValueError: the decoder is on a CPU, and there is no C++ compiler. The first step raises it for layers that
            cannot be compiled.
    """

    def __init__(self, decoder: "Decoder") -> None:
        self.decoder = decoder
        device = decoder.model.embed_tokens.weight.device
        self.on_cpu, self.by_block = device.type == "cpu", has_graphs(device)
        if self.on_cpu:
            check_compiler("a compiled decoding step", "generate without")
        compiled: Any = Block.forward if self.by_block else next_logits
        self._compiled = torch.compile(compiled, fullgraph=True, dynamic=True)

    def __call__(self, ids_B: Tensor, cache: "KVCache") -> Tensor:
        """The logits after one more token in each row, (B, V). The cache must have a length for each row."""
        assert cache.lengths_B is not None
        try:
            if self.by_block:
                with self._compiled_blocks():
                    return next_logits(self.decoder, ids_B, cache)
            # Freezing makes the weights constants of the program. Packed matrices, which exist on a CPU only, cannot be
            # compiled otherwise.
            with torch._inductor.config.patch(freezing=self.on_cpu):
                logits_BV: Tensor = self._compiled(self.decoder, ids_B, cache)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"the step cannot be compiled: {str(error).splitlines()[0]}") from error
        return logits_BV

    @contextmanager
    def _compiled_blocks(self) -> Iterator[None]:
        """Runs compiled blocks within a step only: each prompt of another shape would be compiled again."""
        blocks = list(self.decoder.model.layers)
        for block in blocks:
            # Hides the method of the class.
            block.forward = functools.partial(self._compiled, block)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def can_be_recorded(decoder: "Decoder") -> bool:
    """Returns whether the decoder's steps can be recorded as a CUDA graph.

    The whole decoder is on one GPU. No part of it is on another device or divided among devices. Autocast is off: it
    would cast the weights outside of the recording.
    """
    devices = {parameter.device for parameter in decoder.parameters()}
    if len(devices) != 1 or not has_graphs(*devices) or torch.is_autocast_enabled("cuda"):
        return False
    return not any(hasattr(parameter, "device_mesh") for parameter in decoder.parameters())


class StepsOfCache:
    """Runs a step on one cache of fixed memory. On a GPU there is a graph for each number of slots to read.

    Without a graph the host starts some hundred kernels for each token, and that takes many times as long as they run.

    A cache for compiled steps needs one slot that is never filled. A step that read all slots would see a contiguous
    tensor, and would be compiled again for it.

    Args:
        step: the new ids (B,) and the cache → the logits after them, (B, V); a `CompiledStep`, or `next_logits` of a
            decoder.
    """

    def __init__(self, step: Callable[[Tensor, "KVCache"], Tensor], cache: "KVCache") -> None:
        self.step, self.cache = step, cache
        self.most_slots = cache.capacity - (1 if isinstance(step, CompiledStep) else 0)
        self.records = has_graphs(cache.device)
        self._graphs: dict[int, RecordedStep] = {}

    def __call__(self, ids_B: Tensor, longest: int) -> Tensor:
        """The logits after one more token in each row, (B, V).

        Args:
            longest: the tokens of the longest row, including the new one.
        """
        if not self.records:
            self.cache.visible = longest
            return self.step(ids_B, self.cache)
        slots = FEWEST_SLOTS
        while slots < longest:
            slots *= 2
        self.cache.visible = slots = min(slots, self.most_slots)
        if slots not in self._graphs:
            assert self.cache.lengths_B is not None
            lengths_B = self.cache.lengths_B.clone()
            try:
                self._graphs[slots] = RecordedStep(self.step, ids_B, self.cache)
            except RuntimeError:
                if isinstance(self.step, CompiledStep):
                    raise
                # Layers of other libraries may wait for the device, which cannot be recorded.
                self.cache.lengths_B.copy_(lengths_B)
                self.records = False
                return self(ids_B, longest)
        return self._graphs[slots].replay(ids_B)

    def forget(self) -> None:
        """Drops the graphs. Needed when the cache has new tensors for its lengths."""
        self._graphs.clear()


class RecordedStep:
    """The kernels of one step as a CUDA graph. It reads and writes the memory that was used when it was recorded."""

    def __init__(self, step: Callable[[Tensor, "KVCache"], Tensor], ids_B: Tensor, cache: "KVCache") -> None:
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
