"""The benchmark of generation: what a step reads, and its table."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from lightning_danube.model import PRESETS, DecoderConfig

TINY = DecoderConfig(64, 96, 2, 4, 2, vocab_size=30000)


@pytest.fixture
def benchmark(benchmarks_on_path: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    import generation

    monkeypatch.setitem(generation.SHAPES, "smollm2", TINY)
    return generation


def test_a_step_reads_weights_and_cache(benchmark: Any) -> None:
    # 513,590,784 parameters, of 32,000 x 1536 in the embedding three rows; 16 layers of 8 heads of 96, keys and values.
    expected = 2 * (513_590_784 - 31_997 * 1536) + 3 * 2 * (16 * 8 * 96 * 2) * 1000
    assert benchmark.bytes_a_step(PRESETS["danube3-500m"], 2, 3, 1000) == expected
    assert benchmark.bytes_a_step(DecoderConfig(64, 96, 2, 4, 2, tie_word_embeddings=True), 4, 1, 0) == 4 * (
        32000 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
    )


def test_a_row_has_medians_ratios_and_the_share_of_the_limit(benchmark: Any) -> None:
    results = {"danube": [(20.0, 6.0, 1.0), (30.0, 9.0, 3.0), (40.0, 5.0, 2.0)], "transformers": [(10.0, 3.0, 4.0)] * 3}
    first, second = benchmark.rows_of("bfloat16", 1024, results, 8.0)
    assert first == "| bfloat16 | 1,024 | danube | 30.0 (20.0 to 40.0) | 3.00 | 6.0 (5.0 to 9.0) | 2.00 | 75% | 2.00 |"
    assert second.endswith(" | 1.00 | 38% | 4.00 |")


@pytest.mark.medium
def test_it_runs(benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise ValueError("not here")

    monkeypatch.setattr(benchmark, "import_llama_cpp", missing)
    monkeypatch.setattr(benchmark, "write_result", lambda name, text: print(name, text))
    arguments = Namespace(
        weights=None,
        shape="smollm2",
        device="cuda" if torch.cuda.is_available() else "cpu",
        compiled=False,
        rows=2,
        dtypes=["float32"],
        prompt_tokens=[5],
        new_tokens=4,
        rounds=1,
        threads=torch.get_num_threads(),
    )
    with torch.inference_mode():
        benchmark.contest(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert {"danube", "transformers"} <= {line.split(" | ")[2] for line in lines if line.startswith("| float32")}
    assert any(line.startswith("memory is read at ") for line in lines)
