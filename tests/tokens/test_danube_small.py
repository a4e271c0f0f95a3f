"""The small tokenizer of the package on the whole road: training, fine-tuning, prompts, exports and back."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_danube.__main__ import main
from lightning_danube.tokens.chat_template import MARKERS, encode_chat
from lightning_danube.tokens.tokenizer import load_hf_tokenizer
from lightning_danube.weights.loading import load_decoder
from lightning_danube.weights.names import locate
from lightning_danube.weights.tokenizers import load_tokenizer, tokenizer_of
from tests.chat.test_fine_tuning import CONFIG as CHAT_CONFIG
from tests.conftest import write_tiny
from tests.tokens.test_tokenizer import HARD

SMALL = ("--data.init_args.tokenizer", "danube-small")
TURNS = [{"role": "user", "content": "river?"}, {"role": "assistant", "content": "stone"}]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pre-trained run, and one that is fine-tuned from it."""
    directory = write_tiny(tmp_path_factory.mktemp("road"))
    assert main(["fit", "--config", str(directory / "tiny.yaml"), *SMALL]) == 0
    with (directory / "talk.jsonl").open("w") as file:
        for number in range(80):
            turns = [TURNS[0] | {"content": "river?" + " now" * (number % 7)}, TURNS[1]]
            file.write(json.dumps({"messages": turns}) + "\n")
    base = directory / "runs/tiny/version_0"
    (directory / "talk.yaml").write_text(CHAT_CONFIG.replace("TMP", str(directory)).replace("BASE", str(base)))
    assert main(["fit", "--config", str(directory / "talk.yaml"), "--data.init_args.epochs", "4"]) == 0
    return directory


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.medium
def test_a_runs_model_has_its_pieces(road: Path) -> None:
    name, tokenizer = tokenizer_of(str(road / "runs/tiny/version_0"))
    assert name == "danube-small" and tokenizer is load_hf_tokenizer("danube-small")
    config = (road / "runs/tiny/version_0/config.yaml").read_text()
    assert "tokenizer: danube-small" in config


@pytest.mark.medium
@pytest.mark.parametrize("run", ["tiny", "talk"])
def test_exports_keep_the_ids_and_the_words(run: str, road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, hf, gguf = road / "runs" / run / "version_0", road / f"{run}-hf", road / f"{run}.gguf"
    assert main(["export", "--weights", str(weights), "--out", str(hf)]) == 0
    assert main(["export", "--weights", str(weights), "--format", "gguf", "--type", "F32", "--out", str(gguf)]) == 0
    ours = load_tokenizer(locate(str(weights)))
    theirs, back = AutoTokenizer.from_pretrained(hf), load_tokenizer(locate(str(gguf)))
    for text in [*HARD, "".join(MARKERS)]:
        assert ids_of(theirs, text) == ids_of(back, text) == ids_of(ours, text), text
        assert theirs(text).input_ids == [1, *ids_of(ours, text)]
    assert AutoModelForCausalLM.from_pretrained(hf).config.vocab_size == len(theirs) == len(ours)
    greedy = ("--temperature", "0", "--max-new-tokens", "6")
    texts = {
        said(capsys, "generate", "--weights", place, "--prompt", "The river", *greedy) for place in (weights, hf, gguf)
    }
    assert len(texts) == 1
    assert theirs.chat_template == back.chat_template == ours.chat_template
    assert (ours.chat_template is None) == (run == "tiny"), "only a model that was taught to chat has a template"


@pytest.mark.medium
def test_a_fine_tuned_model_answers_by_its_markers(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = road / "runs/talk/version_0"
    question = ("--chat", "--prompt", "river?", "--temperature", "0", "--max-new-tokens", "4")
    assert said(capsys, "generate", "--weights", run, *question).strip() == "stone"
    assert main(["export", "--weights", str(run), "--out", str(road / "chat-hf")]) == 0
    theirs = AutoTokenizer.from_pretrained(road / "chat-hf")
    asked = theirs.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False)
    ours = encode_chat(load_tokenizer(locate(str(run))), TURNS[:1], True)
    assert asked == ours and len(ours) - len(ids_of(theirs, "river?")) == 3


@pytest.mark.medium
def test_it_is_known_to_prepare_plan_and_a_second_run(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ("--config", road / "tiny.yaml")
    assert "web" in said(capsys, "prepare", *config, *SMALL)
    parameters = load_decoder(str(road / "runs/tiny/version_0")).config.parameters
    assert f"{parameters:,} parameters" in said(capsys, "plan", *config, *SMALL)
    last = road / "runs/tiny/version_0/checkpoints"
    capsys.readouterr()
    assert (
        main(
            [
                "fit",
                *map(str, config),
                "--data.init_args.tokenizer",
                "mistral",
                "--ckpt_path",
                str(max(last.glob("*.ckpt"))),
            ]
        )
        == 2
    )
    assert "vocabulary of data.tokenizer 4096 (here 32000)" in capsys.readouterr().err


def test_a_name_with_a_typing_error_gets_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_tiny(tmp_path)
    assert main(["fit", "--config", str(directory / "tiny.yaml"), "--data.init_args.tokenizer", "danube-smal"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "give 'danube-small', 'mistral', 'danube3-chat', a directory or a hub id" in error
