import math
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.generation.compiled_steps import CompiledStep, StepsOfCache
from lightning_danube.generation.packing import SplitLinear, pack, pack_for_generation
from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.token_stream import TokenStream
from lightning_danube.model import Decoder, DecoderConfig, KVCache
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
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_steps_give_the_same_tokens(device: str) -> None:
    decoder = decoder_of(torch.float64, device)
    compiled = CompiledStep(decoder)
    requests: list[tuple[list[list[int]], int, dict[str, Any]]] = [
        (prompts_of(3, 11, 1), 20, {}),
        (prompts_of(5, 5), 20, {"sampling": Sampling(repetition_penalty=1.5)}),
        # Rows that reach their window at different times, and at the same; more than a graph has slots.
        (prompts_of(3, 12), 20, {"window": 12}),
        (prompts_of(5, 5), 20, {"window": 12}),
        (prompts_of(250, 3), 20, {"sampling": Sampling(temperature=1.0), "seeds": [1, 2]}),
    ]
    for prompts, new_tokens, options in requests:
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


def test_layers_that_can_not_be_compiled_are_refused() -> None:
    class Opaque(torch.nn.Linear):
        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    decoder = decoder_of(torch.float32)
    decoder.lm_head = Opaque(64, 101, bias=False)
    with pytest.raises(ValueError, match=r"the step can not be compiled: .*torch\.compiler\.disable"):
        rows(decoder, [[1, 2, 3]], 3, compiled=CompiledStep(decoder))


def test_pytorchs_compiler_still_has_the_private_parts_of_a_compiled_step() -> None:
    with torch._inductor.config.patch(freezing=True):
        assert torch._inductor.config.freezing
    assert issubclass(torch._dynamo.exc.Unsupported, torch._dynamo.exc.TorchDynamoException)
