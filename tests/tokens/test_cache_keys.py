"""Every fact that determines tokens is in the name of their cache: if the fact changes, the cache is missed."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Filters, Quality
from lightning_danube.tokens import shards
from lightning_danube.tokens.chat_template import DANUBE_TEMPLATE, ChatEncoder
from lightning_danube.tokens.engines import Engine
from lightning_danube.tokens.finished_shards import finished_directory
from lightning_danube.tokens.shards import ShardFacts, files_identity
from lightning_danube.tokens.tokenizer import DocumentTokenizer, fingerprint_of, load_hf_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    return path


def fingerprint(path: Path, /, **changes: Any) -> str:
    facts: dict[str, Any] = {"path": str(path), "held_out": 0.1, "quality": Quality(), "tokenizer": "danube-small"}
    facts |= changes
    source = Source(**{name: facts.pop(name) for name in list(facts) if name in Source.__dataclass_fields__})
    tokenizer = DocumentTokenizer(facts["tokenizer"])
    return ShardFacts("src", source, tokenizer, facts["held_out"], facts["quality"], path.parent).fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"text": "body"},
        {"name": "sample"},
        {"split": "test"},
        {"revision": "abc"},
        {"separator": "\n"},
        {"max_tokens": "1K"},
        {"on_bad_row": "skip"},
        {"held_out": 0.2},
        {"tokenizer": "world"},
        {"quality": Quality(deduplicate="exact")},
        {"quality": Quality(filters=Filters())},
    ],
    ids=str,
)
def test_shards_are_named_after_each_fact_that_decides_their_tokens(text: Path, change: dict[str, Any]) -> None:
    assert fingerprint(text) == fingerprint(text)
    assert fingerprint(text, **change) != fingerprint(text)


def test_near_duplicates_of_each_engine_have_a_directory_and_the_complete_one_is_found(text: Path) -> None:
    """The engines find other near-duplicates, and the same equal texts."""
    tokenizer = DocumentTokenizer("danube-small")

    def directory(quality: Quality, engine: Engine | None = None) -> Path:
        return ShardFacts("src", Source(str(text)), tokenizer, 0.1, quality, text.parent).directory(engine)

    for quality in (Quality(), Quality(deduplicate="exact")):
        assert directory(quality) == directory(quality, "own") == directory(quality, "datatrove")
    near = Quality(deduplicate="near")
    own, datatrove = directory(near, "own"), directory(near, "datatrove")
    assert own != datatrove and directory(near) == own
    for complete in (datatrove, own):
        complete.mkdir(parents=True)
        (complete / "shards.json").touch()
        assert directory(near) == complete


def test_shards_of_another_format_have_another_name(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(text)
    monkeypatch.setattr(shards, "FORMAT", shards.FORMAT + 1)
    assert fingerprint(text) != before


def test_a_file_is_told_by_path_size_and_time(text: Path) -> None:
    def identity(path: Path) -> bytes:
        return files_identity("src", Source(str(path)), path.parent)

    before, times = identity(text), (text.stat().st_atime_ns, text.stat().st_mtime_ns)
    os.utime(text, ns=(times[0], times[1] + 1))
    assert identity(text) != before
    os.utime(text, ns=times)
    assert identity(text) == before
    with text.open("a") as file:
        file.write('{"text": "two"}\n')
    os.utime(text, ns=times)
    assert identity(text) != before
    other = text.with_name("b.jsonl")
    other.write_text('{"text": "one"}\n')
    os.utime(other, ns=times)
    assert identity(other) != before


def test_a_directory_is_told_by_all_of_its_files(text: Path) -> None:
    (text.parent / "b.jsonl").write_text('{"text": "one"}\n')
    source = Source(str(text.parent))
    before = files_identity("src", source, text.parent)
    os.utime(text.parent / "b.jsonl", ns=(0, 0))
    assert files_identity("src", source, text.parent) != before


def test_a_saved_data_set_is_told_by_its_state(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"_fingerprint": "1"}')
    source = Source(str(tmp_path))
    before = files_identity("src", source, tmp_path)
    (tmp_path / "state.json").write_text('{"_fingerprint": "2"}')
    assert files_identity("src", source, tmp_path) != before


def test_texts_and_tables_are_told_by_the_rules_of_reading(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {suffix: text.with_name(f"one.{suffix}.gz") for suffix in ("txt", "csv", "tsv", "jsonl")}
    for path in paths.values():
        path.write_bytes(b"one")

    def identities() -> dict[str, bytes]:
        return {suffix: files_identity("src", Source(str(path)), path.parent) for suffix, path in paths.items()}

    before = identities()
    monkeypatch.setattr(shards, "READ_AS", {kind: version + 1 for kind, version in shards.READ_AS.items()})
    changed = {suffix for suffix, identity in identities().items() if identity != before[suffix]}
    assert changed == {"txt", "csv", "tsv"}


def test_saved_splits_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text(f'{{"_fingerprint": "{split}"}}')
    train, test = (files_identity("src", Source(str(tmp_path), split=split), tmp_path) for split in ("train", "test"))
    assert train != test and b"train" in train


def small_copy() -> Any:
    return copy.deepcopy(load_hf_tokenizer("danube-small"))


def test_a_conversation_is_told_by_tokenizer_template_and_special_tokens() -> None:
    assert ChatEncoder(small_copy()).fingerprint == ChatEncoder(small_copy()).fingerprint
    own = small_copy()
    own.chat_template = DANUBE_TEMPLATE
    assert ChatEncoder(own).fingerprint == ChatEncoder(small_copy()).fingerprint
    template, backend, special = small_copy(), small_copy(), small_copy()
    template.chat_template = DANUBE_TEMPLATE.replace("| trim", "")
    backend.backend_tokenizer.pre_tokenizer = None
    special.eos_token = "<unk>"
    fingerprints = {ChatEncoder(one).fingerprint for one in (small_copy(), template, backend, special)}
    assert len(fingerprints) == 4


def test_a_document_is_told_by_the_pieces_and_both_end_tokens() -> None:
    backend = load_hf_tokenizer("danube-small").backend_tokenizer

    def made(bos: str | None, eos: str) -> str:
        options = {} if bos is None else {"bos_token": bos}
        return fingerprint_of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **options))

    assert made("<s>", "</s>") == DocumentTokenizer("danube-small").fingerprint
    assert len({made("<s>", "</s>"), made("<unk>", "</s>"), made("<s>", "<unk>"), made(None, "</s>")}) == 4


def test_addresses_with_one_last_name_have_directories_of_their_own(tmp_path: Path) -> None:
    one, other = (finished_directory(f"s3://{bucket}/shards/web", tmp_path) for bucket in ("one", "two"))
    assert one != other and one.name.startswith("web-") and one.parent == tmp_path / "shards"
    assert finished_directory("s3://one/shards/web/", tmp_path) == one
