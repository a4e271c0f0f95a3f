"""Which part `prepare` makes, and the table it prints. What it writes: tests/tokens/test_preparation.py."""

from pathlib import Path
from typing import Any

import pytest

from lightning_danube.__main__ import main
from lightning_danube.cli.verbs.prepare import _part, _summary


@pytest.mark.parametrize(("text", "part"), [(None, None), ("1/1", (1, 1)), ("2/8", (2, 8)), ("8/8", (8, 8))])
def test_parts_are_counted_from_one(text: str | None, part: tuple[int, int] | None) -> None:
    assert _part(text) == part


@pytest.mark.parametrize("text", ["0/8", "9/8", "8", "1/0", "-1/8", "1/8/2", "a/b"])
def test_a_part_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--shard is '{text}': give part and parts, counted from 1, such as 2/8"):
        _part(text)


REPORT: dict[str, Any] = {
    "source": "web",
    "documents": 1200,
    "tokens": 60_000,
    "bytes_per_token": 4.256,
    "rejected": {"not JSON": 3, "empty": 2},
    "first_rejected": ["web.jsonl, row 7: not JSON"],
    "filtered": {"short": 7},
    "duplicates": {"exact": 5, "near": 4},
    "contaminated": 6,
    "seconds": 2.0,
    "seconds_of_all_processes": 8.0,
    "pieces_of_long_documents": 0,
    "benchmarks": [
        {"file": "arc.jsonl", "rows": 100, "rows_found": 2, "documents": 6},
        {"file": "gsm.jsonl", "rows": 100, "rows_found": 0, "documents": 0},
    ],
}


def test_the_table_counts_what_was_left_out(tmp_path: Path) -> None:
    there = {**REPORT, "source": "wiki", "rejected": {}, "first_rejected": [], "benchmarks": []}
    said = _summary([(tmp_path / "web", REPORT), (tmp_path / "wiki", there)], {"web": 2.0, "wiki": 0.0})
    lines = said.splitlines()
    assert lines[2].split() == ["web", "1,200", "60,000", "4.26", "5", "7", "9", "6", "2.0", "7,500"]
    # Shards that were there took no time now.
    assert lines[3].split() == ["wiki", "1,200", "60,000", "4.26", "0", "7", "9", "6", "there"]
    assert "  rejected: not JSON 3, empty 2" in lines and "    web.jsonl, row 7: not JSON" in lines
    assert "  2 of 100 rows of arc.jsonl stood in 6 documents, now removed" in lines and "gsm.jsonl" not in said


def test_near_duplicates_that_hold_equal_texts_are_counted_once(tmp_path: Path) -> None:
    """The report of datatrove."""
    said = _summary([(tmp_path / "web", {**REPORT, "duplicates": {"near": 9}})], {"web": 2.0})
    assert said.splitlines()[2].split()[6] == "9"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--executor ray", "--executor is for --engine datatrove: add it, or leave --executor out"),
        ("--tasks 3", "--tasks is for --engine datatrove: add it, or leave --tasks out"),
        ("--slurm time=1", "--slurm is for --engine datatrove: add it, or leave --slurm out"),
        ("--engine datatrove --shard 1/2", "--shard is for the own engine: datatrove deals out its tasks itself"),
    ],
)
def test_options_of_the_other_engine_are_refused(
    options: str, said: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--config", str(tiny / "tiny.yaml"), *options.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.datatrove
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tasks 0", "--tasks is 0: give 1 to 50,000"),
        ("--tasks 60000", "--tasks is 60000: give 1 to 50,000"),
        ("--slurm time=1", "--slurm is for --executor slurm, and the executor is local: leave it out"),
        ("--executor slurm", "--executor slurm needs --slurm partition=…"),
        ("--executor slurm --slurm partition=cpu", "--executor slurm needs --slurm time=…"),
        ("--executor slurm --slurm partition", "--slurm is 'partition': give an option of sbatch and its value, such"),
        (
            "--executor slurm --slurm partition=cpu --slurm time=1 --slurm array=1",
            "--slurm array=1: prepare sets this option itself",
        ),
    ],
)
def test_options_of_datatrove_that_do_not_fit_are_refused(
    options: str, said: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--config", str(tiny / "tiny.yaml"), "--engine", "datatrove", *options.split()]) == 2
    assert said in capsys.readouterr().err
