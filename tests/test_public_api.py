"""The package as a notebook uses it: load, fit, Run, and data modules and tasks under one's own trainer."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins import AsyncCheckpointIO

import lightning_danube as danube
from lightning_danube.__main__ import main
from lightning_danube.callbacks import Checkpoints, CurriculumStages
from lightning_danube.generation.token_stream import generate
from lightning_danube.pretraining import CurriculumData, Pretraining
from lightning_danube.tokens.chat_template import Message, encode_chat, end_ids
from lightning_danube.training.trainer import check_trainer
from lightning_danube.weights.loading import load_decoder
from tests.tiny_models import save_tiny

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def test_every_public_name_is_there() -> None:
    assert all(getattr(danube, name) is not None for name in danube.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        danube.fitt  # noqa: B018


def test_generate_says_what_the_command_line_says(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["--temperature", "0"], {}),
        (["--temperature", "1.5", "--top-k", "0", "--seed", "3"], {"temperature": 1.5, "seed": 3}),
    ]
    for options, arguments in cases:
        command = ["generate", "--weights", str(model), "--prompt", "the", "--max-new-tokens", "12", "--device", "cpu"]
        assert main([*command, *options]) == 0
        said = danube.load(str(model), device="cpu").generate("the", max_new_tokens=12, **arguments)
        assert capsys.readouterr().out == f"the{said}\n"


def test_pieces_of_a_stream_are_the_text(model: Path) -> None:
    loaded = danube.load(str(model), device="cpu")
    assert "".join(loaded.stream("the", 12)) == loaded.generate("the", 12)
    assert repr(loaded) == f"LanguageModel({loaded.decoder.config.parameters:,} parameters, context of 128 tokens)"


def test_a_conversation_keeps_its_history(model: Path) -> None:
    loaded = danube.load(str(model), device="cpu")
    session = loaded.chat(max_new_tokens=8)
    with torch.inference_mode():
        first = "".join(session.ask("the"))
        second = "".join(session.ask("the"))
    assert first == loaded.ask("the", max_new_tokens=8)
    history: list[Message] = [{"role": "user", "content": "the"}, {"role": "assistant", "content": first}]
    ids = encode_chat(loaded.tokenizer, [*history, {"role": "user", "content": "the"}], add_generation_prompt=True)
    (new,) = generate(loaded.decoder, [ids], 8, eos_ids=end_ids(loaded.tokenizer))
    assert second == loaded.tokenizer.decode(new, skip_special_tokens=True) != first
    assert session.turns == [("the", first), ("the", second)]


def test_an_empty_prompt_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="the prompt is empty: give at least one word"):
        danube.load(str(model), device="cpu").generate("")


def test_fit_trains_as_the_command_line_does(tiny: Path, tiny_run: Path) -> None:
    run = danube.fit(
        str(tiny / "tiny.yaml"), name="python", trainer={"log_every_n_steps": 2}, data={"validation_rows": 4}
    )
    assert run.directory == tiny / "runs" / "python" / "version_0"
    assert run.config["trainer"]["log_every_n_steps"] == 2
    assert run.config["data"]["init_args"]["validation_rows"] == 4
    assert run.summary["steps"] == 26
    theirs, mine = load_decoder(str(tiny_run)), run.load().decoder
    for (name, a), (_, b) in zip(theirs.named_parameters(), mine.named_parameters(), strict=True):
        assert torch.equal(a, b.to(a.dtype)), name
    assert danube.Run(tiny / "runs" / "python").directory == run.directory
    assert run.checkpoint.name == "stage_3_finish_step_00000026.ckpt"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": {"context_lenght": 3}}, "'context_lenght' is not an option of CurriculumData: did you mean"),
        ({"trainer": {"max_step": 3}}, "max_step"),
        ({"nmae": "x"}, "nmae"),
    ],
)
def test_a_mistake_is_a_value_error(tiny: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        danube.fit(str(tiny / "tiny.yaml"), **overrides)
    assert "\n" not in str(error.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run: it holds no config\.yaml and no version_<n>"):
        danube.Run(tmp_path)
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(ValueError, match="does not exist: the run was stopped before its first validation"):
        _ = danube.Run(tmp_path).summary
    with pytest.raises(ValueError, match="is complete"):
        _ = danube.Run(tmp_path).checkpoint


def parts(tiny: Path) -> tuple[CurriculumData, Pretraining]:
    """The tiny run in Python: options as mappings, as they stand in its YAML."""
    seed_everything(3, verbose=False)
    data = CurriculumData(
        {"web": {"path": str(tiny / "web.jsonl")}, "wiki": str(tiny / "wiki.jsonl")},  # type: ignore[dict-item]
        [
            {"name": "foundation", "tokens": "3K", "mix": {"web": 90.6, "wiki": 9.4}},  # type: ignore[list-item]
            {"name": "refinement", "tokens": "2K", "mix": {"web": 81.7, "wiki": 18.3}},  # type: ignore[list-item]
            {"name": "finish", "tokens": "1.5K", "mix": {"web": 51.6, "wiki": 48.4}},  # type: ignore[list-item]
        ],
        tokenizer="danube-small",
        context_length=32,
        batch_tokens=256,
        seed=3,
        held_out=0.05,
        validation_rows=8,
        cache_dir=str(tiny / "cache"),
        processes=1,
    )
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    task = Pretraining(
        {"peak": 1.0e-2, "final": 1.0e-3, "warmup": "1K"},  # type: ignore[arg-type]
        decoder=shape | {"num_key_value_heads": 2},  # type: ignore[arg-type]
        vocab_size=data.vocab_size,
        context_length=data.context_length,
        batch_tokens=data.batch_tokens,
        total_tokens=data.total_tokens,
    )
    return data, task


def test_a_trainer_in_python_trains_as_the_command_line_does(tiny: Path, tiny_run: Path) -> None:
    data, task = parts(tiny)
    trainer = danube.make_trainer(
        "own",
        runs=tiny / "runs",
        callbacks=[CurriculumStages(), Checkpoints(every_n_steps=5)],
        accelerator="cpu",
        precision="32-true",
        enable_progress_bar=False,
    )
    trainer.fit(task, data)
    theirs = load_decoder(str(tiny_run))
    for (name, a), (_, b) in zip(theirs.named_parameters(), task.decoder.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (tiny / "runs" / "own" / "version_0" / "checkpoints" / "stage_3_finish_step_00000026.ckpt").is_file()


def test_a_trainer_that_would_train_otherwise_is_refused(tiny: Path) -> None:
    data, task = parts(tiny)
    for options, message in (
        ({"enable_checkpointing": False}, "the trainer clips no gradient: make the trainer with"),
        ({"gradient_clip_val": 1.0}, "the trainer's checkpoints are not durable"),
    ):
        trainer = Trainer(max_epochs=1, default_root_dir=str(tiny), **QUIET, **options)
        with pytest.raises(ValueError, match=message):
            trainer.fit(task, data)


def test_the_refused_settings_may_be_chosen() -> None:
    for options in (
        {"gradient_clip_val": 0.0, "enable_checkpointing": False},
        {"gradient_clip_val": 1.0, "plugins": [AsyncCheckpointIO()]},
    ):
        check_trainer(Trainer(**QUIET, **options))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"web": {"pth": "x"}}, "data.sources.web has the option 'pth': did you mean 'path'?"),
        ({"web": {"text": "x"}}, "data.sources.web has no path: the options are path, text"),
        ({"web": 3}, "data.sources.web is 3: give a mapping with the options path"),
    ],
)
def test_a_wrong_mapping_is_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CurriculumData(given, [], context_length=32, batch_tokens=256)
