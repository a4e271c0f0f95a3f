"""Academic tasks by name, and their questions in files laid out as on the hub."""

import json
from pathlib import Path

import pytest

from lightning_danube.evaluation.academic_tasks import PAPER_TASKS, academic_tasks, read_split, split_files


def test_the_papers_tasks_have_its_shots() -> None:
    shots = {task.title: task.shots for task in PAPER_TASKS}
    assert shots == {
        "ARC-c": 25,
        "HellaSwag": 10,
        "MMLU": 5,
        "TruthfulQA": 0,
        "Winogrande": 5,
        "GSM8K": 5,
        "ARC-e": 25,
        "BBH": 3,
        "CommonsenseQA": 3,
        "CoQA": 0,
        "PIQA": 3,
        "SciQ": 3,
    }
    assert [task.name for task in PAPER_TASKS if task.metric == "acc_norm"] == ["arc_challenge", "hellaswag"]
    assert [task.name for task in academic_tasks(["piqa", "mmlu"])] == ["piqa", "mmlu"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["helaswag"], "data.tasks names 'helaswag': did you mean hellaswag\\?"),
        (["BBH"], "data.tasks names 'BBH': did you mean bbh_cot_fewshot\\?"),
        (["physics"], "data.tasks names 'physics': .*there are arc_challenge, hellaswag"),
        (["piqa", "piqa"], "data.tasks names piqa twice"),
    ],
)
def test_an_unknown_task_is_told_with_the_one_that_is_meant(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        academic_tasks(names)


def test_files_stand_where_a_copy_of_the_hub_has_them(tmp_path: Path) -> None:
    folder = tmp_path / "allenai" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    names = [
        "test-00000-of-00002.parquet",
        "test-00001-of-00002.parquet",
        "train.jsonl.zst",
        "testing.jsonl",
        "test.md",
    ]
    for name in names:
        (folder / name).touch()
    assert [file.name for file in split_files(tmp_path, "allenai/ai2_arc", "ARC-Easy", "test")] == names[:2]
    assert [file.name for file in split_files(tmp_path, "allenai/ai2_arc", "ARC-Easy", "train")] == names[2:3]
    assert split_files(tmp_path, "baber/piqa", None, "test") == []


def test_files_of_a_data_set_without_a_name_stand_in_data(tmp_path: Path) -> None:
    file = tmp_path / "Rowan" / "hellaswag" / "data" / "validation-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    file.touch()
    assert split_files(tmp_path, "Rowan/hellaswag", None, "validation") == [file]
    assert split_files(tmp_path, "Rowan/hellaswag", "other", "validation") == []
    (above := tmp_path / "Rowan" / "hellaswag" / "validation.jsonl").touch()
    assert split_files(tmp_path, "Rowan/hellaswag", None, "validation") == [above]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"a": 1}', "{"], "row 2: not JSON"),
        (['{"a": 1}', "[1]"], "row 2: expected an object, found list"),
        (['{"a": 1, "b": 2}', '{"a": 1}'], "row 2: the column 'b' is missing, which the first row has"),
        (['{"a": 1}', '{"a": 1, "c": 2}'], "row 2: the column 'c' is not in the first row"),
        ([], "there are no rows"),
    ],
)
def test_a_bad_row_is_named(lines: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=message) as error:
        read_split([file])
    assert str(file) in str(error.value)


def test_lines_end_where_json_says_so(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    # U+2028 ends a line for str.splitlines, and does not for JSON.
    file.write_text(json.dumps({"text": "one\u2028line"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_split([file]) == [{"text": "one\u2028line"}]
