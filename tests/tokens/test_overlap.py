"""Questions are looked for in the texts that a run has read, and only in those."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_danube.files import default_cache_dir
from lightning_danube.text.corpora import Source
from lightning_danube.tokens.overlap import Overlap, TrainingTexts, overlap, training_texts

QUESTION = "why does the river walk slowly under the seven green mountains in the evening light"


def run_of(directory: Path, *, seen: dict[str, int], cache: str | None = None, kind: str = "CurriculumData") -> Path:
    """The files of a run that say what it has read."""
    directory.mkdir()
    data: dict[str, Any] = {"sources": {name: {"path": f"{name}.jsonl"} for name in seen}, "cache_dir": cache}
    config = {"data": {"class_path": f"lightning_danube.pretraining.{kind}", "init_args": data}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    stages = [{"tokens_by_source": dict.fromkeys(seen, 0)}, {"tokens_by_source": seen}]
    (directory / "summary.json").write_text(json.dumps({"stages": stages}))
    return directory


def test_a_run_has_read_the_sources_that_its_ledger_counted(tmp_path: Path) -> None:
    found = training_texts(run_of(tmp_path / "run", seen={"web": 100, "wiki": 0, "code": 5}, cache="/cache"))
    assert found == TrainingTexts({"web": Source("web.jsonl"), "code": Source("code.jsonl")}, Path("/cache"))
    without = training_texts(run_of(tmp_path / "other", seen={"web": 1}))
    assert without is not None and without.cache_dir == default_cache_dir()


def test_other_runs_and_damaged_ones_say_nothing(tmp_path: Path) -> None:
    assert training_texts(run_of(tmp_path / "chat", seen={"web": 1}, kind="ChatData")) is None
    assert training_texts(tmp_path / "nowhere") is None
    run = run_of(tmp_path / "run", seen={"web": 1})
    (run / "summary.json").write_text("{}")
    assert training_texts(run) is None


def texts_of(directory: Path, **sources: str) -> TrainingTexts:
    for name, text in sources.items():
        (directory / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return TrainingTexts({name: Source(str(directory / f"{name}.jsonl")) for name in sources}, directory)


def test_questions_are_found_in_any_source(tmp_path: Path) -> None:
    other = QUESTION.replace("river", "stone").replace("seven", "nine")
    rows = [{"question": other}, {"question": QUESTION}, {"question": "too short to prove anything"}]
    texts = texts_of(tmp_path, web="nothing of it here", wiki=f"Somebody asked: {QUESTION.upper()}!")
    assert overlap(rows, texts) == Overlap({1}, 2, [])


def test_streamed_sources_are_named_and_short_questions_are_not_looked_for(tmp_path: Path) -> None:
    files = texts_of(tmp_path, wiki=QUESTION)
    texts = TrainingTexts({"hub": Source("owner/name"), **files.sources}, files.cache_dir)
    assert overlap([{"question": QUESTION}], texts) == Overlap({0}, 1, ["hub"])
    assert overlap([{"question": "why?"}], texts) == Overlap(set(), 0, [])


@pytest.mark.parametrize("share", [12, 13])
def test_thirteen_words_in_a_row_count(share: int, tmp_path: Path) -> None:
    words = QUESTION.split()
    texts = texts_of(tmp_path, web=" ".join([*words[:share], "otherwise"]))
    assert overlap([{"question": QUESTION}], texts).found == ({0} if share == 13 else set())
