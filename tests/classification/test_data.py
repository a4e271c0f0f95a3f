import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_danube.classification.baselines import majority_probabilities, tfidf_probabilities
from lightning_danube.classification.data import ClassificationData, filled_batches
from lightning_danube.classification.labelled_texts import same_text

WORDS = {"wet": "river rain", "hard": "stone iron", "far": "mountain star"}


def write(path: Path, count: int, first: int = 0, labels: tuple[str, ...] = ("wet", "hard", "far")) -> str:
    with path.open("w") as file:
        file.write("text,label\n")
        for n in range(first, first + count):
            label = labels[n % len(labels)]
            file.write(f"{WORDS.get(label, label)} {n} {'slowly ' * (n % 9)},{label}\n")
    return str(path)


def data(tmp_path: Path, stage: str = "fit", **options: Any) -> ClassificationData:
    if "train" not in options:
        options["train"] = write(tmp_path / "train.csv", 60)
    options = {"batch_texts": 4, "micro_batch_size": 2} | options
    module = ClassificationData(cache_dir=str(tmp_path / "cache"), **options)
    module.prepare_data()
    module.setup(stage)
    return module


def append(path: Path, *rows: str) -> None:
    with path.open("a") as file:
        file.write("".join(row + "\n" for row in rows))


def test_three_splits_of_one_file(tmp_path: Path) -> None:
    module = data(tmp_path)
    assert {split: len(texts) for split, texts in module.splits.items()} == {"train": 49, "validation": 5, "test": 6}
    assert module.labels == ["far", "hard", "wet"]
    assert module.class_counts()["wet"]["test"] == 2
    rows = [text.row for texts in module.splits.values() for text in texts]
    assert sorted(rows) == list(range(1, 61))
    again = data(tmp_path)
    assert again.splits == module.splits
    assert data(tmp_path, seed=5).splits["test"] != module.splits["test"]


def test_given_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    test = write(tmp_path / "test.csv", 9, first=100)
    module = data(tmp_path, test={"path": test}, validation=write(tmp_path / "validation.csv", 6, first=200))
    assert [len(module.splits[split]) for split in ("train", "validation", "test")] == [60, 6, 9]
    assert {text.file for text in module.splits["test"]} == {test}


def test_a_batch_is_padded_behind_its_texts_and_begins_as_in_training(tmp_path: Path) -> None:
    module = data(tmp_path, context_length=7)
    encoded = module.encoded["train"]
    batch = encoded.batch([3, None, 5])
    assert batch["rows"].tolist() == [3, -1, 5] and batch["classes"][1] == -100
    assert batch["attention_mask"].sum(1).tolist() == [encoded.lengths[3], 0, encoded.lengths[5]]
    text = module.splits["train"][3].text
    ids = [module.tokenizer.bos_token_id, *module.tokenizer(text, add_special_tokens=False).input_ids][:7]
    assert batch["input_ids"][0, : len(ids)].tolist() == ids
    assert module.labels[batch["classes"][0]] == module.splits["train"][3].label
    assert (
        encoded.cut
        == sum(len(module.tokenizer(t.text, add_special_tokens=False).input_ids) > 6 for t in module.splits["train"])
        > 0
    )


def test_the_end_of_a_long_text_is_kept_if_asked_for(tmp_path: Path) -> None:
    plain = data(tmp_path)
    cases: list[tuple[dict[str, Any], list[int]]] = [({}, [plain.tokenizer.bos_token_id]), ({"begin": False}, [])]
    for options, head in cases:
        module = data(tmp_path, context_length=7, keep="end", **options)
        encoded = module.encoded["train"]
        for number, text in enumerate(module.splits["train"]):
            ids = module.tokenizer(text.text, add_special_tokens=False).input_ids
            found = encoded.ids[encoded.ends[number] : encoded.ends[number + 1]].tolist()
            assert found == [*head, *ids[-(7 - len(head)) :]]
        assert encoded.cut > 0


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    module = data(tmp_path)
    append(tmp_path / "train.csv", "the end </s> of it,wet")
    module = data(tmp_path, train=str(tmp_path / "train.csv"))
    ids = np.concatenate([module.encoded[split].ids for split in module.splits])
    assert module.tokenizer.eos_token_id not in ids


def test_each_text_is_in_each_pass_once_with_others_of_its_length(tmp_path: Path) -> None:
    module = data(tmp_path, epochs=2)
    batches = list(module.train_dataloader())
    rows = torch.cat([batch["rows"] for batch in batches])
    assert len(batches) == module.total_steps * 2 == 52
    assert rows[rows >= 0].bincount().tolist() == [2] * 49
    assert [batch["step_labels"] for batch in batches].count(4) == 2 * 24
    # Sorted lengths of 1 to 9 and more tokens: steps in the order of the file would be a third padding.
    shares = [float(batch["attention_mask"].sum()) / batch["attention_mask"].numel() for batch in batches]
    assert np.mean(shares) > 0.8
    module.steps_done = 3
    for left, right in zip(batches[6:], module.train_dataloader(), strict=True):
        assert torch.equal(left["input_ids"], right["input_ids"])


def test_fewer_texts_of_each_class_alike(tmp_path: Path) -> None:
    module = data(tmp_path, max_texts={"train": 12, "test": 3})
    counts = module.class_counts()
    assert [one["train"] for one in counts.values()] == [4, 4, 4] and [one["test"] for one in counts.values()] == [
        1
    ] * 3
    # Known before any text is read: 12 texts of at most a context each, and less than a token for rounding.
    limit = module.most_tokens()
    assert limit == module.epochs * 12 * (module.context_length + 1) and 0 < module.total_tokens <= limit
    assert data(tmp_path).most_tokens() is None
    few = data(tmp_path, most_frequent_classes=2, test=write(tmp_path / "test.csv", 9, first=100))
    assert few.labels == ["far", "hard"] and few.other_classes == 23 and len(few.splits["test"]) == 6


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    train, test = Path(write(tmp_path / "train.csv", 30)), Path(write(tmp_path / "test.csv", 6, first=100))
    append(train, ",wet", "dry,", "STONE  iron 103 slowly slowly slowly slowly,hard")
    append(test, "a cold thing,cold")
    for options, message in [
        ({}, r"train.csv, row 31: column 'text' is empty; data.on_bad_row: skip leaves such rows out"),
        (
            {"train": write(tmp_path / "other.csv", 30)},
            r"test.csv, row 7: the label 'cold' does not occur in training, where there are far, hard, wet;",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            data(tmp_path, **{"train": str(train), "test": str(test)} | options)
    module = data(tmp_path, train=str(train), test=str(test), on_bad_row="skip", validation_share=0.2)
    assert module.causes() == {"empty text": 1, "no label": 1, "unknown label": 1, "is in another split": 1}
    message = f"{train}, row 33: the same text is in {test}, row 4, so a score on it would be too good"
    assert module.rejected[-1].message == message
    assert len(module.splits["test"]) == 6 and 33 not in {text.row for text in module.splits["train"]}
    append(test, *(f"copy {n},wet" for n in range(2)))
    append(train, "copy 1,wet")
    clean = Path(write(tmp_path / "clean.csv", 30))
    append(clean, "copy 1,wet")
    with pytest.raises(ValueError, match=r"clean.csv, row 31: the same text is in .*again.csv, row 1, so a score"):
        again = tmp_path / "again.csv"
        again.write_text("text,label\ncopy 1,wet\n")
        data(tmp_path, train=str(clean), test=str(again))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, r"data.context_length is 0: it must be at least 1"),
        ({"max_texts": {"test": 0}}, r"data.max_texts.test is 0: it must be at least 1"),
        ({"max_texts": {"tests": 5}}, r"data.max_texts names tests: the splits are train, validation, test"),
        ({"max_texts": {"train": 1}}, r"data.max_texts.train is 1: that leaves a single class; raise it"),
        ({"test_share": 1.0}, r"data.test_share is 1.0: give a share between 0 and 1"),
        (
            {"validation_share": 0.001},
            r"too few texts \(54\) to split off a share of 0.001 for validation: raise data.validation_share",
        ),
        ({"most_frequent_classes": 1}, r"data.most_frequent_classes is 1: at least two classes are needed"),
        (
            {"test": {"path": "a.csv", "text": "b"}},
            r"data.test has the option 'text': the options are path, name, split",
        ),
        ({"test": {"name": "plain"}}, r"data.test has no path: the options are path, name, split, revision"),
        ({"tokenizer": "/nowhere"}, r"no tokenizer directory '/nowhere'"),
        ({"train": "/nowhere.csv"}, r"source 'train': there is no file /nowhere.csv"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(tmp_path, **options)


def test_one_class_is_nothing_to_tell(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all 20 texts have the label 'wet': it takes two classes"):
        data(tmp_path, train=write(tmp_path / "one.csv", 20, labels=("wet",)))


def test_splits_without_a_text(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\n,wet\n")
    with pytest.raises(ValueError, match=r"data.test: .*bad.csv holds no text to use"):
        data(tmp_path, test=str(bad), on_bad_row="skip")
    bad.write_text("text,label\nx,cold\n")
    with pytest.raises(ValueError, match=r"data.test: no text is left of .*bad.csv"):
        data(tmp_path, test=str(bad), on_bad_row="skip")


def test_a_set_of_the_library_datasets(tmp_path: Path) -> None:
    import datasets

    rows = [{"review": f"{WORDS[label]} {n}", "kind": n % 2} for n in range(40) for label in [("wet", "far")[n % 2]]]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    module = data(tmp_path, train=str(tmp_path / "saved"), text_column="review", label_column="kind")
    assert module.labels == ["0", "1"] and len(module.splits["train"]) == 32


# --- baselines --------------------------------------------------------------------------------------------------------


def test_the_majority_class_knows_the_frequencies() -> None:
    found = majority_probabilities([0, 0, 2, 0], 3, 2)
    assert found.tolist() == [[0.75, 0.0, 0.25]] * 2


def test_tfidf_learns_words_and_keeps_the_numbers_of_classes() -> None:
    texts = [f"{words} {n}" for n in range(12) for words in WORDS.values()]
    classes = [0, 1, 3] * 12
    found = tfidf_probabilities(texts, classes, 4, ["a river", "an iron", "the mountain"])
    assert found.argmax(1).tolist() == [0, 1, 3] and (found[:, 2] == 0).all()
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-12)


def test_the_data_know_which_texts_the_run_began_with(tmp_path: Path) -> None:
    module = data(tmp_path)
    assert json.dumps(module.order()) == json.dumps(data(tmp_path).order())
    assert module.order() != data(tmp_path, context_length=5).order()


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "other"), [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_a_text_that_another_given_split_has_is_left_out(tmp_path: Path, role: str, other: str) -> None:
    files = {
        split: Path(write(tmp_path / f"{split}.csv", 9, first=first))
        for split, first in (("train", 0), ("validation", 100), ("test", 200))
    }
    append(files[role], "the same  thing,wet")
    append(files[other], "The same thing,wet")
    given = {split: str(path) for split, path in files.items()}
    with pytest.raises(ValueError, match=rf"{role}.csv, row 10: the same text is in .*{other}.csv, row 10, so"):
        data(tmp_path, **given)
    module = data(tmp_path, **given, on_bad_row="skip")
    assert [(row.file, row.row) for row in module.rejected] == [(str(files[role]), 10)]
    texts = {split: [same_text(text.text) for text in texts] for split, texts in module.splits.items()}
    assert [(split, len(texts[split])) for split in (role, other)] == [(role, 9), (other, 10)]
    assert not set(texts[role]) & set(texts[other])


def test_no_split_has_a_text_of_another(tmp_path: Path) -> None:
    train = Path(write(tmp_path / "train.csv", 60))
    lines = train.read_text().splitlines()
    append(train, *(line.upper().replace(",WET", ",wet") for line in lines[1:] if line.endswith(",wet")))
    module = data(tmp_path, train=str(train))
    texts = [{same_text(text.text) for text in texts} for texts in module.splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 60
    assert sum(map(len, module.splits.values())) == 80


# --- order and batches ------------------------------------------------------------------------------------------------


def test_the_order_is_known_by_all_that_decides_it(tmp_path: Path) -> None:
    module = data(tmp_path)
    train = module.encoded["train"]
    found = [module.order()["train"]]
    for name in ("ids", "ends", "classes"):
        values = getattr(train, name).copy()
        values[3] += 1
        module.encoded["train"] = dataclasses.replace(train, **{name: values})
        found.append(module.order()["train"])
    assert len(set(found)) == 4


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_texts": 6}, {"context_length": 4}])
def test_a_run_goes_on_only_in_the_same_order(tmp_path: Path, changed: dict[str, Any]) -> None:
    first, other = data(tmp_path), data(tmp_path, **changed)
    state = {"order": json.loads(json.dumps(first.order())), "steps": 3}
    for module in (first, other):
        module.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))  # type: ignore[assignment]
    first.load_state_dict(state)
    assert first.steps_done == 3
    key = "train" if "context_length" in changed else next(iter(changed))
    with pytest.raises(ValueError, match=rf"data.{key} is .*, the run began with .*: set it back"):
        other.load_state_dict(state)


def test_each_pass_has_an_order_of_its_own(tmp_path: Path) -> None:
    module = data(tmp_path, epochs=2)
    first, second = (one.rows for one in module.passes)
    assert first != second and sorted(row for row in first if row) == sorted(row for row in second if row)
    # The schedule's tokens are those of both passes, rounded up to whole tokens a step.
    tokens = 2 * int(module.encoded["train"].lengths.sum())
    assert tokens <= module.total_tokens < tokens + module.total_steps


def test_predictions_are_in_the_order_of_the_file_and_scores_need_no_order(tmp_path: Path) -> None:
    module = data(tmp_path)
    (tmp_path / "new.csv").write_text("text\none\ntwo words and more\nthree words here\nfour\n")
    asked = ClassificationData(str(tmp_path / "train.csv"), predict=str(tmp_path / "new.csv"), context_length=8)
    asked.setup("predict")
    asked.micro_batch_size = 3
    batches = list(asked.predict_dataloader())
    assert [batch["rows"].tolist() for batch in batches] == [[0, 1, 2, 3]]
    assert [asked.described(row)[0]["row"] for row in range(4)] == [1, 2, 3, 4] and asked.described(0)[1] == {}
    assert (batches[0]["classes"] == -100).all()
    new = str(tmp_path / "new.csv")
    assert asked.described(1)[0] == {"file": new, "row": 2, "text": "two words and more"}
    (tmp_path / "named.jsonl").write_text('{"text": "one", "id": "a 1"}\n{"text": "two", "id": 2}\n')
    named = ClassificationData(str(tmp_path / "train.csv"), predict=str(tmp_path / "named.jsonl"), context_length=8)
    named.setup("predict")
    assert [(named.described(row)[0]["id"], named.described(row)[0]["text"]) for row in (0, 1)] == [
        ("a 1", "one"),
        (2, "two"),
    ]
    lengths = [int(module.encoded["test"].lengths[row]) for batch in module.test_dataloader() for row in batch["rows"]]
    assert lengths == sorted(lengths, reverse=True)
    assert module.predicted == "test" and module.described(2)[1] == {"true_label": module.splits["test"][2].label}


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("places", [1, 40, 10**6])
def test_batches_are_as_full_as_their_places_allow(places: int, replicas: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 50)
    for order in (list(range(50)), np.argsort(-lengths).tolist()):
        batches = filled_batches(order, lengths, places, replicas)
        assert [number for batch in batches for number in batch if number is not None] == order

        def needed(batch: list[int | None]) -> int:
            """Places of one replica."""
            return len(batch) // replicas * max(int(lengths[number]) for number in batch if number is not None)

        for batch, after in itertools.pairwise([*batches, []]):
            assert len(batch) % replicas == 0
            assert needed(batch) <= places or len(batch) == replicas
            if after:
                assert needed(batch + after[:replicas]) > places


def test_replicas_have_equally_many_batches_and_each_text_once(tmp_path: Path) -> None:
    module = data(tmp_path, test=write(tmp_path / "test.csv", 7, first=100), micro_batch_size=1)
    dealt = []
    for rank in range(3):
        replicas = {"num_replicas": 3, "rank": rank}
        module.trainer = SimpleNamespace(distributed_sampler_kwargs=replicas)  # type: ignore[assignment]
        dealt.append([int(row) for batch in module.test_dataloader() for row in batch["rows"]])
    assert [len(rows) for rows in dealt] == [3, 3, 3]
    rows = [row for rank in dealt for row in rank]
    assert sorted(row for row in rows if row >= 0) == list(range(7)) and rows.count(-1) == 2


def test_only_a_texts_own_places_are_seen(tmp_path: Path) -> None:
    encoded = data(tmp_path).encoded["train"]
    short, long = int(encoded.lengths.argmin()), int(encoded.lengths.argmax())
    batch = encoded.batch([short, long])
    for row, number in enumerate((short, long)):
        length = int(encoded.lengths[number])
        start = int(encoded.ends[number])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (int(encoded.lengths[long]) - length)
        assert batch["input_ids"][row, :length].tolist() == encoded.ids[start : start + length].tolist()
        assert not batch["input_ids"][row, length:].any()


def test_what_is_shown_is_what_is_encoded(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", 60)
    append(tmp_path / "train.csv", ",wet")
    module = data(tmp_path, train=train, on_bad_row="skip", context_length=12)
    looked = ClassificationData(train, context_length=12, cache_dir=str(tmp_path / "cache"))
    shown = {one.name: one for one in looked.shown_sources(3, 20)}
    assert list(shown) == ["train", "validation", "test"]
    for split, one in shown.items():
        encoded = module.encoded[split]
        assert one.kept == len(module.splits[split])
        for number, example in enumerate(one.examples):
            ids = encoded.ids[encoded.ends[number] : encoded.ends[number + 1]]
            assert [token.id for token in example.tokens] == ids.tolist()
            assert example.title.endswith(f": {module.splits[split][number].label}")
    assert shown["train"].left_out == {"empty text": 1} and shown["test"].left_out == {}
    assert shown["train"].warnings == [f"fit stops at {train}, row 61: data.on_bad_row: skip leaves such rows out"]
    assert "tokens and lengths are those of the first 20 texts (--rows)" in shown["train"].notes


def test_texts_of_which_none_can_be_used_are_shown_with_their_reasons(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("text,label\n,wet\nriver,\n")
    (shown,) = ClassificationData(str(file), cache_dir=str(tmp_path / "cache")).shown_sources(3, 20)
    assert shown.is_empty and shown.left_out == {"empty text": 1, "no label": 1}
    assert shown.warnings == [f"data.train: {file} holds no text to use"]
