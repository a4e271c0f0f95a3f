"""The precision of a run follows the machine. Rates are faked: both kinds of processor on either."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from lightning_danube.__main__ import main
from lightning_danube.cli.trainer_verbs import RunRecord
from lightning_danube.device import ProductRate
from lightning_danube.training import precision
from lightning_danube.training.precision import RANK_ZEROS, check_precision, choose, kind_of_device, warning_of
from lightning_danube.training.ranks import RankLauncher
from tests.cli.test_trainer_verbs import error_of
from tests.commands import fit

WITH_16_BITS = {torch.float32: 100e9, torch.bfloat16: 200e9, torch.float16: 10e9}
WITHOUT = {torch.float32: 66e9, torch.bfloat16: 0.22e9, torch.float16: 4e9}


def fake_rates(monkeypatch: pytest.MonkeyPatch, rates: dict[torch.dtype, float]) -> None:
    def rate(dtype: torch.dtype, device: str = "cpu") -> ProductRate:
        return ProductRate(rates[dtype], rates[dtype], exact=True)

    for module in ("device", "training.precision"):
        monkeypatch.setattr(f"lightning_danube.{module}.product_rate", rate)


@pytest.fixture
def free(tiny: Path) -> Path:
    """The tiny run with no precision in its config."""
    config = tiny / "tiny.yaml"
    text = config.read_text().replace("  precision: 32-true\n", "")
    assert "precision" not in text
    config.write_text(text)
    return tiny


def saved_precision(tiny: Path, version: int = 0) -> Any:
    config = tiny / "runs" / "tiny" / f"version_{version}" / "config.yaml"
    return yaml.safe_load(config.read_text())["trainer"]["precision"]


def lines_with(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line]


@pytest.mark.parametrize(("rates", "expected"), [(WITH_16_BITS, "bf16-mixed"), (WITHOUT, "32-true")])
def test_the_fastest_is_taken_told_and_kept(
    free: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rates: dict[torch.dtype, float],
    expected: str,
) -> None:
    fake_rates(monkeypatch, rates)
    assert fit(free, "--trainer.max_steps", "2") == 0
    (line,) = lines_with(capsys.readouterr().out, "precision")
    assert line.startswith(f"precision {expected}: one core multiplies {rates[torch.float32] / 1e9:.3g} GFLOP/s in ")
    assert line.endswith(f", {rates[torch.bfloat16] / 1e9:.3g} in bfloat16")
    assert saved_precision(free) == expected
    summary = json.loads((free / "runs" / "tiny" / "version_0" / "summary.json").read_text())
    assert summary["precision"] == expected


@pytest.mark.medium
def test_a_saved_config_replays_the_precision(free: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rates(monkeypatch, WITH_16_BITS)
    assert fit(free, "--trainer.max_steps", "1") == 0
    fake_rates(monkeypatch, {torch.float32: 100e9, torch.bfloat16: 50e9, torch.float16: 1e9})
    config = free / "runs" / "tiny" / "version_0" / "config.yaml"
    assert main(["fit", "--config", str(config)]) == 0
    assert saved_precision(free, 1) == "bf16-mixed"
    assert main(["fit", "--config", str(config), "--trainer.precision", "null"]) == 0
    assert saved_precision(free, 2) == "32-true"


@pytest.mark.medium
def test_what_the_user_sets_is_obeyed_and_told_where_it_is_slow(
    free: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_rates(monkeypatch, WITHOUT)
    assert fit(free, "--trainer.max_steps", "1", "--trainer.precision", "bf16-mixed") == 0
    said = capsys.readouterr()
    assert lines_with(said.out, "precision") == ["precision bf16-mixed: as set"]
    assert lines_with(said.err, "precision") == [
        "warning: trainer.precision bf16-mixed multiplies matrices 300 times slower than 32-true on this processor: "
        "leave trainer.precision out (or set it to null)"
    ]
    assert saved_precision(free) == "bf16-mixed"
    assert fit(free, "--trainer.max_steps", "1", "--trainer.precision", "32") == 0
    said = capsys.readouterr()
    assert lines_with(said.out, "precision") == ["precision 32-true: as set"]
    assert not lines_with(said.err, "warning: trainer.precision")


@pytest.mark.medium
def test_a_run_goes_on_where_its_precision_is_slow(
    free: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_rates(monkeypatch, WITH_16_BITS)
    assert fit(free, "--trainer.max_steps", "10") == 0
    fake_rates(monkeypatch, WITHOUT)
    capsys.readouterr()
    assert fit(free, "--ckpt_path", "last", "--trainer.max_steps", "12") == 0
    assert "  trainer.precision: bf16-mixed → 32-true" in capsys.readouterr().out.splitlines()
    history = (free / "runs" / "tiny" / "version_0" / "history.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["differences"]["trainer.precision"] == ["bf16-mixed", "32-true"]
    # Back where 16 bits are twice as fast: this is not worth another curve.
    fake_rates(monkeypatch, WITH_16_BITS)
    assert fit(free, "--ckpt_path", "last", "--trainer.max_steps", "14") == 0
    said = capsys.readouterr().out
    assert "trainer.precision:" not in said
    assert lines_with(said, "precision") == ["precision 32-true: as before; a new run would take bf16-mixed here"]
    assert saved_precision(free) == "32-true"


def test_what_a_run_had_stays_unless_it_is_much_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rates(monkeypatch, WITH_16_BITS)
    assert choose("cpu").precision == choose("cpu", before="64-true").precision == "bf16-mixed"
    assert choose("cpu", before="32-true").precision == "32-true"  # half as fast
    fake_rates(monkeypatch, {**WITH_16_BITS, torch.bfloat16: 301e9})
    assert choose("cpu", before="32-true").precision == "bf16-mixed"


def test_a_task_that_only_measures_computes_in_the_type_of_its_weights() -> None:
    assert choose("cpu", trains=False).precision == "32-true"


def test_ranks_take_what_rank_zero_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rates(monkeypatch, WITHOUT)
    monkeypatch.setenv(RANK_ZEROS, "bf16-mixed")
    assert choose("cpu").precision == "bf16-mixed"


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, expected: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert choose("cuda").precision == expected


@pytest.mark.parametrize("kind", ["cuda", "mps", "tpu"])
def test_what_is_not_known_computes_in_float32(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose(kind).precision == "32-true"


def test_float64_is_never_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rates(monkeypatch, WITH_16_BITS)
    assert warning_of("64-true", torch.device("cpu")) is None
    assert "20 times slower than bf16-mixed" in str(warning_of("16-true", torch.device("cpu")))


def test_on_a_gpu_the_warning_of_float32_names_the_way_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "choose", lambda kind: precision.Choice("bf16-mixed", ""))
    monkeypatch.setattr(precision, "_slowdown", lambda *args: 12.0)
    said = {
        (name, kind): str(warning_of(name, torch.device(kind)))
        for name in ("32-true", "16-true")
        for kind in ("cuda", "cpu")
    }
    assert said["32-true", "cuda"].endswith(
        "(or set it to null), or allow TF32 with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1"
    )
    assert [key for key, text in said.items() if "TF32" in text] == [("32-true", "cuda")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("16-mixed", "trainer.precision 16-mixed needs a GPU, and this run is on a CPU: leave trainer.precision out"),
        ("16", "trainer.precision 16-mixed needs a GPU"),
        ("transformer-engine", "trainer.precision transformer-engine needs an NVIDIA GPU, and this run is on 'cpu'"),
        (
            "bf17",
            "--trainer.precision is bf17: choose one of 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true, or null",
        ),
    ],
)
def test_a_precision_that_no_device_here_has(
    tiny: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert message in error_of(capsys, "fit", "--config", str(tiny / "tiny.yaml"), "--trainer.precision", name)
    assert not (tiny / "runs").exists()


def test_an_apple_gpu_has_no_float64() -> None:
    with pytest.raises(ValueError, match=r"trainer\.precision 64-true needs float64, which Apple's GPUs lack"):
        check_precision("64-true", "mps")


def test_the_device_is_the_one_that_the_trainer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.fabric.utilities.device_parser._select_auto_accelerator", lambda: "cuda")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert [kind_of_device(name) for name in ("cpu", "auto", "gpu", "mps")] == ["cpu", "cuda", "cuda", "mps"]
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert kind_of_device("gpu") == "mps"


def test_an_accelerator_is_also_known_by_its_class(free: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.accelerators import CPUAccelerator

    assert kind_of_device(CPUAccelerator()) == "cpu"
    fake_rates(monkeypatch, WITH_16_BITS)
    text = (free / "tiny.yaml").read_text()
    path = "{class_path: lightning.pytorch.accelerators.CPUAccelerator}"
    (free / "tiny.yaml").write_text(text.replace("accelerator: cpu", f"accelerator: {path}"))
    assert fit(free, "--trainer.max_steps", "1") == 0
    assert saved_precision(free) == "bf16-mixed"


def test_a_plugin_decides_alone(free: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = "{class_path: lightning.pytorch.plugins.DoublePrecision}"
    assert fit(free, "--trainer.max_steps", "1", "--trainer.plugins", plugin) == 0
    assert not lines_with(capsys.readouterr().out, "precision ")
    assert saved_precision(free) is None


def test_ranks_that_would_differ_are_stopped() -> None:
    record: Any = RunRecord(parser=Any, config=Any)
    strategy = SimpleNamespace(broadcast=lambda mine: "bf16-mixed")
    trainer: Any = SimpleNamespace(precision="32-true", global_rank=1, strategy=strategy)
    with pytest.raises(
        ValueError, match=r"rank 1 computes in 32-true, rank 0 in bf16-mixed, .*: set trainer\.precision"
    ):
        record.setup(trainer, None, "fit")


def test_the_ranks_of_a_machine_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(RankLauncher, "_call_children_scripts", lambda self: told.append(os.environ.get(RANK_ZEROS)))
    trainer: Any = SimpleNamespace(precision="bf16-mixed")
    RankLauncher(LightningEnvironment(), 1, 1).launch(lambda: None, trainer=trainer)
    assert told == ["bf16-mixed"] and RANK_ZEROS not in os.environ


@pytest.mark.parametrize(("rates", "expected"), [(WITH_16_BITS, "bf16-mixed"), (WITHOUT, "32-true")])
def test_a_plan_takes_what_the_run_would_take(
    free: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rates: dict[torch.dtype, float],
    expected: str,
) -> None:
    fake_rates(monkeypatch, rates)
    assert main(["plan", "--config", str(free / "tiny.yaml")]) == 0
    said = capsys.readouterr().out
    assert f"MiB on a device, {expected}" in said
    assert (f"note: the run computes in {expected}, the fastest on this CPU; " in said) == (expected == "32-true")
    # Accelerators multiply in 16 bits, whatever this machine is.
    assert main(["plan", "--config", str(free / "tiny.yaml"), "--trainer.accelerator", "gpu"]) == 0
    assert "MiB on a device, bf16-mixed" in capsys.readouterr().out


def test_lightning_still_has_the_private_choice_of_an_accelerator() -> None:
    from lightning.fabric.utilities.device_parser import _select_auto_accelerator

    trainer = Trainer(accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
    assert _select_auto_accelerator() == trainer.strategy.root_device.type


def test_a_type_that_is_fast_in_the_forward_pass_only_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {
        torch.float32: ProductRate(100e9, 100e9, exact=True),
        torch.bfloat16: ProductRate(200e9, 50e9, exact=True),
        torch.float16: ProductRate(1e9, 1e9, exact=True),
    }
    for module in ("device", "training.precision"):
        monkeypatch.setattr(f"lightning_danube.{module}.product_rate", lambda dtype, device="cpu": rates[dtype])
    assert choose("cpu").precision == "32-true"


def test_a_task_that_only_measures_stays_in_float32_where_16_bits_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rates(monkeypatch, WITH_16_BITS)
    assert choose("cpu", trains=False).precision == "32-true"
    assert choose("cpu").precision == "bf16-mixed"


def test_an_emulated_bfloat16_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose("cuda").precision == "32-true"
