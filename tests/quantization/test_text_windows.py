"""Windows of a text: which tokens count, what stands before them, and questions made of the text."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_danube.quantization.text_windows import CLOZE_CONTEXT, TextWindows
from lightning_danube.text.corpora import Source
from lightning_danube.tokens.shards import is_held_out
from tests.tiny_models import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("windows") / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"the {number} thing" for number in range(400)))
    return path


def windows_of(model: str, path: Path, **options: Any) -> TextWindows:
    data = TextWindows(Source(str(path)), model, **{"context_lengths": [64], "cloze_questions": 0, **options})
    data.setup("test")
    return data


def test_the_second_half_of_each_window_counts(model: str, text: Path) -> None:
    data = windows_of(model, text, max_tokens=640)
    ids = data.tokenizer(text.read_text(), add_special_tokens=False).input_ids
    bos = data.tokenizer.bos_token_id
    assert data.ids.tolist() == [bos, *ids][:640]
    windows = data.windows(64)
    assert windows.shape == (10, 64)
    assert set(windows[:, 0]) == {bos}
    assert windows[3, 1:].tolist() == [bos, *ids][3 * 64 + 1 : 4 * 64]
    assert data.first_counted(64) == 32


def test_with_a_stride_every_token_counts_once_with_the_most_before_it(model: str, text: Path) -> None:
    data = windows_of(model, text, max_tokens=300, stride=16)
    windows, first = data.windows(64), data.first_counted(64)
    counted = [16 * number + place for number in range(len(windows)) for place in range(first + 1, windows.shape[1])]
    assert counted == list(range(48, 48 + 16 * len(windows)))
    assert windows[2, 1:].tolist() == data.ids[33:96].tolist()


def test_lengths_share_the_text(model: str, text: Path) -> None:
    data = windows_of(model, text, max_tokens=640, context_lengths=[64, 16])
    kinds = [(batch["context_length"], *batch["input_ids"].shape) for batch in data.batches()]
    assert kinds == [(64, 10, 64), (16, 40, 16)]


def test_what_comes_behind_is_for_calibration(model: str, text: Path) -> None:
    data = windows_of(model, text, max_tokens=640, calibration_tokens=100)
    all_ids = windows_of(model, text, max_tokens=None).ids
    assert data.calibration_ids.tolist() == all_ids[640:740].tolist()
    assert len(windows_of(model, text, max_tokens=None).calibration_ids) == 0


def test_only_what_training_holds_out(model: str, tmp_path: Path) -> None:
    lines = [f"document {number} of them all, long enough to be one" for number in range(200)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    source = Source(str(tmp_path / "lines.txt"), separator="\n")
    data = TextWindows(source, model, held_out=0.2, context_lengths=[64], max_tokens=None, cloze_questions=0)
    data.setup("test")
    held_out = [line for line in lines if is_held_out(line, 0.2)]
    assert 10 < len(held_out) < 100
    assert data.tokenizer.decode(data.ids) == "<bos>" + "<eos>".join(held_out)


def test_a_token_for_both_ends_begins_the_text_only_if_the_tokenizer_adds_it(model: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(f"line {number}" for number in range(20)))
    source = Source(str(tmp_path / "lines.txt"), separator="\n")
    for adds in (False, True):
        directory = shutil.copytree(model, tmp_path / f"adds {adds}")
        tokenizer: Any = tiny_tokenizer()
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.add_bos_token = adds
        tokenizer.save_pretrained(directory)
        data = TextWindows(source, str(directory), context_lengths=[8], max_tokens=None, cloze_questions=0)
        data.setup("test")
        assert data.tokenizer.decode(data.ids) == "<eos>" * adds + "<eos>".join(f"line {n}" for n in range(20))


def test_a_question_is_a_place_of_the_text_and_continuations_of_others(model: str, text: Path) -> None:
    data = windows_of(model, text, max_tokens=2000, cloze_questions=40)
    assert data.questions.shape == (40, 4, 40)
    stream = data.ids.tolist()
    for question in data.questions:
        assert (question[:, :CLOZE_CONTEXT] == question[0, :CLOZE_CONTEXT]).all()
        true = question[0, 1:].tolist()
        assert any(stream[at : at + 39] == true for at in range(len(stream)))
        for other in question[1:]:
            assert other[CLOZE_CONTEXT:].tolist() != true[CLOZE_CONTEXT - 1 :]
    (batch, *_) = [batch for batch in data.batches() if "choices" in batch]
    assert batch["choices"] == 4 and batch["input_ids"].shape[1] == 40


def test_another_text_or_another_way_to_read_it_is_another_identity(model: str, text: Path) -> None:
    plain = windows_of(model, text, max_tokens=640)
    assert windows_of(model, text, max_tokens=640).identity() == plain.identity()
    for options in ({"max_tokens": 641}, {"stride": 8}, {"context_lengths": [32]}, {"cloze_questions": 10}):
        assert windows_of(model, text, **{"max_tokens": 640, **options}).identity() != plain.identity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_lengths": []}, r"data\.context_lengths is \[\]"),
        ({"context_lengths": [64, 64]}, r"name different numbers"),
        ({"stride": 64}, r"data\.stride is 64: it must be at least 1 and below the shortest .* \(64\)"),
        ({"held_out": 1.5}, r"data\.held_out is 1\.5"),
        ({"cloze_questions": -1}, r"data\.cloze_questions is -1"),
        ({"max_tokens": "many"}, r"data\.max_tokens is 'many'"),
        ({"max_tokens": 50}, r"text\.txt: 50 tokens are fewer than one window .* \(64\)"),
        ({"max_tokens": 130, "cloze_questions": 100}, r"too few for a cloze: .*data\.cloze_questions: 0"),
        ({"held_out": 1e-9}, r"none of its documents is held out at 1e-09"),
    ],
)
def test_a_mistake_is_one_line(model: str, text: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows_of(model, text, **options)


def test_an_empty_text(model: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt"):
        windows_of(model, tmp_path / "empty.txt")


def test_the_windows_are_of_one_text(model: str, text: Path) -> None:
    assert np.unique(windows_of(model, text).windows(64)[:, 0]).size == 1


def test_the_choices_of_a_question_differ_and_their_tokens_count(model: str, text: Path) -> None:
    data = windows_of(model, text, max_tokens=2000, cloze_questions=40)
    for question in data.questions:
        assert len({tuple(choice[CLOZE_CONTEXT:]) for choice in question.tolist()}) == 4
    batches = [batch for batch in data.batches() if "choices" in batch]
    counted = np.concatenate([batch["input_ids"][:, batch["first"] + 1 :] for batch in batches])
    assert np.array_equal(counted, data.questions[:, :, CLOZE_CONTEXT:].reshape(160, -1))


def test_text_is_read_until_there_is_enough_to_measure_and_to_calibrate(model: str, tmp_path: Path) -> None:
    lines = [f"document {number} of them all" for number in range(100)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    source = Source(str(tmp_path / "lines.txt"), separator="\n")
    options: Any = {"context_lengths": [16], "cloze_questions": 0, "max_tokens": 300, "calibration_tokens": 200}
    data = TextWindows(source, model, **options)
    data.setup("test")
    assert (len(data.ids), len(data.calibration_ids)) == (300, 200)
    text = str(data.tokenizer.decode([*data.ids, *data.calibration_ids]))
    assert ("<bos>" + "<eos>".join(lines)).startswith(text)


def test_what_is_shown_is_what_is_measured(model: str, text: Path) -> None:
    data = windows_of(model, text, max_tokens=640, cloze_questions=4, calibration_tokens=32)
    windows, questions, calibration = data.shown_sources(2, 1000)
    assert (windows.read, windows.marked_tokens) == (10, 10 * 31)
    first = data.first_counted(64)
    for row, example in zip(data.windows(64).tolist(), windows.examples, strict=False):
        assert [token.id for token in example.tokens] == row
        assert [token.marked for token in example.tokens] == [False] * (first + 1) + [True] * (63 - first)
    assert questions.examples[0].marked == 8 and questions.read == 16
    assert [token.id for token in calibration.examples[0].tokens] == data.calibration_ids.tolist()
