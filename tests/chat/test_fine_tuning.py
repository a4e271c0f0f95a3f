"""Fine-tuning through the command line: what a run writes, that it goes on exactly, and that its model can be used."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_danube.__main__ import main
from lightning_danube.generation.token_stream import generate
from lightning_danube.tokens.chat_template import DANUBE_TEMPLATE, encode_chat, end_ids
from lightning_danube.weights.loading import load_decoder, load_model
from tests.commands import fit
from tests.pretraining.test_run import scalars
from tests.tiny_models import CONFIG as TINY_CONFIG
from tests.tiny_models import save_tiny
from tests.training.test_world_size import run_in_ranks

CONFIG = """
name: talk
runs: TMP/runs
seed_everything: 3
data:
  class_path: lightning_danube.chat.ChatData
  init_args:
    tokenizer: ${model.init_args.weights}
    context_length: 32
    batch_rows: 4
    micro_batch_size: 4
    held_out: 0.2
    cache_dir: TMP/cache
    sources:
      talk: {path: TMP/talk.jsonl}
model:
  class_path: lightning_danube.chat.SupervisedFineTuning
  init_args:
    weights: BASE
    learning_rate: {peak: 2.0e-2, final: 0.0, warmup: 128}
trainer:
  accelerator: cpu
  precision: 32-true
  num_sanity_val_steps: -1
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning_danube.callbacks.Progress
    - class_path: lightning_danube.callbacks.ChatSummary
      init_args: {questions: ["river?"], max_new_tokens: 4}
    - class_path: lightning_danube.callbacks.Throughput
    - class_path: lightning_danube.callbacks.Checkpoints
      init_args: {every_n_steps: 3}
"""
LORA = ("--model.init_args.lora.rank", "4", "--model.init_args.lora.dropout", "0.1")


@pytest.fixture
def talk(tmp_path: Path, mistral_run: Path) -> Path:
    """A directory with `talk.yaml`: about ten steps on answers that a model can learn."""
    return write_talk(tmp_path, mistral_run)


def write_talk(tmp_path: Path, base: Path) -> Path:
    with (tmp_path / "talk.jsonl").open("w") as file:
        for n in range(80):
            asked, said = ("river?", "stone") if n % 2 else ("mountain?", "green light")
            turns = [{"role": "user", "content": asked + " now" * (n % 5)}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": turns * (1 + n % 2)}) + "\n")
    (tmp_path / "talk.yaml").write_text(CONFIG.replace("TMP", str(tmp_path)).replace("BASE", str(base)))
    return tmp_path


def run_directory(talk: Path, name: str = "talk") -> Path:
    return talk / "runs" / name / "version_0"


def last_checkpoint(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(max(run.glob("checkpoints/*.ckpt")), weights_only=True)
    return loaded


def same_weights(left: Path, right: Path) -> bool:
    a, b = (last_checkpoint(run)["state_dict"] for run in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.medium
@pytest.mark.usefixtures("no_warnings")
def test_a_run_learns_the_answers_and_says_so(talk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(talk) == 0
    printed = capsys.readouterr()
    summary = json.loads((run_directory(talk) / "summary.json").read_text())
    assert summary["val_loss"]["talk"] < summary["val_loss_before"]["talk"] - 1
    assert summary["val_tokens"]["talk"] > 0 and summary["sources"]["talk"]["conversations"] == 80
    assert summary["trained_parameters"] == summary["parameters"]
    # The held-out loss before the first step, and at each tenth of the run.
    steps = list(scalars(run_directory(talk), "held_out/talk"))
    assert steps[0] == 0 and steps[-1] == summary["steps"] and len(steps) == 11
    (answer,) = summary["answers"]
    assert answer["question"] == "river?" and answer["before"] != answer["after"]
    assert answer["after"].split() and set(answer["after"].split()) <= {"stone", "green", "light"}
    for text in ("held-out answers, nats/token", "question: river?", "chat --weights", "of 32 places, "):
        assert text in printed.out
    assert "arning" not in printed.err + printed.out
    # The run is a model like any other, with the tokenizer that its base had.
    question = ["--chat", "--prompt", "river?", "--temperature", "0", "--max-new-tokens", "4"]
    assert main(["generate", "--weights", str(run_directory(talk)), *question]) == 0
    assert capsys.readouterr().out.strip() == answer["after"].strip()


@pytest.mark.medium
def test_few_conversations_train_with_a_warm_up_that_is_a_share(talk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The only step of a run has the peak rate, not that of its end, 0. A resumed run has the same shares."""
    file = talk / "few.yml"
    callbacks = yaml.safe_load(CONFIG)["trainer"]["callbacks"]
    callbacks[-1]["init_args"] = {"every_n_steps": None, "save_every": "20 %"}
    file.write_text(json.dumps({"trainer": {"callbacks": callbacks}}))
    few = ("--config", str(file), "--data.init_args.sources.talk.max_conversations", "6")
    share = ("--model.init_args.learning_rate.warmup", "8 %")
    # Six conversations are at most two steps: this is known before they are read.
    assert fit(talk, *few, "--model.init_args.learning_rate.warmup", "1K", "--name", "long") == 2
    assert "learning_rate.warmup is 1K, and the whole run has at most 256 tokens" in capsys.readouterr().err
    assert not (talk / "cache" / "conversations").exists() and not (talk / "runs").exists()
    assert fit(talk, *few, "--model.init_args.learning_rate.warmup", "200", "--name", "long") == 2
    assert "learning_rate.warmup is 200, and the whole run has 128 tokens: give a share" in capsys.readouterr().err
    assert fit(talk, *few, *share, "--name", "one") == 0
    assert "the run has only 1 optimizer step: more epochs (data.epochs)" in capsys.readouterr().err
    summary = json.loads((run_directory(talk, "one") / "summary.json").read_text())
    assert summary["val_loss"]["talk"] < summary["val_loss_before"]["talk"]
    more = (*few, *share, "--data.init_args.epochs", "10")
    assert fit(talk, *more, "--name", "whole") == 0
    assert "only" not in capsys.readouterr().err
    assert fit(talk, *more, "--name", "stopped", "--trainer.max_steps", "4") == 0
    saved = sorted(path.name for path in (run_directory(talk, "stopped") / "checkpoints").glob("*.ckpt"))
    assert saved == ["step_00000002.ckpt", "step_00000004.ckpt"]  # every fifth of the ten steps
    assert fit(talk, *more, "--name", "stopped", "--ckpt_path", "last") == 0
    assert same_weights(run_directory(talk, "whole"), run_directory(talk, "stopped"))


@pytest.mark.medium
def test_the_exported_model_is_asked_in_the_same_words(talk: Path) -> None:
    assert fit(talk) == 0
    run, exported = str(run_directory(talk)), talk / "exported"
    assert main(["export", "--weights", run, "--out", str(exported)]) == 0
    theirs: Any = AutoTokenizer.from_pretrained(exported)
    assert theirs.chat_template == DANUBE_TEMPLATE
    decoder, ours = load_model(run)
    for messages in ([("user", "river?")], [("user", " river?"), ("assistant", "stone"), ("user", "now 12\n")]):
        chat = [{"role": role, "content": content} for role, content in messages]
        ids = encode_chat(ours, chat, add_generation_prompt=True)
        assert theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == ids
    chat = [{"role": "user", "content": "river?"}]
    ids = encode_chat(ours, chat, add_generation_prompt=True)
    model: Any = AutoModelForCausalLM.from_pretrained(exported)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()
    (new,) = generate(decoder, [ids], 4, eos_ids=end_ids(ours))
    assert answer[: len(new)] == new


@pytest.mark.medium
def test_tensorboard_shows_the_answers_of_each_validation_beside_the_first_ones(talk: Path) -> None:
    assert fit(talk, "--trainer.val_check_interval", "5") == 0
    events = EventAccumulator(str(run_directory(talk)), size_guidance={"tensors": 0}).Reload()
    shown = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("answers/1_river/text_summary")]
    summary = json.loads((run_directory(talk) / "summary.json").read_text())
    # Before, after each fifth step, and after the last one, which no validation followed.
    assert len(shown) == 1 + summary["steps"] // 5 + 1 and summary["val_step"] == summary["steps"] - 1 == 15
    assert shown[0].splitlines()[0] == "| question | step 0 |"
    assert shown[-1].splitlines()[0] == f"| question | before | step {summary['steps']} |"
    (answer,) = summary["answers"]
    cells = [cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", shown[-1].splitlines()[2])[1:-1]]
    assert [cell.replace("<br>", "\n") for cell in cells] == [
        "river?",
        answer["before"].strip(),
        answer["after"].strip(),
    ]


@pytest.mark.medium
@pytest.mark.parametrize("options", [(), LORA])
def test_going_on_equals_never_having_stopped(talk: Path, options: tuple[str, ...]) -> None:
    assert fit(talk, *options) == 0
    assert fit(talk, *options, "--name", "stopped", "--trainer.max_steps", "4") == 0
    assert fit(talk, *options, "--name", "stopped", "--ckpt_path", "last") == 0
    assert same_weights(run_directory(talk), run_directory(talk, "stopped"))
    full, stopped = (
        json.loads((run_directory(talk, name) / "summary.json").read_text()) for name in ("talk", "stopped")
    )
    for key in ("steps", "val_loss", "val_loss_before", "answers"):
        assert full[key] == stopped[key], key


@pytest.mark.medium
def test_an_adapter_is_all_that_trains_and_all_that_is_saved(talk: Path, mistral_run: Path) -> None:
    assert fit(talk, *LORA) == 0
    run = run_directory(talk)
    summary, checkpoint = json.loads((run / "summary.json").read_text()), last_checkpoint(run)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    assert sum(tensor.numel() for tensor in checkpoint["state_dict"].values()) == summary["trained_parameters"]
    assert summary["val_loss"]["talk"] < summary["val_loss_before"]["talk"]
    base, tuned = load_decoder(str(mistral_run)), load_decoder(str(run))
    assert not torch.equal(base.model.layers[0].mlp.up_proj.weight, tuned.model.layers[0].mlp.up_proj.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(base.lm_head.weight, tuned.lm_head.weight)


@pytest.mark.medium
def test_an_adapter_on_a_4_bit_base_goes_on_exactly_and_is_the_model_that_was_evaluated(talk: Path) -> None:
    base = save_tiny(talk / "base", dataclasses.replace(TINY_CONFIG, intermediate_size=128))
    (base / "chat_template.jinja").unlink()
    options = [*LORA, "--model.init_args.weights", str(base), "--data.init_args.context_length", "128"]
    options += ["--model.init_args.lora.quantization", "nf4", "--data.init_args.batch_rows", "8"]
    assert fit(talk, *options) == 0
    # Each validation and each answer is an evaluation, after which training goes on.
    options += ["--trainer.val_check_interval", "2", "--name", "stopped"]
    assert fit(talk, *options, "--trainer.max_steps", "4") == 0
    assert fit(talk, *options, "--ckpt_path", "last") == 0
    assert same_weights(run_directory(talk), run_directory(talk, "stopped"))
    summary = json.loads((run_directory(talk) / "summary.json").read_text())
    assert summary["val_loss"]["talk"] < summary["val_loss_before"]["talk"] - 0.1
    assert all(".lora_" in name for name in last_checkpoint(run_directory(talk))["state_dict"])
    # As a model of its own it has the loss that the run reported, which the unquantized base would not have.
    options = ["--data.init_args.context_length", "128", "--name", "again"]
    options += ["--model.init_args.weights", str(run_directory(talk)), "--data.init_args.tokenizer", str(base)]
    assert main(["validate", "--config", str(talk / "talk.yaml"), *options]) == 0
    again = json.loads((run_directory(talk, "again-validate") / "summary.json").read_text())
    # Means over some hundred tokens of float32 losses near 5; quantization changes them by 1e-2.
    assert abs(again["val_loss"]["talk"] - summary["val_loss"]["talk"]) < 1e-5


@pytest.mark.slow
def test_micro_batches_and_devices_change_nothing_but_the_order_of_sums(talk: Path) -> None:
    """Answers are dealt unevenly to them, so means of means would be off by far more than rounding (1e-16, which ten
    steps of Adam make 1e-13)."""
    options = ["--trainer.precision", "64-true", "--data.init_args.layout", "bucketed"]
    assert fit(talk, *options) == 0
    assert fit(talk, *options, "--name", "small", "--data.init_args.micro_batch_size", "1") == 0
    command = ["fit", "--config", str(talk / "talk.yaml"), *options, "--name", "ranks"]
    run_in_ranks((2, [*command, "--data.init_args.micro_batch_size", "1"]))
    expected = last_checkpoint(run_directory(talk))["state_dict"]
    for name in ("small", "ranks"):
        found = last_checkpoint(run_directory(talk, name))["state_dict"]
        for key, tensor in expected.items():
            assert (found[key] - tensor).norm() <= 1e-11 * tensor.norm(), (name, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.init_args.lora.targets", "[q_proj, head]"), "lora.targets names head: the layers are q_proj"),
        (
            ("--model.init_args.lora.quantization", "nf4"),
            "quantization nf4 needs layers whose input is a multiple of 64;",
        ),
        (
            ("--model.init_args.lora.quantization", "nf5"),
            "--model.init_args.lora.quantization: expected one of 'nf4' or null, not nf5",
        ),
        (("--model.init_args.lora.rank", "0"), "--model.init_args.lora.rank: lora has rank 0, alpha 32"),
        (("--model.init_args.weights", "/nowhere"), "weights: there is no file or directory /nowhere"),
        (("--data.init_args.context_length", "64"), "--data.init_args.context_length is 64, the model of"),
        (
            ("--data.init_args.batch_rows", "5"),
            "--data.init_args.batch_rows is 5, which 1 device × data.micro_batch_size = 4 do",
        ),
        (
            ("--model.init_args.learning_rate.warmup", "1M"),
            "--model.init_args.learning_rate.warmup is 1M, and the whole",
        ),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    talk = write_talk(tmp_path, tiny_run)
    assert fit(talk, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (talk / "runs").exists()


@pytest.mark.medium
def test_another_run_is_not_gone_on_with(talk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(talk, *LORA, "--trainer.max_steps", "3") == 0
    for options, message in [
        ((*LORA, "--data.init_args.seed", "9"), "--data.init_args.seed is 9, the run began with 0"),
        ((*LORA[:1], "8", *LORA[2:]), "the checkpoint was trained with lora {'rank': 4"),
        ((*LORA, "--data.init_args.learned", "last"), "data.sources is "),
    ]:
        assert fit(talk, *options, "--ckpt_path", "last") == 2
        assert message in capsys.readouterr().err


@pytest.mark.medium
def test_evaluation_reports_the_answers(talk: Path) -> None:
    assert fit(talk) == 0
    for verb in ("validate", "test"):
        assert main([verb, "--config", str(talk / "talk.yaml"), "--ckpt_path", "last"]) == 0
    trained = json.loads((run_directory(talk) / "summary.json").read_text())
    validated = json.loads((run_directory(talk, "talk-validate") / "summary.json").read_text())
    assert validated["val_loss"] == trained["val_loss"] and validated["val_tokens"] == trained["val_tokens"]
    # Where batches are left out, the tokens are those that were measured.
    assert (
        main(["test", "--config", str(talk / "talk.yaml"), "--ckpt_path", "last", "--trainer.limit_test_batches", "1"])
        == 0
    )
    part = json.loads((talk / "runs" / "talk-test" / "version_1" / "summary.json").read_text())
    assert 0 < part["val_tokens"]["talk"] < trained["val_tokens"]["talk"]


@pytest.mark.medium
def test_importing_tasks_imports_no_adapters() -> None:
    code = (
        "import sys, lightning_danube.chat.fine_tuning; "
        "sys.exit('bitsandbytes' in sys.modules or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.medium
def test_a_kill_between_the_last_checkpoint_and_the_summary_loses_nothing(talk: Path) -> None:
    command = ["fit", "--config", str(talk / "talk.yaml")]
    assert main(command) == 0
    file = run_directory(talk) / "summary.json"
    summary = json.loads(file.read_text())
    (last,) = run_directory(talk).glob(f"checkpoints/*{summary['steps']:08}.ckpt")
    content = last.read_bytes()
    for _ in range(2):
        file.unlink()
        assert main([*command, "--ckpt_path", "last"]) == 0
        again = json.loads(file.read_text())
        assert {key for key in summary if again[key] != summary[key]} <= {"seconds", "tokens_per_second"}
        assert last.read_bytes() == content
    assert main([*command, "--ckpt_path", "last"]) == 0
    assert json.loads(file.read_text()) == again
