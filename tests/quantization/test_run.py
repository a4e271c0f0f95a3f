"""Quantization evaluation through the command line: the table, what is kept of it, and what stands in its way."""

import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_danube.quantization import task as quantization
from lightning_danube.weights.loading import load_decoder
from tests import commands
from tests.tiny_models import CONFIG as TINY
from tests.tiny_models import save_tiny

CONFIG = """
name: bits
runs: TMP/runs
data:
  class_path: lightning_danube.quantization.TextWindows
  init_args:
    text: {path: TMP/text.txt}
    tokenizer: ${model.init_args.weights}
    context_lengths: [64, 32]
    max_tokens: 1024
    cloze_questions: 12
    cache_dir: TMP/cache
model:
  class_path: lightning_danube.quantization.QuantizationEvaluation
  init_args:
    weights: TMP/model
    cost: false
    levels: [bitsandbytes:int8, hqq:4/64, rounding:2/64+embeddings]
trainer:
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_danube.callbacks.QuantizationSummary
"""

run = partial(commands.run, verb="test")


@pytest.fixture
def bits(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    text = " ".join(f"the {number} things of them" for number in range(300))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "bits.yaml").write_text(CONFIG.replace("TMP", str(tmp_path)))
    return tmp_path


def summary_of(bits: Path, version: int = 0) -> dict[str, Any]:
    path = bits / "runs" / "bits-test" / f"version_{version}" / "summary.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def by_level(bits: Path, version: int = 0) -> dict[str, dict[str, Any]]:
    return {row["level"]: row for row in summary_of(bits, version)["levels"]}


def kept(bits: Path) -> list[Path]:
    return sorted((bits / "cache" / "quantization").iterdir())


def test_a_table_of_all_levels(bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bits) == 0
    out = capsys.readouterr().out
    rows = by_level(bits)
    assert list(rows) == ["full", "bitsandbytes:int8", "hqq:4/64", "rounding:2/64+embeddings"]
    for name in rows:
        assert out.count(f"\n{name} ") >= 2, f"{name} is not a row of both tables"

    # The full model's perplexity, computed here from its logits.
    decoder = load_decoder(str(bits / "model")).eval()
    from lightning_danube.quantization.text_windows import TextWindows
    from lightning_danube.text.corpora import Source

    data = TextWindows(Source(str(bits / "text.txt")), str(bits / "model"), context_lengths=[64], max_tokens=1024)
    data.setup("test")
    windows = torch.from_numpy(data.windows(64))
    with torch.no_grad():
        log_probabilities = decoder(windows)[:, 32:-1].log_softmax(-1)
    nats = -log_probabilities.gather(-1, windows[:, 33:, None])
    full = rows["full"]
    assert full["perplexity"] == pytest.approx(float(nats.mean().exp()), rel=1e-5)
    assert (full["tokens"], full["windows"], full["cloze_questions"]) == (16 * 31, 16, 12)
    assert full["bits_per_weight"] == pytest.approx(32, rel=0.01)
    assert full["divergence"] == 0 and full["same_first"] == 1

    eight, four, two = (rows[name] for name in list(rows)[1:])
    assert 0 < eight["divergence"] < four["divergence"] < two["divergence"] < four["divergence"] * 1e4
    assert eight["divergence"] < eight["divergence_99"]
    assert full["tensor_bytes"] > eight["tensor_bytes"] > two["tensor_bytes"]
    assert four["fallbacks"] == 2  # down projections with rows of 96
    assert "hqq:4/64: 2 tensors have rows that the type cannot hold: 2 float32" in out
    for row in (eight, four, two):
        change = row["perplexity"] / full["perplexity"] - 1
        assert row["perplexity_change"] == pytest.approx(change, abs=1e-6)
        assert row["perplexity_change_low"] <= change <= row["perplexity_change_high"]
        inside = row["perplexity_change_low"] <= 0 <= row["perplexity_change_high"]
        assert row["perplexity_change_is_noise"] == inside
        assert row["perplexity_32"] > 0

    directory = bits / "runs" / "bits-test" / "version_0"
    table = pyarrow.parquet.read_table(directory / "quantization.parquet").to_pylist()
    assert [row["level"] for row in table] == list(rows)
    assert table[1]["divergence"] == pytest.approx(eight["divergence"])
    markdown = (directory / "quantization.md").read_text()
    assert "| hqq:4/64 |" in markdown and "perplexity at most 1 % higher" in markdown
    events = EventAccumulator(str(directory), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["quantization/perplexity_by_size"]
    # Nothing is left of the work.
    assert [path.suffix for path in kept(bits)] == [".npz"] * 4


@pytest.mark.medium
def test_what_was_measured_is_not_measured_again(bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bits) == 0
    first = by_level(bits)
    files = {path: path.stat().st_mtime_ns for path in kept(bits)}
    capsys.readouterr()
    assert run(bits) == 0
    assert by_level(bits, 1) == first
    assert {path: path.stat().st_mtime_ns for path in kept(bits)} == files

    capsys.readouterr()
    assert run(bits, "--model.init_args.levels", "[hqq:4/64, hqq:8/64]") == 0
    out = capsys.readouterr().out
    assert "kept from before: full, hqq:4/64" in out
    assert "  hqq:8/64: " in out and "  hqq:4/64: " not in out
    assert by_level(bits, 2)["hqq:4/64"] == first["hqq:4/64"]
    assert 0 < by_level(bits, 2)["hqq:8/64"]["divergence"] < first["hqq:4/64"]["divergence"]


@pytest.mark.medium
def test_a_damaged_measurement_is_made_again(bits: Path) -> None:
    assert run(bits) == 0
    first = by_level(bits)
    for path in kept(bits):
        path.write_bytes(path.read_bytes()[:500])
    assert run(bits) == 0
    again = by_level(bits, 1)
    for row in (*first.values(), *again.values()):
        row.pop("seconds")
    assert again == first


def test_what_a_killed_process_has_left_is_removed(bits: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    here, gone = socket.gethostname(), process.pid
    for name in (f"work-{here}-{gone}-x", f"work-{here}-{os.getpid()}-x", f"work-elsewhere-{gone}-x"):
        left = bits / "cache" / "quantization" / name
        left.mkdir(parents=True)
        (left / "whole.gguf").write_bytes(b"x" * 1000)
    assert run(bits) == 0
    left_alone = {path.name for path in kept(bits) if path.is_dir()}
    assert left_alone == {f"work-{here}-{os.getpid()}-x", f"work-elsewhere-{gone}-x"}


@pytest.mark.medium
def test_other_weights_are_measured_for_themselves(bits: Path) -> None:
    assert run(bits) == 0
    save_tiny(bits / "other", seed=1)
    assert run(bits, "--model.init_args.weights", str(bits / "other")) == 0
    assert by_level(bits, 1)["full"]["perplexity"] != by_level(bits)["full"]["perplexity"]


def test_a_level_that_cannot_be_had_is_a_row_that_says_so(
    bits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    tensors = load_file(bits / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3] = 0.5
    save_file(tensors, bits / "model" / "model.safetensors", metadata={"format": "pt"})
    assert run(bits, "--model.init_args.levels", "[gguf:Q4_K_M, rounding:4/64, bitsandbytes:int8]") == 0
    out = capsys.readouterr().out
    assert "gguf:Q4_K_M: not measured: llama.cpp is not installed; type" in out
    assert "rounding:4/64: not measured: model.layers.1.mlp.gate_proj.weight: in 1 group of 64 weights" in out
    assert list(by_level(bits)) == ["full", "bitsandbytes:int8"]
    assert set(summary_of(bits)["not_measured"]) == {"gguf:Q4_K_M", "rounding:4/64"}


def test_a_full_disk_loses_nothing(
    bits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = quantization.save_measured
    calls: list[Path] = []

    def full_after_two(path: Path, measured: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, measured)

    monkeypatch.setattr(quantization, "save_measured", full_after_two)
    assert run(bits) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.suffix for path in kept(bits)] == [".npz"] * 2
    assert run(bits) == 0
    assert "kept from before: full, bitsandbytes:int8" in capsys.readouterr().out


def test_when_told_to_stop_it_keeps_what_is_measured(
    bits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = quantization.QuantizationEvaluation._begin

    def signal_and_begin(self: Any, level: Any) -> None:
        if self.done:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(self, level)

    monkeypatch.setattr(quantization.QuantizationEvaluation, "_begin", signal_and_begin)
    assert run(bits) == 128 + signal.SIGTERM
    assert "stopped: 1 of 4 are measured and kept; the same command continues" in capsys.readouterr().out
    # What it worked with goes with the process, which here is the one of the tests.
    assert [path.suffix for path in kept(bits) if path.is_file()] == [".npz"]


def test_no_room_for_the_full_models_answers(
    bits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, log_probabilities_NV: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device, while the full model's answers were kept", "reference")

    monkeypatch.setattr(quantization._Divergences, "keep", full)
    assert run(bits) == 2
    assert "reference: No space left on device, while the full" in capsys.readouterr().err
    assert kept(bits) == []


def test_divergence_stops_where_the_room_does(bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "REFERENCE_BYTES", 4 * 272 * 31 * 5 + 100)
    assert run(bits) == 0
    row = by_level(bits)["hqq:4/64"]
    assert (row["divergence_tokens"], row["tokens"]) == (5 * 31, 16 * 31)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.init_args.levels", "[hqq:5/64]"), "level 'hqq:5/64': hqq takes <bits>/<group>"),
        (("--data.init_args.context_lengths", "[256]"), "the model reads 128: shorten the windows"),
        (("--data.init_args.max_tokens", "20"), "20 tokens are fewer than one window of data.context_lengths (64)"),
        (("--data.init_args.text.path", "nowhere.txt"), "there is no file nowhere.txt"),
        (("--data.init_args.tokenizer", "mistral"), "--data.init_args.tokenizer has 32,000 tokens, the model 272"),
        (("--model.init_args.weights", "nowhere"), "'nowhere' was found neither on disk nor on the hub"),
    ],
)
def test_a_mistake_is_one_line(
    bits: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bits, *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (bits / "runs" / "bits-test").exists() or not list((bits / "runs" / "bits-test").glob("*/*.md"))


@pytest.mark.slow
def test_it_is_one_process(bits: Path) -> None:
    command = [sys.executable, "-m", "lightning_danube", "test", "--config", str(bits / "bits.yaml")]
    done = subprocess.run([*command, "--trainer.devices", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("runs in one process: set trainer.devices and num_nodes to 1") == 1


@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
def test_there_is_only_test(bits: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bits, verb=verb) == 2
    assert f"QuantizationEvaluation has no {verb}: say test" in capsys.readouterr().err


def test_damaged_weights_are_refused_by_name(bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(bits / "model" / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = np.nan
    save_file(tensors, bits / "model" / "model.safetensors", metadata={"format": "pt"})
    assert run(bits) == 2
    assert "model.layers.0.self_attn.v_proj.weight holds NaN or infinity" in capsys.readouterr().err


def test_data_of_another_task(bits: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (tiny_run / "config.yaml").read_text()
    start, end = config.index("model:\n"), config.index("data:\n")
    model = f"""model:
  class_path: lightning_danube.quantization.QuantizationEvaluation
  init_args: {{weights: {tiny_run}, levels: ["hqq:4/64"], cost: false}}
"""
    (bits / "bits.yaml").write_text(config[:start] + model + config[end:])
    assert run(bits, "--trainer.callbacks", "null", "--runs", str(bits / "runs")) == 2
    assert "CurriculumData has none in windows: set data.class_path to" in capsys.readouterr().err


@pytest.mark.slow
def test_speed_and_memory_of_each_level(bits: Path) -> None:
    assert run(bits, "--model.init_args.cost", "true") == 0
    for row in by_level(bits).values():
        assert row["prefill_tokens_per_second"] > row["decode_tokens_per_second"] > 0


WIDE = dataclasses.replace(TINY, hidden_size=256, intermediate_size=256, num_attention_heads=4, head_dim=64)
"""Rows of whole blocks, for weights and for the cache."""


@pytest.mark.llama_cpp
def test_levels_that_llama_cpp_runs(bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(bits / "wide", WIDE)
    levels = "[gguf:F32, gguf:F16, gguf:Q8_0+linear, gguf:Q8_0, gguf:Q4_0, gguf:Q4_0+imatrix, gguf:F16+cache-q4_0]"
    options = ("--model.init_args.weights", str(bits / "wide"), "--data.init_args.calibration_tokens", "512")
    assert run(bits, "--model.init_args.levels", levels, *options) == 0
    rows = by_level(bits)
    # llama.cpp's own arithmetic on our float32 weights, with its cache in float16, and logits as large as these.
    assert rows["gguf:F32"]["perplexity"] == pytest.approx(rows["full"]["perplexity"], rel=5e-3)
    assert rows["gguf:F32"]["divergence"] < 1e-3
    names = ["gguf:F32", "gguf:F16", "gguf:Q8_0+linear", "gguf:Q8_0", "gguf:Q4_0"]
    sizes = [rows[name]["tensor_bytes"] for name in names]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert rows["gguf:F16"]["divergence"] < rows["gguf:Q8_0"]["divergence"] < rows["gguf:Q4_0"]["divergence"]
    assert rows["gguf:Q4_0+imatrix"]["divergence"] != rows["gguf:Q4_0"]["divergence"]
    assert rows["gguf:F16+cache-q4_0"]["divergence"] > 10 * rows["gguf:F16"]["divergence"]
    assert rows["gguf:F16+cache-q4_0"]["tensor_bytes"] == rows["gguf:F16"]["tensor_bytes"]
    assert [path.suffix for path in kept(bits)] == [".npz"] * 8


@pytest.mark.llama_cpp
def test_a_type_that_needs_a_matrix_says_so(bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(bits / "wide", WIDE)
    options = ("--model.init_args.levels", "[gguf:IQ2_XXS, gguf:IQ2_XXS+imatrix, hqq:4/64]")
    weights = ("--model.init_args.weights", str(bits / "wide"))
    assert run(bits, *options, *weights, "--data.init_args.max_tokens", "null") == 0
    out = capsys.readouterr().out
    assert "gguf:IQ2_XXS: not measured: llama.cpp does not quantize to IQ2_XXS" in out
    assert "gguf:IQ2_XXS+imatrix: not measured: an importance matrix needs text, and none is left" in out
    assert "hqq:4/64" in by_level(bits)


@pytest.mark.llama_cpp
def test_a_cache_that_does_not_fit_says_so(bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Heads of 16 channels, and blocks of 32."""
    assert run(bits, "--model.init_args.levels", "[gguf:F16, gguf:F16+cache-q4_0]") == 0
    assert (
        "gguf:F16+cache-q4_0: not measured: llama.cpp makes no cache of type q4_0 for this model"
        in capsys.readouterr().out
    )
    assert list(by_level(bits)) == ["full", "gguf:F16"]
