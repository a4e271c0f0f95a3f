import math
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_danube.generation import compiled_steps, token_stream
from lightning_danube.generation.compiled_steps import FEWEST_RECORDED, CompiledStep, StepsOfCache, can_be_recorded
from lightning_danube.generation.packing import SplitLinear, pack, pack_for_generation
from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.token_stream import TokenStream
from lightning_danube.model import Decoder, DecoderConfig, KVCache
from tests.recorded_steps import Replayed, record_on
from tests.tiny_models import VARIANTS, tiny_decoder

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2, max_position_embeddings=600)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def decoder_of(dtype: torch.dtype, device: str = "cpu") -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).to(device, dtype).eval()


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def prompts_of(*lengths: int) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(101) for _ in range(length)] for length in lengths]


def rows(decoder: Decoder, prompts: list[list[int]], new_tokens: int, **options: Any) -> list[list[int]]:
    return torch.stack([*TokenStream(decoder, prompts, new_tokens, **options)], dim=1).tolist()


REQUESTS: list[tuple[list[list[int]], int, dict[str, Any]]] = [
    (prompts_of(9), 20, {}),
    (prompts_of(3, 11, 1), 20, {}),
    (prompts_of(5, 5), 20, {"sampling": Sampling(repetition_penalty=1.5)}),
    # Rows that reach their window at different times, and at the same; more than a graph has slots.
    (prompts_of(3, 12), 20, {"window": 12}),
    (prompts_of(5, 5), 20, {"window": 12}),
    (prompts_of(250, 3), 20, {"sampling": Sampling(temperature=1.0), "seeds": [1, 2]}),
]


@pytest.mark.parametrize("asked", REQUESTS)
@pytest.mark.parametrize("device", DEVICES)
def test_recorded_steps_give_the_same_tokens(device: str, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(torch.float64, device)
    prompts, new_tokens, options = asked
    with monkeypatch.context() as never:
        never.setattr(token_stream, "FEWEST_RECORDED", new_tokens + 1)
        expected = rows(decoder, prompts, new_tokens, **options)
    record_on(device, monkeypatch)
    assert rows(decoder, prompts, new_tokens, **options) == expected
    if device == "cpu":
        assert Replayed.made


def test_steps_that_cannot_be_recorded_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, prompts = decoder_of(torch.float64), prompts_of(4, 9)
    expected = rows(decoder, prompts, 20)
    record_on("cpu", monkeypatch)

    def fail(step: Any, ids_B: torch.Tensor, cache: KVCache) -> None:
        step(ids_B, cache)  # as the steps before the recording do
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(compiled_steps, "RecordedStep", fail)
    assert rows(decoder, prompts, 20) == expected


def test_a_step_reads_nothing_back() -> None:
    """A step that waits for the device, or sends numbers there, cannot be recorded."""
    seen: set[str] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(str(func))
            return func(*args, **kwargs or {})

    decoder = decoder_of(torch.bfloat16)
    cache = KVCache.for_decoder(decoder, 2, 300)
    cache.set_lengths([5, 7])
    cache.visible = 256
    ids = torch.tensor([1, 2])
    with torch.no_grad(), Seen():
        compiled_steps.next_logits(decoder, ids, cache)
    assert "aten.embedding.default" in seen
    # `item`, the places of a mask, and tensors of numbers that the host has.
    waits = ("_local_scalar", "nonzero", "masked_select", "lift_fresh")
    assert not {name for name in seen if any(word in name for word in waits)}


def test_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(torch.float32)
    assert not can_be_recorded(decoder)  # on a CPU
    record_on("cpu", monkeypatch)
    assert can_be_recorded(decoder)
    made = []
    for new_tokens in (FEWEST_RECORDED - 1, FEWEST_RECORDED):
        rows(decoder, [[1, 2, 3]], new_tokens)
        made.append(Replayed.made)
    assert made == [0, 1], "too few tokens are not recorded"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    assert not can_be_recorded(decoder)
    monkeypatch.undo()
    record_on("cpu", monkeypatch)
    monkeypatch.setattr(decoder.lm_head.weight, "device_mesh", "divided", raising=False)
    assert not can_be_recorded(decoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_steps_of_other_families_give_the_same_tokens(name: str) -> None:
    """Plain, and packed for generation."""
    decoder = tiny_decoder(VARIANTS[name]).double().eval()
    prompts = prompts_of(3, 11)
    expected = rows(decoder, prompts, 20)
    assert rows(decoder, prompts, 20, compiled=CompiledStep(decoder)) == expected
    packed = tiny_decoder(VARIANTS[name]).eval()
    with torch.inference_mode():
        pack_for_generation(packed)
        assert rows(packed, prompts, 20, compiled=CompiledStep(packed)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("device", [*DEVICES, "cpu as a gpu"])
def test_compiled_steps_give_the_same_tokens(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu as a gpu":
        device = "cpu"
        record_on(device, monkeypatch)
    decoder = decoder_of(torch.float64, device)
    compiled = CompiledStep(decoder)
    for prompts, new_tokens, options in REQUESTS[1:]:
        expected = rows(decoder, prompts, new_tokens, **options)
        assert rows(decoder, prompts, new_tokens, compiled=compiled, **options) == expected
    # For all these batches, windows and lengths.
    assert compiled_graphs() == 1
    assert rows(decoder, [[7, 8, 9]], 20, compiled=compiled) == rows(decoder, [[7, 8, 9]], 20)
    assert compiled_graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_decoders_compile(dtype: torch.dtype) -> None:
    decoder = decoder_of(dtype)
    assert pack_for_generation(decoder)
    assert rows(decoder, prompts_of(9, 4), 8, compiled=CompiledStep(decoder)) == rows(decoder, prompts_of(9, 4), 8)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [prompts_of(9), prompts_of(9, 4)])
def test_split_matrices_compile(prompts: list[list[int]]) -> None:
    decoder = decoder_of(torch.float32)
    pack(decoder, SplitLinear)
    assert rows(decoder, prompts, 8, compiled=CompiledStep(decoder)) == rows(decoder, prompts, 8)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_compiled_step_writes_its_own_slots_only(tmp_path: Path) -> None:
    """And not all of the cache anew, as it would if the layers' were cut out of one tensor within the step."""
    decoder = decoder_of(torch.float32)
    file = tmp_path / "empty"
    shape = (2, 2, 8192, 16)
    file.touch()
    os.truncate(file, 4 * math.prod(shape))

    def mapped() -> torch.Tensor:
        return torch.from_file(str(file), shared=False, size=math.prod(shape)).view(shape)

    with torch.inference_mode():
        cache = KVCache([mapped(), mapped()], [mapped(), mapped()])
        cache.set_lengths([3, 5])
        steps = StepsOfCache(CompiledStep(decoder), cache)
        for longest in (6, 7):
            steps(torch.tensor([1, 2]), longest)
    written = written_bytes(file)
    # 16 stretches of two tokens of 64 bytes, each on a page of its own.
    assert 16 * 4096 <= written <= 16 * 2 * 4096 < cache.nbytes / 50


def written_bytes(file: Path) -> int:
    """Of all private mappings of a file, what this process has written: such pages are its own."""
    total, of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            of_file = line.endswith(str(file))
        elif of_file and name == "Anonymous:":
            total += 1024 * int(values[0])
    return total


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler on a CPU, and there is no no-such-compiler"):
        CompiledStep(decoder_of(torch.float32))


@pytest.mark.medium
def test_layers_that_can_not_be_compiled_are_refused() -> None:
    class Opaque(torch.nn.Linear):
        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    decoder = decoder_of(torch.float32)
    decoder.lm_head = Opaque(64, 101, bias=False)
    with pytest.raises(ValueError, match=r"the step cannot be compiled: .*torch\.compiler\.disable"):
        rows(decoder, [[1, 2, 3]], 3, compiled=CompiledStep(decoder))


def test_pytorchs_compiler_still_has_the_private_parts_of_a_compiled_step() -> None:
    with torch._inductor.config.patch(freezing=True):
        assert torch._inductor.config.freezing
    assert issubclass(torch._dynamo.exc.Unsupported, torch._dynamo.exc.TorchDynamoException)
