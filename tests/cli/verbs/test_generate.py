import json
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch

from lightning_danube.__main__ import main
from lightning_danube.generation.packing import pack_for_generation
from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.token_stream import generate
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.tokens.chat_template import DANUBE_TEMPLATE, encode_chat
from lightning_danube.tokens.tokenizer import fingerprint_of, load_hf_tokenizer
from lightning_danube.weights.huggingface import save_hf
from lightning_danube.weights.loading import load_model
from lightning_danube.weights.names import locate
from lightning_danube.weights.tokenizers import load_tokenizer, not_tuned_for_chat

PROMPTS = ["The river", "Seven green mountains walk slowly under", "x"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of few channels with the whole vocabulary of Danube3, as a Hugging Face directory."""
    torch.manual_seed(0)
    config = DecoderConfig(32, 48, 2, 4, 2, vocab_size=32000, initializer_range=0.2, max_position_embeddings=64)
    directory = tmp_path_factory.mktemp("model") / "weights"
    save_hf(Decoder(config), directory, load_hf_tokenizer("mistral"))
    return str(directory)


def expected(weights: str, prompt_ids: list[int], new_tokens: int, sampling: Sampling, seed: int = 0) -> str:
    """The continuation, by the model alone, one prompt at a time."""
    decoder, tokenizer = load_model(weights)
    pack_for_generation(decoder)
    (new,) = generate(decoder, [prompt_ids], new_tokens, sampling=sampling, seeds=[seed])
    return str(tokenizer.decode(prompt_ids + new))[len(str(tokenizer.decode(prompt_ids))) :]


def ids_of(prompt: str) -> list[int]:
    return [1, *load_hf_tokenizer("mistral")(prompt, add_special_tokens=False).input_ids]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["generate", *args]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def test_one_prompt_is_printed_with_its_continuation_and_nothing_else(
    weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed(capsys, "--weights", weights, "--prompt", "The river", "--max-new-tokens", "12", "--temperature", "0")
    assert out == "The river" + expected(weights, ids_of("The river"), 12, Sampling()) + "\n"


def test_many_prompts_get_what_each_gets_alone(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    # fmt: off
    options = [
        "--max-new-tokens", "9", "--temperature", "1.5", "--top-k", "40", "--top-p", "0.9",
        "--repetition-penalty", "1.2", "--seed", "7",
    ]
    # fmt: on
    sampling = Sampling(repetition_penalty=1.2, temperature=1.5, top_k=40, top_p=0.9)
    out = printed(capsys, "--weights", weights, *flags, *options, "--batch-size", "2", "--jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == [
        {
            "prompt": prompt,
            "text": expected(weights, ids_of(prompt), 9, sampling, seed=7 + n),
            "prompt_tokens": len(ids_of(prompt)),
            "tokens": 9,
            "finish_reason": "length",
            "seed": 7 + n,
        }
        for n, prompt in enumerate(PROMPTS)
    ]
    plain = printed(capsys, "--weights", weights, *flags, *options)
    assert plain == "\n".join(row["prompt"] + row["text"] + "\n" for row in rows)


def test_stop_strings_and_windows(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--weights", weights, "--prompt", "The river", "--temperature", "0", "--jsonl"]
    free = json.loads(printed(capsys, *options, "--max-new-tokens", "12"))["text"]
    row = json.loads(printed(capsys, *options, "--max-new-tokens", "12", "--stop", "never", "--stop", free[7:9]))
    assert row["text"] == free[: free.index(free[7:9])]
    assert row["finish_reason"] == "stop"
    row = json.loads(printed(capsys, *options, "--max-new-tokens", "100", "--window", "20"))
    assert (row["tokens"], row["finish_reason"]) == (100, "length")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "stdin as text", "stdin as jsonl"])
def test_prompts_from_a_file_follow_those_from_arguments(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text = "\n".join(PROMPTS)
    if "jsonl" in name:  # a blank line is not a row
        text = "\n".join(json.dumps({"id": 3, "prompt": prompt}) for prompt in PROMPTS) + "\n"
    if "stdin" in name:
        monkeypatch.setattr(sys, "stdin", StringIO(text + "\n"))
        file = "-"
    else:
        file = str(tmp_path / name)
        Path(file).write_text(text + "\n")
    out = printed(
        capsys, "--weights", weights, "--prompt", "first", "--prompts", file, "--max-new-tokens", "1", "--jsonl"
    )
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["first", *PROMPTS]


@pytest.fixture(scope="session")
def chat_model(weights: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with a chat template, as an export of a chat run has it."""
    directory = shutil.copytree(weights, tmp_path_factory.mktemp("model") / "chat")
    (directory / "chat_template.jinja").write_text(DANUBE_TEMPLATE)
    return str(directory)


ASK = ("--chat", "--prompt", "Why?", "--max-new-tokens", "8", "--temperature", "0")


def test_a_question_gets_its_answer_only(chat_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    ids = encode_chat(load_hf_tokenizer("mistral"), [{"role": "user", "content": "Why?"}], True)
    assert printed(capsys, "--weights", chat_model, *ASK) == expected(chat_model, ids, 8, Sampling()) + "\n"


def test_a_model_that_was_not_tuned_for_chat_answers_with_a_warning(
    weights: str, chat_model: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = printed(capsys, "--weights", chat_model, *ASK)
    for model in (weights, str(tiny_run)):
        capsys.readouterr()
        assert main(["generate", "--weights", model, *ASK]) == 0
        said = capsys.readouterr()
        assert said.err == (
            f"warning: {model} was not tuned for chat, so it may not answer the question: fine-tune it first, or leave "
            "out --chat to continue the text\n"
        )
        assert (said.out == answer) == (model == weights)


def test_a_template_of_the_tokenizer_does_not_make_a_run_a_chat_model(
    tiny_run: Path, chat_model: str, tmp_path: Path
) -> None:
    """A pre-training run whose tokenizer is that of a chat model."""
    checkpoint = torch.load(locate(str(tiny_run)).path, weights_only=True)
    own = fingerprint_of(load_tokenizer(locate(chat_model)))
    checkpoint["CurriculumData"]["tokenizer"] |= {"name": chat_model, "fingerprint": own}
    torch.save(checkpoint, tmp_path / "run.ckpt")
    run = locate(str(tmp_path / "run.ckpt"))
    tokenizer = load_tokenizer(run)
    assert tokenizer.chat_template == DANUBE_TEMPLATE
    assert "run.ckpt was not tuned for chat" in str(not_tuned_for_chat(run, tokenizer))
    checkpoint["CurriculumData"]["tokenizer"]["chat_template"] = DANUBE_TEMPLATE
    torch.save(checkpoint, tmp_path / "run.ckpt")
    assert not_tuned_for_chat(locate(str(tmp_path / "run.ckpt")), tokenizer) is None


def test_a_terminal_sees_the_text_as_it_comes(
    weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.flushed: list[str] = []

        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    options = ["--weights", weights, "--max-new-tokens", "12", "--temperature", "0"]
    assert main(["generate", *options, "--prompt", "The river"]) == 0
    assert terminal.flushed[0] == "The river"
    assert len(set(terminal.flushed)) > 5
    assert all(
        later.startswith(earlier) for earlier, later in zip(terminal.flushed, terminal.flushed[1:], strict=False)
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "there is nothing to continue: give --prompt or --prompts"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: there is no such file"),
        (["--prompts", "FILE.xyz"], "FILE.xyz: the format is not known by its name: use one of .jsonl"),
        (["--prompts", "FILE.txt"], "FILE.txt, row 2: the prompt is empty"),
        (["--prompts", "LAST.txt"], "LAST.txt, row 2: the prompt is empty"),
        (["--prompts", "LAST.jsonl"], "LAST.jsonl, row 2: the prompt is empty"),
        (["--prompts", "FILE.jsonl"], "FILE.jsonl, row 2: there is no column 'prompt', only text"),
        (["--prompts", "BAD.jsonl"], "BAD.jsonl, row 1: not JSON"),
        (["--prompts", "-"], "standard input, row 2: not JSON (Expecting value at character 1)"),
        (["--prompts", "LONG.txt"], "LONG.txt, row 2 has 72 tokens, and with 2 new ones exceeds the context of 64"),
        (["--prompt", "a", "--prompt", "b " * 70], "--prompt number 2 has 72 tokens"),
        (
            ["--prompt", "x", "--max-new-tokens", "99"],
            "--prompt has 2 tokens, and with 99 new ones exceeds the context",
        ),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size is 0: it must be at least 1"),
        (["--prompt", "x", "--stop", ""], "--stop is empty: give at least one character"),
        (
            ["--prompt", "x", "--window", "65"],
            "--window is 65: it has to be at least 2 and at most the context of 64",
        ),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0; it has to be above 0 and at most 1"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty is 0.0; it has to be above 0"),
    ],
)
def test_wrong_requests_are_answered_in_one_line(
    weights: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    message: str,
) -> None:
    (tmp_path / "FILE.xyz").write_text("x")
    (tmp_path / "FILE.txt").write_text("one\n\nthree\n")
    (tmp_path / "LAST.txt").write_text("one\n \n")
    (tmp_path / "LAST.jsonl").write_text('{"prompt": "one"}\n{"prompt": ""}\n')
    (tmp_path / "LONG.txt").write_text("one\n" + "two " * 70)
    (tmp_path / "FILE.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    (tmp_path / "BAD.jsonl").write_text('{"prompt": "one\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", StringIO('{"prompt": "one"}\ntwo\n'))
    assert main(["generate", "--weights", weights, "--max-new-tokens", "2", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
