"""Hub ids and their revisions, told apart from paths of this machine."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from lightning_danube.files import looks_like_path
from lightning_danube.terminal import as_typed
from lightning_danube.tokens.hub import download, first_line, hint_for, hub_id
from lightning_danube.tokens.tokenizer import adding_bos, load_hf_tokenizer
from tests.tiny_models import tiny_tokenizer


def test_a_hub_id_is_owner_and_name_that_lie_on_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") == hub_id("owner/name@v1.2") == "owner/name"
    assert hub_id("name") is hub_id("a/b/c") is hub_id("./owner/name") is hub_id("owner/name@") is None
    (tmp_path / "owner/name").mkdir(parents=True)
    assert hub_id("owner/name") is None
    # A misspelt name in a directory that exists is not a hub id.
    assert looks_like_path("owner/nam") and not looks_like_path("other/name")
    assert looks_like_path("runs/none"), "a missing run is not looked for on the hub"
    assert looks_like_path("a/b/c") and looks_like_path("a/") and not looks_like_path("other/name@refs/pr/1")


def test_a_similar_name_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    assert hint_for(str(tmp_path / "quikstart")) == f" (did you mean {tmp_path / 'quickstart'}?)"
    for name in ("train.jsonl", "mine.jsonl"):
        (tmp_path / name).touch()
    assert hint_for(str(tmp_path / "trian.jsonl")) == f" (did you mean {tmp_path / 'train.jsonl'}?)"
    assert hint_for(str(tmp_path / "nowhere.jsonl")) == "", "the same ending alone is not similar"
    assert hint_for("smolm2", "smollm2") == " (did you mean smollm2?)"
    assert hint_for(str(tmp_path / "nothing"), "smollm2") == hint_for("/nowhere/at/all") == ""


def test_a_missing_run_of_a_configuration_is_told_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/dpo-quickstart").mkdir(parents=True)
    fit = f"`{as_typed()} fit --config"
    for name in (
        "runs/sft-quickstart",
        "./runs/sft-quickstart/version_0",
        "runs/sft-quickstart/version_0/checkpoints/",
    ):
        assert hint_for(name) == f" ({fit} sft/quickstart` makes one)"
    assert hint_for("my runs/world/version_2") == f' ({fit} pretrain/world --runs "my runs"` makes one)'
    # No run of an evaluation holds weights, and "quickstart" of studies/ is no run.
    assert hint_for("runs/evaluation-quickstart/version_0") == "" == hint_for("elsewhere/quickstart")
    assert hint_for("runs/quickstart") == f" ({fit} quickstart` makes one)"
    (tmp_path / "runs/sft-quickstart/version_1").mkdir(parents=True)
    assert hint_for("runs/sft-quickstart/version_0") == " (did you mean runs/sft-quickstart/version_1?)"


def test_a_download_asks_for_the_named_revision_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert download("--weights", "owner/name@v2", ["*.json"]) == tmp_path
    assert download("--weights", "owner/name", ["*.json"]) == tmp_path
    options = {"allow_patterns": ["*.json"], "ignore_patterns": ["*/*"]}
    assert asked == [("owner/name", {"revision": revision, **options}) for revision in ("v2", None)]


def test_a_tokenizer_is_asked_for_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return tiny_tokenizer()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    load_hf_tokenizer.__wrapped__("nobody/nothing@v3")
    load_hf_tokenizer.__wrapped__("nobody/nothing")
    expected = [("nobody/nothing", {"revision": r, "trust_remote_code": False}) for r in ("v3", "main")]
    assert asked == expected


def test_an_error_is_shown_by_its_first_line_of_at_most_160_characters() -> None:
    assert first_line(ValueError("one.\ntwo")) == "one"
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("x" * 160 + "y")) == "x" * 160


def test_a_tokenizer_that_adds_bos_is_a_copy() -> None:
    tokenizer = load_hf_tokenizer("danube-small")
    before = tokenizer("river").input_ids
    adding = adding_bos(tokenizer)
    assert adding("river").input_ids == [tokenizer.bos_token_id, *before]
    assert tokenizer("river").input_ids == before
