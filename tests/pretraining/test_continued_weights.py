"""Pre-training that continues trained weights: what it takes over from them, and whole runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.runs import newest_checkpoint
from lightning_danube.cli.configs import planned_run, with_facts_of_weights
from lightning_danube.model import DecoderShape
from lightning_danube.pretraining.continued_weights import ContinuedWeights
from lightning_danube.pretraining.settings import PretrainingSettings
from lightning_danube.tokens.tokenizer import load_hf_tokenizer
from lightning_danube.training.optim import LearningRate, Muon
from lightning_danube.weights.loading import load_decoder, load_model
from lightning_danube.weights.lora import Lora
from lightning_danube.weights.tokenizers import document_tokenizer
from tests.commands import fit
from tests.pretraining.test_run import assert_same_training_state
from tests.tiny_models import CONFIG, save_tiny

NEW = ["river stone", "<green>"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """262 tokens, and 272 rows of the embedding."""
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny"))


def continued(weights: str, context_length: int = 128, **given: Any) -> ContinuedWeights:
    return ContinuedWeights.of(weights, given.get("stated"), given.get("tokenizer"), context_length)


def test_the_decoder_is_that_of_the_weights(weights: str) -> None:
    for context_length in (16, 128):
        assert continued(weights, context_length, tokenizer=document_tokenizer(weights)) == ContinuedWeights(CONFIG, {})
    shape = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(DecoderShape)}
    # What says nothing about trained weights may be stated otherwise.
    continued(weights, stated=DecoderShape(**{**shape, "attention_dropout": 0.1, "initializer_range": 1.0}))
    with pytest.raises(ValueError, match=r"model\.decoder is not the shape of .*: num_hidden_layers 3 \(there 2\):"):
        continued(weights, stated=DecoderShape(**{**shape, "num_hidden_layers": 3}))


def test_a_longer_context_is_one_that_the_rotary_base_supports(tmp_path: Path, weights: str) -> None:
    with pytest.raises(ValueError, match=r"context_length is 512, .* made for 128, .* \(100,000\) .* than 279: lower"):
        continued(weights, 512)
    assert continued(weights, 279).config == dataclasses.replace(CONFIG, max_position_embeddings=279)
    window = save_tiny(tmp_path / "window", dataclasses.replace(CONFIG, sliding_window=100))
    assert continued(str(window), 512).config.max_position_embeddings == 512


def test_another_tokenizer_is_refused_unless_it_has_only_more_tokens(weights: str) -> None:
    with pytest.raises(ValueError, match=r"'danube-small' gives other ids than the tokenizer of .*tiny"):
        continued(weights, tokenizer=document_tokenizer("danube-small"))
    tokenizer = document_tokenizer(weights, ["the the", "<é☺>"])
    found = continued(weights, tokenizer=tokenizer)
    own = load_hf_tokenizer(weights)
    assert found.pieces == {262: own("the the", add_special_tokens=False).input_ids, 263: own("<é☺>").input_ids[1:]}
    assert found.config == CONFIG  # the vocabulary is padded: there is room
    many = document_tokenizer(weights, [f"<{n}>" for n in range(12)])
    assert continued(weights, tokenizer=many).config.vocab_size == 274


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no shape: give model.decoder"),
        ({"decoder": "danube3-500m", "lora": Lora()}, "model.weights names no weights to adapt"),
        ({"weights": "x", "lora": Lora(), "optimizer": Muon()}, "Muon, which trains whole matrices"),
        ({"weights": "x", "lora": Lora(), "compile_blocks": True}, "model.compile_blocks is for whole matrices"),
        ({"weights": "x", "lora": Lora(), "float8": True}, "model.float8 is for whole matrices"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainingSettings(
            LearningRate(1e-3, 0.0, 0), vocab_size=9, context_length=8, batch_tokens=8, total_tokens=8, **options
        )


def test_the_weights_say_what_the_data_leave_open(tiny: Path, weights: str, tmp_path: Path) -> None:
    config = tmp_path / "open.yaml"
    lines = [line for line in (tiny / "tiny.yaml").read_text().splitlines() if "tokenizer:" not in line]
    config.write_text("\n".join(line for line in lines if "context_length:" not in line))
    args = ["--config", str(config)]
    assert with_facts_of_weights(args) == args
    begins = ["--model.init_args.weights", weights]
    found = with_facts_of_weights([*args, *begins])
    assert found == [
        *args, *begins, f"--data.init_args.tokenizer={weights}", "--data.init_args.context_length=128"
    ]  # fmt: skip
    stated = [*args, *begins, "--data.init_args.tokenizer", "mistral", "--data.context_length=64"]
    assert with_facts_of_weights(stated) == stated


def test_plan_knows_the_weights_and_their_new_tokens(tiny: Path, weights: str) -> None:
    flags = [
        *(f"--model.init_args.weights={weights}", "--model.init_args.decoder=null"),
        f"--data.init_args.tokenizer={weights}",
        f"--data.init_args.new_tokens={json.dumps([f'<{n}>' for n in range(12)])}",
    ]
    planned = planned_run([str(tiny / "tiny.yaml")], [*flags, "--model.init_args.lora.rank=2"])
    assert planned.model.config == dataclasses.replace(CONFIG, vocab_size=274)
    assert planned.model.lora == Lora(rank=2)


# --- whole runs -------------------------------------------------------------------------------------------------------


def continue_run(tiny: Path, base: Path, *options: str) -> int:
    return fit(
        tiny,
        *("--model.init_args.decoder", "null", "--model.init_args.weights", str(base)),
        *("--trainer.num_sanity_val_steps", "-1", "--data.init_args.new_tokens", json.dumps(NEW), *options),
    )


LORA = ["--model.init_args.lora.rank", "2"]


@pytest.mark.medium
@pytest.mark.parametrize("options", [[], LORA], ids=["whole", "adapter"])
def test_a_continued_run_begins_where_its_base_ended_and_goes_on_exactly(
    tiny: Path, tiny_run: Path, options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert continue_run(tiny, tiny_run, *options) == 0
    printed = capsys.readouterr().out
    run = tiny / "runs" / "tiny" / "version_0"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weights"] == str(tiny_run) and "before training" in printed
    base = json.loads((tiny_run / "summary.json").read_text())
    # The texts hold neither of the new tokens often, so the loss before the first step is about that of the base.
    assert summary["val_loss_before"]["wiki"] == pytest.approx(base["val_loss"]["wiki"], abs=0.3)
    assert summary["val_loss"]["web"] < summary["val_loss_before"]["web"]
    assert (summary["trained_parameters"] < summary["parameters"]) == bool(options)

    stopped = ["--name", "stopped", *options]
    assert continue_run(tiny, tiny_run, *stopped, "--trainer.max_steps", "7") == 0
    assert continue_run(tiny, tiny_run, *stopped, "--ckpt_path", "last") == 0
    other = tiny / "runs" / "stopped" / "version_0"
    ends = [newest_checkpoint(one) for one in (run, other)]
    assert ends[0] is not None and ends[1] is not None
    assert_same_training_state(ends[0], ends[1])
    resumed = json.loads((other / "summary.json").read_text())
    assert resumed["val_loss_before"] == summary["val_loss_before"] and resumed["val_loss"] == summary["val_loss"]

    # The run is a model like any other: its tokenizer has the new tokens, and so has an export.
    decoder, tokenizer = load_model(str(run), dtype="float32")
    ids = tokenizer("under river stone <green>", add_special_tokens=False).input_ids
    assert {4096, 4097} <= set(ids) and decoder.config.vocab_size == 4098
    exported = tmp_path / "exported"
    assert main(["export", "--weights", str(run), "--out", str(exported)]) == 0
    assert load_hf_tokenizer(str(exported))("under river stone <green>", add_special_tokens=False).input_ids == ids
    assert torch.equal(load_decoder(str(exported))(torch.tensor([ids])), decoder(torch.tensor([ids])))
    gguf = tmp_path / "model.gguf"
    assert main(["export", "--weights", str(run), "--format", "gguf", "--type", "F32", "--out", str(gguf)]) == 0
    theirs, their_tokenizer = load_model(str(gguf), dtype="float32")
    assert their_tokenizer("under river stone <green>", add_special_tokens=False).input_ids == ids
    assert torch.allclose(theirs(torch.tensor([ids])), decoder(torch.tensor([ids])), atol=1e-4)  # float32
    if options:
        assert main(["export", "--weights", str(run), "--format", "peft", "--out", str(tmp_path / "adapter")]) == 0
        assert len(load_hf_tokenizer(str(tmp_path / "adapter"))) == 4098
        assert "resize_token_embeddings(4098)" in (tmp_path / "adapter" / "README.md").read_text()
        capsys.readouterr()
        base_and_adapter = ["--weights", str(tiny_run), "--adapter", str(tmp_path / "adapter")]
        assert main(["export", *base_and_adapter, "--out", str(tmp_path / "merged")]) == 2
        assert "the adapter has new tokens" in capsys.readouterr().err
