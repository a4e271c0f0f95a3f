"""Rows of any source as objects, with the place where each stands."""

import json
from pathlib import Path

import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.text.objects import read_objects

ROWS = [{"question": "Why?", "n": 1}, {"question": "How?", "n": 2}]


def test_objects_name_their_file_and_row_from_one(tmp_path: Path) -> None:
    for name, rows in {"a": ROWS, "b": ROWS[:1]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_objects("src", Source(str(tmp_path)), tmp_path))
    assert found == [
        (str(tmp_path / "a.jsonl"), 1, ROWS[0]),
        (str(tmp_path / "a.jsonl"), 2, ROWS[1]),
        (str(tmp_path / "b.jsonl"), 1, ROWS[0]),
    ]


def test_objects_of_a_stream_are_numbered_from_one(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert list(read_objects("src", Source(path), tmp_path)) == [(path, 1, ROWS[0]), (path, 2, ROWS[1])]


def test_numbers_of_classes_stay_numbers_unless_names_are_asked_for(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"n": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"n": [1, 1, 1], "kind": [1, -1, None]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    source = Source(str(tmp_path / "a.parquet"))
    found = [values for _, _, values in read_objects("src", source, tmp_path)]
    assert found == [{"n": 1, "kind": 1}, {"n": 1, "kind": -1}, {"n": 1, "kind": None}]
    named = [values for _, _, values in read_objects("src", source, tmp_path, class_names=True)]
    assert named == [{"n": 1, "kind": "b"}, {"n": 1, "kind": None}, {"n": 1, "kind": None}]


def test_a_source_without_rows_is_refused_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    source = Source(str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"^source 'src': .*a\.jsonl holds no rows$"):
        list(read_objects("src", source, tmp_path))
    with pytest.raises(ValueError, match=r"^data\.questions: .*a\.jsonl holds no rows$"):
        list(read_objects("src", source, tmp_path, called="data.questions"))
