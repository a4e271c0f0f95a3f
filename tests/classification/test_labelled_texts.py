import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_danube.classification.labelled_texts import (
    PACKAGES,
    LabelledText,
    LabelledTexts,
    most_frequent,
    ordered,
    read_labelled_texts,
    same_text,
    split_off,
    stratified,
)
from lightning_danube.text.reading import BadRow


def read(path: Path | str, text: str = "text", label: str | None = "label", cache: str = ".") -> list[Any]:
    return list(read_labelled_texts("train", LabelledTexts(str(path)), text, label, Path(cache)))


def texts(counts: dict[str, int]) -> list[LabelledText]:
    return [LabelledText(f"{label} number {n}", label, "f", n) for label, count in counts.items() for n in range(count)]


def test_the_same_rows_out_of_each_format(tmp_path: Path) -> None:
    rows = [
        {"title": "On ice", "body": "It is cold.", "kind": 3},
        {"title": "On sand", "body": "It is not.", "kind": 10},
    ]
    (tmp_path / "a.csv").write_text("title,body,kind\nOn ice,It is cold.,3\nOn sand,It is not.,10\n")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix in ("csv", "jsonl", "parquet"):
        first, second = read(tmp_path / f"a.{suffix}", "{title}: {body}", "kind")
        assert (first.text, first.label, first.row) == ("On ice: It is cold.", "3", 1)
        assert (second.label, second.place) == ("10", f"{tmp_path / f'a.{suffix}'}, row 2")


@pytest.mark.parametrize(
    ("row", "cause", "message"),
    [
        ({"text": " ", "label": "a"}, "empty text", r"row 2: column 'text' is empty"),
        ({"text": None, "label": "a"}, "empty text", r"row 2: column 'text' is empty"),
        ({"text": 3, "label": "a"}, "not text", r"row 2: column 'text' holds int, not text"),
        ({"text": "x", "label": " "}, "no label", r"row 2: column 'label' is empty"),
        ({"text": "x"}, "no label", r"row 2: column 'label' is empty"),
        ({"text": "x", "label": 1.5}, "no label", r"row 2: column 'label' holds float, no word and no whole number"),
        (
            {"text": "x", "label": "\ud800"},
            "no label",
            r"row 2: column 'label' holds half a surrogate pair, which is not",
        ),
        ([1], "not an object", r"row 2: expected an object with the column 'text', found list"),
    ],
)
def test_a_bad_row_says_what_is_wrong_and_where(tmp_path: Path, row: Any, cause: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "good", "label": "a"}) + "\n" + json.dumps(row))
    good, bad = read(tmp_path / "a.jsonl")
    assert isinstance(good, LabelledText) and isinstance(bad, BadRow)
    assert bad.cause == cause and message in bad.message


def test_half_a_surrogate_pair_in_an_id_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a\ud800", "text": "x", "label": "b"}))
    (row,) = read(tmp_path / "a.jsonl")
    assert isinstance(row, LabelledText) and row.id == "a\\ud800"


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("txt", "label", r"row 1: there is no column 'txt', only text, label: name it with data.text_column"),
        ("{text} {b}", "label", r"there is no column 'b', only text, label: name it with data.text_column"),
        ("text", "class", r"there is no column 'class', only text, label: name it with data.label_column"),
    ],
)
def test_a_wrong_column_is_no_bad_row(tmp_path: Path, text: str, label: str, message: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,a\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.csv", text, label)


def test_sources_that_hold_nothing_of_the_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"data.train: .*a.csv holds no rows"):
        read(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"documentation:web has no labels: the embedded set with labels is"):
        read("documentation:web")


def test_labels_as_words_whole_numbers_and_truth_values(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in ("spam ", 7, 2.0, True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [text.label for text in read(tmp_path / "a.jsonl")] == ["spam", "7", "2", "true"]
    assert ordered(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert ordered(["10", "9", "b"]) == ["10", "9", "b"]


def test_classes_of_equal_value_have_one_order() -> None:
    labels = ["2", "1", "001", "10", "01"]
    for _ in range(5):
        labels = [*labels[1:], labels[0]]
        assert ordered(labels) == ["001", "01", "1", "2", "10"]
    # More digits than Python reads as a number.
    assert ordered(["7" * 5000, "10", "9"]) == ["10", "7" * 5000, "9"]


def test_a_label_is_the_same_word_in_every_format(tmp_path: Path) -> None:
    values = [2.0, 3, True, False, -1.0, "1.5", "v1.0", "true story"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x", "label": value}) for value in values))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"x,{value}\n" for value in values))
    pq.write_table(pa.Table.from_pylist([{"text": "x", "label": 2.0}]), tmp_path / "a.parquet")
    labels = {name: [text.label for text in read(tmp_path / f"a.{name}")] for name in ("jsonl", "csv", "parquet")}
    assert labels["csv"] == labels["jsonl"] == ["2", "3", "true", "false", "-1", "1.5", "v1.0", "true story"]
    assert labels["parquet"] == ["2"]


def test_a_number_of_a_class_is_its_name_where_the_data_set_has_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = {"text": ["one", "two", "three"], "label": [1, 0, -1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "a.parquet"):
        one, two, untold = read(tmp_path / name)
        assert (one.label, two.label) == ("pos", "neg")
        assert isinstance(untold, BadRow) and untold.cause == "no label"


def test_a_role_takes_its_split_of_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": name, "label": "a"}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    (train,) = read(tmp_path / "saved")
    source = LabelledTexts(str(tmp_path / "saved"))
    (test,) = read_labelled_texts("test", source, "text", "label", tmp_path)
    assert isinstance(test, LabelledText) and (train.text, test.text) == ("train", "test")
    # A message about a text that both splits have names two places.
    assert train.place == f"{tmp_path / 'saved'}, split train, row 1"
    assert test.place == f"{tmp_path / 'saved'}, split test, row 1"


def test_the_name_of_a_package_is_hidden_in_its_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collected(cache_dir: Path) -> dict[str, Path]:
        for role, package in (("web", "rich"), ("academic", "numpy")):
            row = {
                "text": f"Class {package}.core.A\n\nAn enriched {package.upper()} thing.",
                "origin": f"{package}:core",
            }
            (tmp_path / f"{role}.jsonl").write_text(json.dumps(row))
        return {role: tmp_path / f"{role}.jsonl" for role in ("web", "academic")}

    monkeypatch.setattr("lightning_danube.text.corpora.collect_documentation", collected)
    first, second = read(PACKAGES)
    assert (first.label, second.label) == ("rich", "numpy")
    assert first.text == "Class package.core.A\n\nAn enriched package thing."


def test_each_class_gives_its_share() -> None:
    given = texts({"a": 60, "b": 30, "c": 10})
    chosen = [given[n] for n in stratified(given, 25, seed=1, stream="test")]
    # 15, 7.5 and 2.5: the larger remainder is the alphabet's, as both are equal.
    assert [sum(text.label == label for text in chosen) for label in "abc"] == [15, 8, 2]
    again = [given[n] for n in stratified(list(reversed(given)), 25, seed=1, stream="test")]
    assert len(again) == 25
    assert {text.text for text in chosen} == {
        list(reversed(given))[n].text for n in stratified(list(reversed(given)), 25, seed=1, stream="test")
    }, "the choice does not depend on the order of the rows"
    other = [given[n] for n in stratified(given, 25, seed=2, stream="test")]
    assert {text.text for text in other} != {text.text for text in chosen}


def test_copies_stay_on_one_side_and_no_class_is_lost() -> None:
    given = texts({"a": 40, "b": 1})
    given += [text._replace(text=f"  {text.text.upper()}", row=100 + text.row) for text in given]
    rest, taken = split_off(given, 0.25, seed=0, stream="test")
    assert not {same_text(text.text) for text in rest} & {same_text(text.text) for text in taken}
    assert len(taken) == 20 and len(rest) == 62
    assert {text.label for text in rest} == {"a", "b"} and {text.label for text in taken} == {"a"}


def test_the_most_frequent_classes() -> None:
    assert most_frequent(texts({"c": 3, "b": 5, "a": 3, "d": 1}), 2) == {"b", "a"}


@pytest.mark.parametrize(
    ("role", "split", "expected"),
    [("train", None, "train"), ("test", None, "test"), ("predict", None, "test"), ("test", "train", "train")],
)
def test_a_role_takes_the_split_of_its_name(
    monkeypatch: pytest.MonkeyPatch, role: str, split: str | None, expected: str
) -> None:
    asked = []

    def rows(name: str, source: Any, cache_dir: Path, called: str, class_names: bool) -> Any:
        asked.append((source.path, source.split, source.name, source.revision))
        yield "hub", 1, {"text": "a text", "label": "a"}

    monkeypatch.setattr("lightning_danube.classification.labelled_texts.read_objects", rows)
    source = LabelledTexts("stanfordnlp/imdb", name="plain", split=split, revision="abc")
    assert list(read_labelled_texts(role, source, "text", "label", Path())) == [LabelledText("a text", "a", "hub", 1)]
    assert asked == [("stanfordnlp/imdb", expected, "plain", "abc")]


def test_each_class_keeps_a_text_for_training() -> None:
    given = texts({"a": 4, "b": 1, "c": 2})
    rest, taken = split_off(given, 0.9, seed=0, stream="test")
    assert {text.label for text in rest} == {"a", "b", "c"}
    assert len(taken) == 4 and sorted(rest + taken) == sorted(given)
