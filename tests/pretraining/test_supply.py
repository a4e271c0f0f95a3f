"""How much text a source has: as stated, as in its shards, at most as limited, or unknown."""

from pathlib import Path
from typing import Any

import pytest

from lightning_danube.pretraining.curriculum import Stage
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.pretraining.supply import Supply, parse_source_tokens, supplies
from lightning_danube.text.corpora import Source
from lightning_danube.tokens import tokenizer
from lightning_danube.tokens.tokenizer import DocumentTokenizer


def module(tiny: Path, **limits: Any) -> CurriculumData:
    sources = {name: Source(str(tiny / f"{name}.jsonl"), max_tokens=limits.get(name)) for name in ("web", "wiki")}
    stages = [Stage("a", 5_000, {"web": 0.9, "wiki": 0.1})]
    sizes: dict[str, Any] = {"context_length": 32, "batch_tokens": 256, "tokenizer": "danube-small"}
    return CurriculumData(sources, stages, held_out=0.2, cache_dir=str(tiny / "cache"), processes=1, **sizes)


def test_text_that_is_held_out_is_no_supply(tiny: Path) -> None:
    found = supplies(module(tiny, wiki="1M"), {"web": 10_000})
    assert found == {"web": Supply(8_000, "--source-tokens"), "wiki": Supply(800_000, "max_tokens, at most")}


def test_shards_say_how_much_there_is_and_a_statement_goes_first(tiny: Path) -> None:
    data = module(tiny)
    assert supplies(data, {}) == dict.fromkeys(("web", "wiki"), Supply(None, "not counted yet"))
    data.prepare()
    data.setup("fit")
    train = {name: len(stream) for name, stream in data.train_streams.items()}
    documents = {name: data.shards[name].counts("train").documents or 0 for name in train}
    mean = {name: train[name] / documents[name] for name in train}
    assert supplies(data, {}) == {name: Supply(train[name], "its shards", mean[name]) for name in ("web", "wiki")}
    assert supplies(data, {"wiki": 100})["wiki"] == Supply(80, "--source-tokens", mean["wiki"])
    for name, supply in supplies(data, {}).items():
        assert supply.rows(32) == data.train_streams[name].rows(32)


@pytest.mark.parametrize("name", ["mistral", "danube3-chat", "danube-small"])
def test_shards_are_looked_for_without_transformers(tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The cache holds shards of another source with this name. Importing transformers takes seconds."""
    data = module(tiny)
    data.tokenizer = DocumentTokenizer(name)
    (data.cache_dir / "shards" / "web-000000000000").mkdir(parents=True)
    monkeypatch.setattr(tokenizer, "load_hf_tokenizer", lambda name: pytest.fail(f"{name} is loaded by transformers"))
    assert supplies(data, {})["web"] == Supply(None, "not counted yet")


@pytest.mark.parametrize(("tokens", "rows"), [(None, None), (0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_rows_are_counted_as_in_shards(tokens: int | None, rows: int | None) -> None:
    assert Supply(tokens, "somebody").rows(8) == rows


def test_statements_are_read_source_by_source() -> None:
    sources = {"web": 1, "wiki": 1}
    assert parse_source_tokens("web=10T, wiki=6B", sources) == {"web": 10 * 10**12, "wiki": 6 * 10**9}
    assert parse_source_tokens(None, sources) == parse_source_tokens("", sources) == {}
