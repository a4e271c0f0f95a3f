"""A run on token files of other tools, mixed with a source of text."""

import json
from pathlib import Path

import pytest
import torch

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.cli.configs import configured_data, planned_run
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.pretraining.supply import supplies
from lightning_danube.tokens.overlap import TrainingTexts, overlap
from tests.tokens.foreign.written import DOCUMENTS, FILES


@pytest.fixture
def config(tiny: Path) -> Path:
    """The tiny run, whose source "web" is datatrove's files in place of texts."""
    text = (tiny / "tiny.yaml").read_text()
    path = str(tiny / "web.jsonl")
    assert text.count(path) == 1
    text = text.replace(path, str(FILES / "datatrove" / "*.ds")).replace("held_out:", "max_epochs: 9\n    held_out:")
    (tiny / "files.yaml").write_text(text)
    return tiny / "files.yaml"


def data_of(config: Path, *overrides: str) -> CurriculumData:
    data = configured_data("prepare", [str(config)], list(overrides))
    assert isinstance(data, CurriculumData)
    return data


@pytest.mark.medium
def test_the_verbs_say_what_they_found(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--config", str(config)]) == 0
    said = capsys.readouterr().out
    assert "web: nothing to make, the token files are read where they are: 2 datatrove files, 5,181 tokens" in said
    assert "checked: 4,899 ids, the ends of 52 documents and the tokenizer" in said
    assert main(["prepare", "--config", str(config), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "web: all 5,181 ids and the ends of all 60 documents are right, in 2 datatrove files" in said
    assert main(["inspect", "--config", str(config)]) == 0
    said = capsys.readouterr().out
    assert "held out for validation: 3 of 60" in said and "2 datatrove files, 5,181 tokens" in said
    assert "rules for documents (data.filters, deduplicate, decontaminate) do not apply to token files" in said
    assert "documents begin without the begin token, which documents of text sources have" in said
    assert main(["plan", "--config", str(config)]) == 0
    assert "its token files" in capsys.readouterr().out


@pytest.mark.medium
def test_files_without_a_list_of_documents_are_shown_and_planned(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text().replace("datatrove/*.ds", "olmo/wide.npy"))
    assert main(["inspect", "--config", str(config)]) == 0
    said = capsys.readouterr().out
    assert "1 OLMo file, 5,181 tokens, of which" in said and "NOTHING IS LEARNED" not in said
    data = data_of(config)
    supply = supplies(data, {})["web"]
    data.prepare()
    data.setup("fit")
    assert supply.tokens == len(data.train_streams["web"]) and supply.said_by == "its token files"
    from lightning_danube.pretraining.summary import source_table

    assert "not listed" in source_table(data)


def test_planning_far_from_the_files_leaves_their_tokens_open(config: Path) -> None:
    config.write_text(config.read_text().replace("datatrove/*.ds", "nowhere/*.ds"))
    assert supplies(planned_run([str(config)], []).data, {})["web"].tokens is None


def test_a_damaged_listing_is_named(config: Path) -> None:
    config.write_text(config.read_text().replace("datatrove/*.ds", "olmo/wide.npy"))
    data = data_of(config)
    data.prepare()
    assert data.shards_directory("web").parent == data.cache_dir / "token-files"
    (data.shards_directory("web") / "listing.json").write_text("{")
    with pytest.raises(ValueError, match=r"listing.json is damaged .*remove it, and it is made again"):
        data.setup("fit")


def test_a_tokenizer_is_not_trained_on_token_files(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "--config", str(config), "--vocab-size", "400", "--out", str(config.parent / "t")]) == 2
    assert "holds token ids, not text: name the texts they were made of" in capsys.readouterr().err


def test_token_files_are_not_searched_for_questions(config: Path) -> None:
    data = data_of(config)
    found = overlap([{"question": DOCUMENTS[6] * 2}], TrainingTexts({"web": data.sources["web"]}, data.cache_dir))
    assert found.not_read == ["web"] and not found.found


@pytest.mark.medium
def test_damage_stops_fit_in_one_line(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.ds").write_bytes(b"12345")
    config.write_text(config.read_text().replace(str(FILES / "datatrove" / "*.ds"), str(tmp_path / "x.ds")))
    assert main(["fit", "--config", str(config)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "source 'web': " in said[-1] and "x.ds.index is missing" in said[-1]
    assert not (config.parent / "runs").exists() or not list((config.parent / "runs").rglob("summary.json"))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("path", "other"),
    [("datatrove/*.ds", "olmo/wide.npy"), ("megatron/wide.bin", "datatrove/*.ds"), ("mosaic/ragged", "datatrove/*.ds")],
)
def test_a_stopped_run_goes_on_as_the_uninterrupted_one(path: str, other: str, config: Path) -> None:
    config.write_text(config.read_text().replace("datatrove/*.ds", path))

    def fit(name: str, *overrides: str) -> int:
        return main(["fit", "--config", str(config), "--name", name, *overrides])

    assert fit("whole") == 0
    assert fit("parts", "--trainer.max_steps", "15") == 0
    saved = config.parent / "runs" / "parts" / "version_0" / "checkpoints"
    (last,) = saved.glob("*step_00000015.ckpt")
    assert fit("parts", "--ckpt_path", str(last), "--data.init_args.workers", "2") == 0
    runs = [config.parent / "runs" / name for name in ("whole/version_0", "parts/version_1")]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    for key in ("val_loss", "stages", "tokens", "unigram_loss"):
        assert summaries[0][key] == summaries[1][key]
    ledgers = [stage["tokens_by_source"] for stage in summaries[0]["stages"]]
    assert sum(sum(stage.values()) for stage in ledgers) == summaries[0]["tokens"] and ledgers[0]["web"] > 2500
    name = "checkpoints/stage_3_finish_step_00000026.ckpt"
    weights = [DurableCheckpointIO().load_checkpoint(run / name)["state_dict"] for run in runs]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    # Other tokens than those of the checkpoint are refused.
    config.write_text(config.read_text().replace(path, other))
    assert fit("other", "--ckpt_path", str(last)) == 2
    assert main(["report", str(runs[0])]) == 0
