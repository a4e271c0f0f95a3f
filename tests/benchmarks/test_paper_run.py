"""Configurations of the paper's runs on made-up text, and the callback that measures their steps."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def paper_run(benchmarks_on_path: None) -> Any:
    import paper_run

    return paper_run


@pytest.mark.parametrize("name", ["danube3-500m", "danube3-4b"])
def test_only_sources_length_and_device_are_others(paper_run: Any, name: str, tmp_path: Path) -> None:
    import yaml

    published = yaml.safe_load((paper_run.ROOT / "configs" / "pretrain" / f"{name}.yaml").read_text())
    config = paper_run.configuration(name, tmp_path, steps=14, device="cuda", recorder={"steps": 10})
    before, after = published["data"]["init_args"], config["data"]["init_args"]
    assert after["context_length"] == 8192 and after["tokenizer"] == "mistral"
    assert after["micro_batch_size"] == before["micro_batch_size"]
    assert after["batch_tokens"] == 8192 * before["micro_batch_size"]
    assert after["stages"][0]["tokens"] == 14 * after["batch_tokens"]
    model = {key: value for key, value in config["model"]["init_args"].items() if key != "learning_rate"}
    assert model == {key: value for key, value in published["model"]["init_args"].items() if key != "learning_rate"}
    *callbacks, recorder = config["trainer"]["callbacks"]
    assert callbacks == published["trainer"]["callbacks"]
    assert recorder == {"class_path": "paper_run.StepRecorder", "init_args": {"steps": 10}}
    assert config["trainer"]["precision"] == "bf16-mixed" and config["trainer"]["accelerator"] == "gpu"
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len(set(texts)) == len(texts) >= 40


def test_plan_reads_the_run_and_tells_its_memory(paper_run: Any, tmp_path: Path) -> None:
    from lightning_danube.model import PRESETS
    from lightning_danube.planning.memory import TrainingMemory

    config = paper_run.configuration("danube3-500m", tmp_path, steps=3, device="cuda")
    file = paper_run.write_configuration(config, tmp_path / "config.yaml")
    planned = paper_run.planned_gib(file)
    alone = TrainingMemory(PRESETS["danube3-500m"], 6, 8192, "bf16-mixed", gpu=True, compiled=True).peak().total / 2**30
    assert planned == pytest.approx(alone, abs=0.01)


def test_memory_is_read_from_plans_table(paper_run: Any) -> None:
    assert paper_run.planned_of("GiB on a device, bf16-mixed  one\nin all  1,060.93\n") == 1060.93
    assert paper_run.planned_of("MiB on a device, 32-true  one\nin all  512.00\n") == 0.5
    assert paper_run.planned_of("nothing") is None


def test_a_variant_that_the_task_does_not_know_is_left_out(paper_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(paper_run.VARIANTS, "made up", {"no_such_argument": 1})
    known = paper_run.known_variants()
    assert {"as configured", "eager", "compiled"} <= set(known) and "made up" not in known


def finished(paper_run: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[Any, list[int]]:
    """Returns a recorder that keeps its report, after as many steps as it wants, and where it was finished."""
    import steps

    recorder = paper_run.StepRecorder(**arguments)
    recorder.report = steps.Kept()
    ended: list[int] = []
    monkeypatch.setattr(recorder, "finish", lambda: ended.append(len(recorder.ends)))
    data = SimpleNamespace(context_length=64)
    config = SimpleNamespace(flops_per_token=lambda context: 10 * context)
    task = SimpleNamespace(device=torch.device("cpu"), config=config)
    batch = {"input_ids": torch.zeros(2, 64), "labels": torch.zeros(2, 64)}
    for step in range(1, 9):
        trainer = SimpleNamespace(datamodule=data, global_step=step)
        recorder.on_train_batch_start(trainer, task, batch, step - 1)
        torch.ones(8, 8) @ torch.ones(8, 8)
        recorder.on_train_batch_end(trainer, task, {"loss": torch.tensor(float(step))}, batch, step - 1)
        if ended:
            break
    return recorder, ended


def test_the_recorder_measures_after_two_steps_and_profiles_two_more(
    paper_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, ended = finished(paper_run, monkeypatch, steps=3)
    assert ended == [2 + 3 + 2]
    measured = recorder.report.measured
    assert measured["steps"] == 3 and measured["loss_first"] == 1 and measured["loss_last"] == 5
    assert measured["tokens_per_second"] * measured["seconds_a_step"] == pytest.approx(128)
    assert measured["least"] <= measured["tokens_per_second"] <= measured["most"]
    assert any(row["kernel"] == "aten::mm" for row in measured["rows"])
    recorder, ended = finished(paper_run, monkeypatch, steps=3, profile=False)
    assert ended == [5] and "rows" not in recorder.report.measured


def test_the_recorder_of_a_whole_run_tells_each_loss_and_stops_at_a_step(
    paper_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(paper_run.os, "kill", lambda *which: killed.append(which))
    recorder, ended = finished(paper_run, monkeypatch, stop_after=2)
    assert not ended and len(killed) == 1 and killed[0][1] == paper_run.signal.SIGTERM
    assert recorder.report.measured["rows"] == [{"step": step, "loss": float(step)} for step in range(1, 9)]


def test_padding_is_not_counted(paper_run: Any) -> None:
    ids = torch.zeros(2, 5)
    assert paper_run.tokens_of({"input_ids": ids, "labels": ids}) == 10
    # Rows of a pre-training run count from 0, and have no padding.
    assert paper_run.tokens_of({"input_ids": ids, "labels": ids, "document_ids": ids}) == 10
    assert paper_run.tokens_of({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}) == 3
    packed = {"input_ids": ids, "document_ids": torch.tensor([[1, 2, 2, 0, 0]]), "position_ids": ids}
    assert paper_run.tokens_of(packed) == 3
