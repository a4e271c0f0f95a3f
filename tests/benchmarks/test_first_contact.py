"""The steps of the first minutes on a GPU, with tiny shapes on a CPU, and what each can notice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.model import Decoder

ROOT = Path(__file__).parents[2]
REHEARSAL = {"rehearse": True}


@pytest.fixture
def contact(benchmarks_on_path: None) -> Any:
    import first_contact

    return first_contact


def test_correctness_holds_on_this_device(contact: Any, report: Any) -> None:
    contact.correctness(report, REHEARSAL)
    rows = report.measured["rows"]
    assert [(row["documents"], row["precision"]) for row in rows] == [
        (documents, precision) for documents in (False, True) for precision in ("float32", "bf16")
    ]
    assert all(row["ok"] and row["attention"] for row in rows)


@pytest.mark.medium
def test_correctness_notices_documents_that_see_each_other(
    contact: Any, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_danube.model import Decoder

    seeing = Decoder.hidden_states

    def blind_in_float64(self: Any, ids: Any, document_ids_BT: Any = None, document_runs: Any = None) -> Any:
        return seeing(self, ids, document_ids_BT=document_ids_BT if ids.dtype == torch.long and self.exact else None)

    monkeypatch.setattr(Decoder, "hidden_states", blind_in_float64)
    monkeypatch.setattr(Decoder, "exact", property(lambda self: self.activation_dtype == torch.float64), raising=False)
    with pytest.raises(RuntimeError, match=r"float32, documents True, compiled False; bf16, documents True"):
        contact.correctness(report, REHEARSAL)
    assert [row["ok"] for row in report.measured["rows"]] == [True, True, False, False]


@pytest.mark.medium
def test_failing_tests_of_compiled_steps_are_reported(
    contact: Any, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "print('7 tests were run'); raise SystemExit(1)"
    batch = contact.tiny_batch
    monkeypatch.setattr(contact, "device_of", lambda options: "cpu")
    monkeypatch.setattr(contact, "tiny_batch", lambda tokens, documents: batch(24, documents))
    monkeypatch.setattr(Decoder, "compile_blocks", lambda decoder: None)
    monkeypatch.setattr(
        contact,
        "begin_tests_of_compiled_steps",
        lambda: subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True),
    )
    with pytest.raises(RuntimeError, match="wrong: tests/generation/test_compiled_steps"):
        contact.correctness(report, {**REHEARSAL, "rehearse": False})
    assert report.measured["tests_of_compiled_steps"] == "7 tests were run"
    assert [row["compiled"] for row in report.measured["rows"]] == 2 * [False, False, True]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("aten::_scaled_dot_product_flash_attention", "flash_attention"),
        ("aten::_scaled_dot_product_cudnn_attention", "cudnn_attention"),
        ("aten::_scaled_dot_product_flash_attention_backward", None),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<96>>", "flash_fwd_kernel"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "fmha_cutlassF_bf16_aligned_64x128_rf_sm80"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"),
        ("aten::mm", None),
    ],
)
def test_attention_is_told_by_its_operators_and_kernels(contact: Any, key: str, name: str | None) -> None:
    assert contact.attention_name(key) == name


def test_attention_has_a_row_for_each_kernel(contact: Any, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import attention_kernels

    def refuse(*tensors: Any) -> None:
        raise RuntimeError("no kernel for 120 channels\nand more")

    found = attention_kernels.kernels("cpu", 2)
    monkeypatch.setattr(attention_kernels, "kernels", lambda device, groups: {**found, "other": refuse})
    contact.attention(report, REHEARSAL)
    *rows, last = report.measured["rows"]
    assert [row["kernel"] for row in rows] == list(found) and all(row["ms"] >= 0 for row in rows)
    assert last["ms"] is None and last["why"] == "no kernel for 120 channels"


def test_all_losses_are_of_the_same_value(contact: Any, report: Any) -> None:
    contact.loss(report, REHEARSAL)
    rows = report.measured["rows"]
    assert {"as configured", "chunks of 1,024", "chunks of 8,192"} <= {row["loss"] for row in rows}
    # Sums of float32 in another order.
    assert max(row["nats"] for row in rows) == pytest.approx(min(row["nats"] for row in rows), rel=1e-5)


def test_documents_as_configured_are_those_of_a_dense_mask(contact: Any, report: Any) -> None:
    contact.documents(report, REHEARSAL)
    assert [row["masks"] for row in report.measured["rows"]] == ["none", "as configured", "blocks", "dense"]
    assert max(report.measured[f"{name}_beside_dense"] for name in ("as_configured", "blocks")) < 1e-2
    packed = contact.packed_documents(2, 960)
    assert packed.shape == (2, 960) and (packed.diff() >= 0).all() and not packed[:, 0].any()
    # A document in 80 tokens: 12 a row on average, and the seed is fixed.
    assert 6 <= int(packed.max()) <= 20


@pytest.mark.parametrize("way", ["as configured", "blocks"])
def test_documents_that_see_each_other_are_noticed(
    contact: Any, report: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = contact.ways_to_mask

    def blind(decoder: Any, packed: Any) -> Any:
        return {**ways(decoder, packed), way: lambda ids: decoder.hidden_states(ids)}

    monkeypatch.setattr(contact, "ways_to_mask", blind)
    with pytest.raises(RuntimeError, match=f"{way}: the hidden states differ by"):
        contact.documents(report, REHEARSAL)


def test_decoding_runs_each_way_twice(contact: Any, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_danube.generation import compiled_steps

    monkeypatch.setattr(compiled_steps, "CompiledStep", lambda decoder: None)
    contact.decoding(report, REHEARSAL)
    rows = report.measured["rows"]
    assert [(row["generation"], row["run"]) for row in rows] == [
        ("as written", 1), ("as written", 2), ("compiled", 1), ("compiled", 2)
    ]  # fmt: skip
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_a_resume_is_compared_step_by_step(contact: Any) -> None:
    whole = {1: 5.0, 2: 4.0, 3: 3.0}
    found = contact.compare_resumed(whole, {1: 5.0, 2: 4.0}, {3: 3.0}, total=3, stop=2)
    assert found == {"losses_equal_bit_by_bit": True, "largest_difference": 0.0, "steps": 3}
    found = contact.compare_resumed(whole, {1: 5.0, 2: 4.0}, {3: 3.0003}, total=3, stop=2)
    assert not found["losses_equal_bit_by_bit"] and found["largest_difference"] == pytest.approx(1e-4)
    for stopped, resumed, why in (
        ({1: 5.0, 2: 4.0}, {3: 3.1}, "differ by up to 0.033"),
        ({1: 5.0, 2: 4.0}, {2: 4.0, 3: 3.0}, r"steps \[1, 2\] came before the stop, and \[2, 3\] after"),
        ({1: 5.0}, {2: 4.0, 3: 3.0}, "came before the stop"),
    ):
        with pytest.raises(RuntimeError, match=why):
            contact.compare_resumed(whole, stopped, resumed, total=3, stop=2)
    with pytest.raises(RuntimeError, match="the whole run trained steps"):
        contact.compare_resumed({1: 5.0}, {1: 5.0}, {}, total=3, stop=1)


def test_only_what_extras_bring_may_be_missing(contact: Any) -> None:
    assert contact.may_be_missing("no bitsandbytes") and contact.may_be_missing("needs lm_eval, which is not installed")
    assert not contact.may_be_missing("no jsonargparse") and not contact.may_be_missing("no jinja")


def test_packages_that_are_here_are_not_taken_from_wheels(contact: Any, tmp_path: Path) -> None:
    (tmp_path / "torch-1.0-py3-none-any.whl").touch()
    with contact.carried_packages(tmp_path) as site:
        assert site is None


@pytest.mark.medium
def test_a_missing_package_comes_from_its_wheel(contact: Any, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "no_such_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("no_such_package.py", "value = 7\n")
        wheel.writestr(
            "no_such_package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: no-such-package\nVersion: 1.0\n"
        )
        wheel.writestr(
            "no_such_package-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("no_such_package-1.0.dist-info/RECORD", "")
    with contact.carried_packages(tmp_path) as site:
        assert (Path(site) / "no_such_package.py").read_text() == "value = 7\n"
        assert site in contact.environment_of(site, "scratch", True)["PYTHONPATH"].split(os.pathsep)
    assert not Path(site).exists()


def test_without_a_gpu_it_says_so(
    contact: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["first_contact.py"])
    monkeypatch.setattr(contact.shutil, "which", lambda name: None)
    if Path("/dev/nvidia0").exists():
        pytest.skip("no GPU may be here, and one is: no GPU is missing")
    assert contact.main() == 2
    assert capsys.readouterr().err == "error: there is no NVIDIA GPU here; --rehearse runs the steps on this CPU\n"


@pytest.mark.slow
def test_the_rehearsal_passes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "first_contact.py"), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    assert done.returncode == 0, (done.stdout, [line for line in lines[1:] if not line["ok"]])
    assert len(lines) == 10
    measured = {line["step"]: line["measured"] for line in lines[1:]}
    assert measured["resume"]["losses_equal_bit_by_bit"] and measured["resume"]["code_of_the_stopped"] == 75
    assert measured["fit"]["plan_gib"] > 0 and measured["fit"]["tokens_per_second"] > 0
    assert measured["fit, the other way"]["variant"] in ("compiled", "eager")
