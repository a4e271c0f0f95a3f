"""The summary of a run holds the facts that the model knows, also if the run was stopped in between."""

import json
import re
from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from lightning_danube.text.embedded import world

ROOT = Path(__file__).resolve().parents[2]


def world_run(tmp_path: Path, *options: str) -> int:
    text = (ROOT / "configs/pretrain/world.yaml").read_text()
    for old, new in (
        ("442368", "2K"), ("191488", "1K"), ("103424", "1K"), ("warmup: 40K", "warmup: 0"), 
        ("every_n_steps: 200", "every_n_steps: 1"), 
        ("hidden_size: 128", "hidden_size: 16"), ("intermediate_size: 384", "intermediate_size: 16"),
        ("held_out: 0.02", f"held_out: 0.1\n    cache_dir: {tmp_path / 'cache'}"),
    ):  # fmt: skip
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "world.yaml").write_text(text)
    return main(["fit", "--config", str(tmp_path / "world.yaml"), "--runs", str(tmp_path / "runs"), *options])


@pytest.mark.medium
def test_a_run_tells_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world, "DOCUMENTS", {"clean": 200, "noisy": 200})
    assert world_run(tmp_path, "--name", "whole") == 0
    whole = json.loads((tmp_path / "runs/whole/version_0/summary.json").read_text())["recall"]
    assert set(whole) == {"clean", "noisy", "both", "all", "guessing", "commonest", "n"} and 0 <= whole["all"] < 0.2
    said = re.findall(r"facts known: clean .* all (\d+)% \(by the commonest answer 8%\)", capsys.readouterr().out)
    # One line after each of the three stages.
    assert len(said) == 3 and said[-1] == f"{100 * whole['all']:.0f}"
    # Stopped after the last validation but one, and resumed.
    assert world_run(tmp_path, "--name", "parts", "--trainer.max_steps", "3") == 0
    assert world_run(tmp_path, "--name", "parts", "--ckpt_path", "last") == 0
    summary = json.loads((tmp_path / "runs/parts/version_0/summary.json").read_text())
    assert summary["recall"] == whole


def test_another_tokenizer_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny / "tiny.yaml"
    config.write_text(
        config.read_text().replace(
            "callbacks:\n", "callbacks:\n    - class_path: lightning_danube.callbacks.FactRecall\n"
        )
    )
    assert main(["fit", "--config", str(config)]) == 2
    assert "FactRecall asks in words of the made-up world, data.tokenizer is 'danube-small'" in capsys.readouterr().err
