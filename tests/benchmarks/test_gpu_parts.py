"""The parts of the benchmark on a GPU: which rows fit, what runs again, what is left out; and each part on a CPU."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parts(benchmarks_on_path: None) -> Any:
    import gpu_parts

    return gpu_parts


def test_as_many_rows_as_fit(parts: Any) -> None:
    def bytes_of(rows: int) -> int:
        return (10 + 5 * rows) * 2**30

    assert parts.most_rows(bytes_of, 6, 100 * 2**30) == (6, 40)
    assert parts.most_rows(bytes_of, 6, 26 * 2**30) == (3, 25)
    assert parts.most_rows(bytes_of, 6, 14 * 2**30) == (0, 15)


def test_rows_on_a_card_of_80_gb_are_those_of_the_plan(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the driver of an H100 tells: 81,559 MiB.
    memory = SimpleNamespace(total_memory=81559 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    rows, gib = parts.rows_that_fit("danube3-500m", False, {"rehearse": False})
    assert rows == 6 and gib < 0.9 * 80
    # Without recomputation not a single row of the 4B fits.
    rows, gib = parts.rows_that_fit("danube3-4b", False, {"rehearse": False})
    assert rows == 0 and gib > 80
    rows, gib = parts.rows_that_fit("danube3-4b", True, {"rehearse": False})
    assert rows >= 1 and gib < 0.9 * 80


class FakeProcess:
    """Ends as `ends` says: name of the contestant and rows → exit code and what was measured."""

    ends: ClassVar[dict[tuple[str, int], tuple[int | None, dict[str, Any]]]] = {}
    begun: ClassVar[list[tuple[str, int]]] = []
    alive = 0

    def __init__(self, *arguments: Any) -> None:
        self.measured: dict[str, Any] = {}
        self.tail = "the end\n"
        FakeProcess.alive += 1
        self.ended = False

    def begin(self, work: Any) -> None:
        self.work = work["step"], work["options"]["micro_batch_size"]
        self.begun.append(self.work)

    def wait(self, seconds: float) -> int | None:
        code, self.measured = self.ends[self.work]
        return code

    def end(self) -> None:
        if not self.ended:
            FakeProcess.alive -= 1
        self.ended = True


def test_a_contestant_out_of_memory_takes_half_the_rows_and_a_failed_one_is_named(
    parts: Any, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "Process", FakeProcess)
    monkeypatch.setattr(FakeProcess, "begun", [])
    monkeypatch.setattr(
        FakeProcess,
        "ends",
        {
            ("big", 4): (1, {"out_of_memory": "no", "error": "OutOfMemoryError"}),
            ("big", 2): (1, {"out_of_memory": "no", "error": "OutOfMemoryError"}),
            ("big", 1): (0, {"tokens_per_second": 7}),
            ("bad", 4): (3, {}),
            ("good", 4): (0, {"tokens_per_second": 9}),
        },
    )
    with pytest.raises(RuntimeError, match=r"^failed: bad$"):
        parts.contest(report, {"scratch": ".", "seconds": 5}, ["big", "bad", "good"], (), micro_batch_size=4)
    assert FakeProcess.begun == [("big", 4), ("big", 2), ("big", 1), ("bad", 4), ("good", 4)]
    assert FakeProcess.alive == 0
    assert report.measured["rows"] == [
        {"contestant": "big", "micro_batch_size": 1, "tokens_per_second": 7},
        {"contestant": "bad", "micro_batch_size": 4, "error": "exit code 3"},
        {"contestant": "good", "micro_batch_size": 4, "tokens_per_second": 9},
    ]


def test_a_peer_that_is_not_installed_is_named_and_left_out(
    parts: Any, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(parts, "contest", lambda report, options, names, libraries, **more: asked.append(names))
    monkeypatch.setattr(parts, "is_installed", lambda name: False)
    parts.training("danube3-500m", report, {"rehearse": True})
    assert report.measured["litgpt"] == "left out: not installed"
    assert report.measured["float8"] == "left out: torchao is not installed"
    monkeypatch.setattr(parts, "is_installed", lambda name: True)
    parts.training("danube3-500m", report, {"rehearse": True})
    assert {"LitGPT, compiled", "danube, compiled, float8"} == set(asked[1]) - set(asked[0])
    for names in asked:
        assert "danube, as configured" in names and "transformers" in names
        # The way that is configured runs once.
        assert len({"danube, eager", "danube, compiled"} & set(names)) == 1
    known = {step.name for step in parts.contestants()}
    assert {name for names in asked for name in names} <= known


def test_a_model_that_does_not_fit_is_left_out(parts: Any, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "rows_that_fit", lambda *arguments: (0, 98.6))
    parts.training("danube3-4b", report, {"rehearse": False})
    assert report.measured["left_out"].startswith("one row needs 98.6 GiB")


def test_a_peers_steps_are_timed_after_two(parts: Any, report: Any) -> None:
    taken: list[int] = []

    def step(number: int) -> int:
        taken.append(number)
        return 100 if number < 2 else 40

    parts.timed(step, 3, report, "cpu")
    assert taken == [0, 1, 2, 3, 4]
    measured = report.measured
    assert measured["steps"] == 3
    assert measured["tokens_per_second"] * measured["seconds_a_step"] == pytest.approx(40)

    def full(number: int) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    with pytest.raises(torch.OutOfMemoryError):
        parts.timed(full, 3, report, "cpu")
    assert report.measured["out_of_memory"] == "CUDA out of memory."


def test_conversations_are_mostly_short_and_some_fill_the_row(parts: Any) -> None:
    lengths = parts.chat_lengths(2048, 1000)
    assert len(lengths) == 1000 and min(lengths) >= 8 and max(lengths) == 512
    assert sorted(lengths)[500] < 0.3 * max(lengths)


def test_a_part_that_this_commit_has_measured_is_not_measured_again(
    parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "about", lambda rehearse: {"commit": "abc1234"})
    monkeypatch.setattr(parts, "WHEELS", tmp_path / "none")
    ran: list[str] = []

    def run_steps(steps: Any, out: Path, name: str, **more: Any) -> list[dict[str, Any]]:
        ran.append(name)
        record = {"ok": steps[0].name != "chats"}
        (out / f"{name}.jsonl").write_text(json.dumps({"about": {}}) + "\n" + json.dumps(record) + "\n")
        (out / f"{name}.md").write_text(f"the table of {name}\n")
        return [record]

    monkeypatch.setattr(parts, "run_steps", run_steps)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_parts.py", "--rehearse", "--out", str(tmp_path), *arguments])
        return int(parts.main())

    assert run("decoding", "chats") == 1
    assert run("decoding", "chats") == 1
    # A part that has failed runs again.
    names = [f"{name}-abc1234-rehearsal" for name in ("decoding", "chats", "chats")]
    assert ran == names
    assert "decoding: is measured at commit abc1234; --again measures it again" in capsys.readouterr().out
    assert run("decoding", "--again") == 0 and ran[-1] == "decoding-abc1234-rehearsal"
    page = (tmp_path / "tables-rehearsal.md").read_text()
    # Where the commit is not known, no result is known to be of it.
    monkeypatch.setattr(parts, "about", lambda rehearse: {"commit": parts.UNKNOWN})
    assert run("decoding") == run("decoding") == 0 and ran[-2:] == ["decoding-unknown-rehearsal"] * 2
    assert "## decoding" in page and "the table of chats-abc1234-rehearsal" in page and "## attention" not in page


def test_attention_of_a_decoding_step_has_rows_too(parts: Any, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import attention_kernels

    monkeypatch.setattr(attention_kernels, "_compiled_sums", lambda: attention_kernels.sums)
    parts.attention(report, {"rehearse": True})
    rows = report.measured["rows"]
    assert {"attend_once", "blocked_attention"} <= {row["kernel"] for row in rows}
    assert all(row["gb_per_second"] > 0 for row in rows if row["kernel"].startswith("attend_once"))


@pytest.mark.slow
def test_the_rehearsal_passes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    page = (tmp_path / "tables-rehearsal.md").read_text()
    assert done.returncode == 0, (done.stdout[-3000:], page)
    for contestant in ("danube, as configured", "transformers", "danube, packed chats", "danube, classification"):
        assert f"| {contestant} |" in page
    assert not list(tmp_path.glob("tables.md"))
