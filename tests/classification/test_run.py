"""Classification through the command line: what a run learns, writes and resumes from, and where its model runs."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from lightning_danube.__main__ import main
from lightning_danube.weights.loading import load_decoder
from tests.chat.test_fine_tuning import CONFIG as CHAT
from tests.chat.test_fine_tuning import LORA
from tests.commands import run
from tests.pretraining.test_run import scalars
from tests.tiny_models import CONFIG as TINY_CONFIG
from tests.tiny_models import save_tiny
from tests.training.test_world_size import run_in_ranks

CONFIG = """
name: words
runs: TMP/runs
seed_everything: 3
data:
  class_path: lightning_danube.classification.ClassificationData
  init_args:
    tokenizer: ${model.init_args.weights}
    train: TMP/train.csv
    test: TMP/test.csv
    context_length: 32
    batch_texts: 8
    micro_batch_size: 8
    epochs: 3
    cache_dir: TMP/cache
model:
  class_path: lightning_danube.classification.TextClassification
  init_args:
    weights: BASE
    learning_rate: {peak: 1.0e-2, final: 0.0, warmup: 0}
    lora: {rank: 8, alpha: 32, dropout: 0.1}
trainer:
  accelerator: cpu
  precision: 32-true
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning_danube.callbacks.Progress
    - class_path: lightning_danube.callbacks.ClassificationSummary
      init_args: {resamples: 20}
    - class_path: lightning_danube.callbacks.Predictions
    - class_path: lightning_danube.callbacks.Throughput
    - class_path: lightning_danube.callbacks.Checkpoints
      init_args: {every_n_steps: 4}
"""
WORDS = {"wet": "river rain", "hard": "stone iron", "far": "mountain star"}


def write(path: Path, first: int, count: int, labels: tuple[str, ...] = ("wet", "hard", "far")) -> None:
    with path.open("w") as file:
        file.write("text,label\n")
        for n in range(first, first + count):
            label = labels[n % len(labels)]
            file.write(f"{WORDS[label]} {n}{' slowly' * (n % 5)},{label}\n")


@pytest.fixture
def words(tmp_path: Path, tiny_run: Path) -> Path:
    """A directory with `words.yaml`: ten steps on three classes that a model can learn."""
    write(tmp_path / "train.csv", 0, 90)
    write(tmp_path / "test.csv", 200, 30)
    (tmp_path / "words.yaml").write_text(CONFIG.replace("TMP", str(tmp_path)).replace("BASE", str(tiny_run)))
    return tmp_path


def directory(words: Path, name: str = "words") -> Path:
    return max((words / "runs" / name).glob("version_*"))


def summary_of(words: Path, name: str = "words") -> dict[str, Any]:
    read: dict[str, Any] = json.loads((directory(words, name) / "summary.json").read_text())
    return read


def last_checkpoint(run_directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(max(run_directory.glob("checkpoints/*.ckpt")), weights_only=True)
    return loaded


@pytest.mark.usefixtures("no_warnings")
def test_a_run_learns_the_classes_and_says_how_well(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 0
    assert run(words, "--ckpt_path", "last", verb="test") == 0
    printed = capsys.readouterr()
    assert "arning" not in printed.err + printed.out
    fitted, tested = summary_of(words), summary_of(words, "words-test")
    assert fitted["classes"]["wet"] == {"train": 27, "validation": 3, "test": 10}
    assert fitted["validation"]["n"] == 9 and tested["test"]["n"] == 30
    # The few texts of the curve are all of these, and so is its last point their loss; TensorBoard keeps float32.
    curve, losses = (scalars(directory(words), tag) for tag in ("held_out/validation", "loss/validation"))
    assert list(curve) == [0, 4, 7, 10, 14, 17, 20, 24, 27, 30, 33] and list(losses) == [33]
    assert curve[33] == pytest.approx(fitted["validation"]["loss"], rel=1e-6) and curve[33] < curve[0]
    result = tested["test"]
    assert result["accuracy"] > 0.9 > 0.34 > result["baselines"]["majority"]["accuracy"]
    assert result["baselines"]["tfidf"]["accuracy"] > 0.9
    for one in (result, *result["baselines"].values()):
        for metric in ("accuracy", "macro_f1"):
            low, high = one[f"{metric}_interval"]
            assert 0 <= low <= one[metric] <= high <= 1
    assert np.array(result["confusion"]).sum() == 30
    assert [row["label"] for row in result["classes"]] == ["far", "hard", "wet"]
    for text in (
        "of the adapter, 96 of the head",
        "run: 33 steps of 8 texts",
        "majority class",
        "TF-IDF + logistic regression",
        "validation, 9 texts",
        "test, 30 texts",
        "accuracy above TF-IDF's: ",
        "class  texts  precision  recall",
    ):
        assert text in printed.out, text
    assert run(words, "--ckpt_path", "last", verb="validate") == 0
    assert summary_of(words, "words-validate")["validation"] == fitted["validation"]
    capsys.readouterr()
    assert run(words, "--ckpt_path", "last") == 0
    assert "is complete: 33 steps; nothing is left to do" in capsys.readouterr().out
    assert summary_of(words) == fitted
    # A kill between the last checkpoint and the summary. The checkpoint stays as it is.
    (last,) = directory(words).glob("checkpoints/*33.ckpt")
    content = last.read_bytes()
    for _ in range(2):
        (directory(words) / "summary.json").unlink()
        assert run(words, "--ckpt_path", "last") == 0
        assert "validation, 9 texts" in capsys.readouterr().out
        again = summary_of(words)
        assert {key for key in fitted if again[key] != fitted[key]} <= {"seconds", "texts_per_second"}
        assert last.read_bytes() == content
    (command,) = re.findall(r"next: \S+ -m lightning_danube (.*)", printed.out)
    assert main([*command.split(), "--runs", str(words / "elsewhere")]) == 0


@pytest.mark.medium
def test_pictures_of_two_classes(words: Path) -> None:
    for name, first in (("train", 0), ("test", 200)):
        write(words / f"{name}.csv", first, 40, labels=("wet", "hard"))
    assert run(words, "--trainer.max_steps", "4") == 0
    assert run(words, "--ckpt_path", "last", verb="test") == 0
    events = EventAccumulator(str(directory(words, "words-test")), size_guidance={"tensors": 0, "images": 0}).Reload()
    (picture,) = events.Images("confusion/test")
    assert picture.width >= 400 and picture.encoded_image_string.startswith(b"\x89PNG")
    assert "precision_recall/test/wet" in events.Tags()["tensors"]
    result = summary_of(words, "words-test")["test"]
    assert 0 < result["average_precision"] <= 1
    assert {"accuracy/test", "macro_f1/test", "calibration_error/test", "loss/test"} <= set(events.Tags()["scalars"])


@pytest.mark.medium
def test_predictions_stand_beside_their_rows(words: Path) -> None:
    assert run(words) == 0
    (words / "new.csv").write_text("text\nriver rain 7\nmountain star 9 slowly\nstone iron\n")
    # Neither labels nor the training texts are needed to predict.
    (words / "train.csv").rename(words / "moved.csv")
    new = ["--data.init_args.predict", str(words / "new.csv"), "--ckpt_path", str(directory(words))]
    assert run(words, *new, verb="predict") == 0
    rows = [
        json.loads(line) for line in (directory(words, "words-predict") / "predictions.jsonl").read_text().splitlines()
    ]
    assert [(row["row"], row["label"]) for row in rows] == [(1, "wet"), (2, "far"), (3, "hard")]
    for row in rows:
        assert row["file"] == str(words / "new.csv") and "true_label" not in row
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].__getitem__)
    (words / "moved.csv").rename(words / "train.csv")
    assert run(words, "--ckpt_path", "last", verb="predict") == 0
    lines = (directory(words, "words-predict") / "predictions.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    assert [row["row"] for row in said] == list(range(1, 31)) and said[0]["true_label"] == "far"


@pytest.mark.medium
@pytest.mark.parametrize("options", [(), ("--model.init_args.lora.dora", "true", "--model.init_args.head", "logits")])
def test_going_on_equals_never_having_stopped(words: Path, options: tuple[str, ...]) -> None:
    options = (*options, "--model.init_args.head_learning_rate", "1e-3", "--data.init_args.micro_batch_size", "4")
    assert run(words, *options) == 0
    assert run(words, *options, "--name", "stopped", "--trainer.max_steps", "12") == 0
    assert "validation" not in summary_of(words, "stopped")
    assert run(words, *options, "--name", "stopped", "--ckpt_path", "last") == 0
    full, stopped = (last_checkpoint(directory(words, name)) for name in ("words", "stopped"))
    assert full["state_dict"].keys() == stopped["state_dict"].keys()
    assert all(torch.equal(full["state_dict"][name], stopped["state_dict"][name]) for name in full["state_dict"])
    assert summary_of(words)["validation"] == summary_of(words, "stopped")["validation"]
    curves = [scalars(directory(words, name), "held_out/validation") for name in ("words", "stopped")]
    assert curves[0] == curves[1] and len(curves[0]) == 11


@pytest.mark.medium
def test_a_checkpoint_holds_what_trains(words: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 0
    checkpoint = last_checkpoint(directory(words))
    names = set(checkpoint["state_dict"])
    assert {name for name in names if ".lora_" not in name} == {"head.weight"}
    trained = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert trained == summary_of(words)["trained_parameters"] < 0.05 * summary_of(words)["parameters"]
    # The decoder inside is a model like any other, without the head.
    tuned, base = load_decoder(str(directory(words))), load_decoder(str(tiny_run))
    assert not torch.equal(tuned.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(tuned.lm_head.weight, base.lm_head.weight)
    assert load_decoder(str(directory(words)), dtype="bfloat16").lm_head.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_micro_batches_and_devices_change_nothing_but_the_order_of_sums(words: Path) -> None:
    """The last step has fewer texts than the others, so means of means would be off by far more than rounding (1e-16,
    which 33 steps of Adam make 1e-13)."""
    options = ["--trainer.precision", "64-true", "--model.init_args.lora.dropout", "0"]
    assert run(words, *options) == 0
    assert run(words, *options, "--name", "small", "--data.init_args.micro_batch_size", "2") == 0
    command = ["fit", "--config", str(words / "words.yaml"), *options, "--name", "ranks"]
    run_in_ranks((2, [*command, "--data.init_args.micro_batch_size", "1"]))
    expected = last_checkpoint(directory(words))["state_dict"]
    for name in ("small", "ranks"):
        found = last_checkpoint(directory(words, name))["state_dict"]
        for key, tensor in expected.items():
            assert (found[key] - tensor).norm() <= 1e-10 * tensor.norm(), (name, key)
        here, there = summary_of(words)["validation"], summary_of(words, name)["validation"]
        assert here["accuracy"] == there["accuracy"] and here["confusion"] == there["confusion"]
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-9)


def test_what_was_left_out_is_listed(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (words / "train.csv").open("a") as file:
        file.write("no label here,\nmountain star 200,far\n")
    assert run(words, "--data.init_args.on_bad_row", "skip", "--trainer.max_steps", "1") == 0
    printed = capsys.readouterr().out
    assert "2 rows left out (1 × no label, 1 × is in another split), listed in" in printed
    rows = [json.loads(line) for line in (directory(words) / "rejected.jsonl").read_text().splitlines()]
    assert [(row["row"], row["cause"]) for row in rows] == [(91, "no label"), (92, "is in another split")]
    assert summary_of(words)["left_out"] == {"no label": 1, "is in another split": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--model.init_args.lora.targets", "[q_proj, head]"),
            "lora.targets names head: the layers are q_proj, k_proj",
        ),
        (
            ("--model.init_args.head_learning_rate", "0"),
            "--model.init_args.head_learning_rate is 0.0: it must be above 0",
        ),
        (("--model.init_args.head", "last"), "--model.init_args.head: expected one of 'hidden', 'logits', not last"),
        (("--model.init_args.weights", "/nowhere"), "weights: there is no file or directory /nowhere"),
        (("--data.init_args.context_length", "64"), "--data.init_args.context_length is 64, the model of"),
        (
            ("--data.init_args.batch_texts", "9"),
            "--data.init_args.batch_texts is 9, which 1 device × data.micro_batch_size = 8 does",
        ),
        (("--data.init_args.label_column", "kind"), "row 1: there is no column 'kind', only text, label: name it with"),
        (("--trainer.callbacks.resamples", "5"), "resamples is 5: the ends of an interval need at least 20"),
    ],
)
def test_a_mistake_is_one_line(
    words: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    if options[0] == "--trainer.callbacks.resamples":
        config = (words / "words.yaml").read_text().replace("resamples: 20", "resamples: 5")
        (words / "words.yaml").write_text(config)
        options = ()
    assert run(words, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error, error
    assert not (words / "runs").exists()


@pytest.mark.medium
def test_another_run_is_not_gone_on_with(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(save_tiny(tmp_path / "one"), tmp_path / "base")
    begin = ("--model.init_args.weights", str(base))
    assert run(words, *begin, "--trainer.max_steps", "4") == 0

    def refused(message: str, *options: str, verb: str = "fit") -> None:
        assert run(words, *begin, *options, "--ckpt_path", str(directory(words)), verb=verb) == 2
        error = capsys.readouterr().err
        assert message in error, error

    refused("--data.init_args.seed is 9, the run began with 0", "--data.init_args.seed", "9")
    refused(
        "--data.init_args.context_length is 8, the classifier was trained with 32",
        "--data.init_args.context_length",
        "8",
    )
    for option, given, stated in (
        ("context_length", "8", "8, the classifier was trained with 32"),
        ("keep", "end", "end, the classifier was trained with start"),
        ("begin", "false", "false, the classifier was trained with true"),
    ):
        message = f"--data.init_args.{option} is {stated}: set it back"
        refused(message, f"--data.init_args.{option}", given, verb="test")
    refused("the checkpoint has model.head 'hidden', the config 'logits': set", "--model.init_args.head", "logits")
    refused("the checkpoint was trained with lora {'rank': 8", "--model.init_args.lora.rank", "4")
    write(words / "other.csv", 0, 30, labels=("wet", "hard"))
    other = ("--data.init_args.train", str(words / "other.csv"), "--data.init_args.test", "null")
    refused("tells 3 classes (far, hard, wet) apart, the data have 2 classes (hard, wet)", *other, verb="test")
    shutil.rmtree(base)
    save_tiny(base, seed=1)
    refused("the checkpoint was trained on other weights", verb="test")
    assert main(["export", "--weights", str(directory(words)), "--out", str(words / "out")]) == 2
    assert "holds other weights than those its adapter was trained on" in capsys.readouterr().err


@pytest.mark.medium
def test_a_checkpoint_of_another_task_is_no_classifier(
    words: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, options in (("test", ()), ("predict", ("--data.init_args.predict", str(words / "test.csv")))):
        assert run(words, "--ckpt_path", str(tiny_run), *options, verb=verb) == 2
        assert "is not a classifier: name a run of TextClassification" in capsys.readouterr().err


def test_the_summary_is_for_classifiers(words: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (tiny_run / "config.yaml").read_text()
    name = "lightning_danube.callbacks.PretrainingSummary"
    assert name in config
    (words / "wrong.yaml").write_text(config.replace(name, "lightning_danube.callbacks.ClassificationSummary"))
    assert main(["fit", "--config", str(words / "wrong.yaml"), "--runs", str(words / "wrong")]) == 2
    assert "reports on TextClassification with ClassificationData: remove it" in capsys.readouterr().err


# --- export -----------------------------------------------------------------------------------------------------------


def predictions(words: Path) -> tuple[list[str], list[dict[str, float]]]:
    """Our probabilities of the test texts."""
    assert run(words, "--ckpt_path", "last", verb="predict") == 0
    lines = (directory(words, "words-predict") / "predictions.jsonl").read_text().splitlines()
    texts = [line.rpartition(",")[0] for line in (words / "test.csv").read_text().splitlines()[1:]]
    return texts, [json.loads(line)["probabilities"] for line in lines]


@pytest.mark.medium
@pytest.mark.parametrize("head", ["hidden", "logits"])
def test_transformers_gives_the_same_scores(words: Path, head: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words, "--model.init_args.head", head) == 0
    (words / "words.yaml").write_text((words / "words.yaml").read_text() + f"\n# {head}\n")
    if head == "logits":
        config = (words / "words.yaml").read_text().replace("    lora:", "    head: logits\n    lora:")
        (words / "words.yaml").write_text(config)
    texts, ours = predictions(words)
    out = words / "classifier"
    assert main(["export", "--weights", str(directory(words)), "--out", str(out)]) == 0
    assert f"a classifier of 3 classes written as float32 to {out}" in capsys.readouterr().err
    # Probabilities of at most 1 in float32, of logits up to 60; the head on logits sums 32,000 products for each.
    tolerance = 1e-5 if head == "hidden" else 1e-4
    classify: Any = pipeline("text-classification", model=str(out), device="cpu")
    assert type(classify.model).__name__ == "LlamaForSequenceClassification"
    for batch_size in (1, 7):  # 7: texts of different lengths are padded by transformers
        theirs = classify(texts, top_k=None, truncation=True, batch_size=batch_size)
        for mine, found in zip(ours, theirs, strict=True):
            assert {row["label"]: row["score"] for row in found} == pytest.approx(mine, abs=tolerance)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "`far`, `hard`, `wet`" in card
    assert "cuts a text at 32 tokens" in card
    accuracy = summary_of(words)["validation"]["accuracy"]
    assert f"| accuracy | {accuracy:.3f} |" in card and "### On 9 validation texts" in card
    long_text = texts[0] + " slowly" * 50
    assert len(classify.tokenizer(long_text, truncation=True).input_ids) == 32


@pytest.mark.medium
def test_an_adapter_on_4_bits_is_exported_as_what_was_trained(words: Path) -> None:
    base = save_tiny(words / "base", dataclasses.replace(TINY_CONFIG, intermediate_size=128))
    config = (
        CONFIG.replace("TMP", str(words)).replace("BASE", str(base)).replace("context_length: 32", "context_length: 64")
    )
    (words / "words.yaml").write_text(config.replace("dropout: 0.1", "dropout: 0.1, quantization: nf4"))
    assert run(words) == 0
    texts, ours = predictions(words)
    assert main(["export", "--weights", str(directory(words)), "--out", str(words / "hf")]) == 0
    classify: Any = pipeline("text-classification", model=str(words / "hf"), top_k=None, device="cpu")
    for text, mine in zip(texts, ours, strict=True):
        theirs = {answer["label"]: answer["score"] for answer in classify(text)[0]}
        # float32; the unquantized base under the same adapter is off by more than 1e-3.
        assert theirs == pytest.approx(mine, abs=1e-5)


@pytest.mark.medium
def test_peft_gives_the_same_scores(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny(tmp_path / "base")
    config = re.sub(r"weights: /.*", f"weights: {base}", (words / "words.yaml").read_text())
    (words / "words.yaml").write_text(config)
    assert run(words) == 0
    texts, ours = predictions(words)
    out = words / "adapter"
    assert main(["export", "--weights", str(directory(words)), "--format", "peft", "--out", str(out)]) == 0
    parameters = summary_of(words)["trained_parameters"]
    assert f"adapter with {parameters:,} parameters written to {out}" in capsys.readouterr().err
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(theirs, str(out)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text, mine in zip(texts, ours, strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids][:32]])
        found = model(ids).logits.softmax(1)[0].tolist()
        # As above.
        assert found == pytest.approx([mine[label] for label in ("far", "hard", "wet")], abs=1e-5)
    card = (out / "README.md").read_text()
    assert "num_labels=3, id2label={0: 'far', 1: 'hard', 2: 'wet'}" in card


@pytest.mark.medium
def test_the_adapter_of_a_chat_run_is_exported_alone(tmp_path: Path, tiny_run: Path) -> None:
    with (tmp_path / "talk.jsonl").open("w") as file:
        for n in range(40):
            turns = [{"role": "user", "content": f"river {n}?"}, {"role": "assistant", "content": "stone"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "talk.yaml").write_text(CHAT.replace("TMP", str(tmp_path)).replace("BASE", str(tiny_run)))
    assert main(["fit", "--config", str(tmp_path / "talk.yaml"), *LORA]) == 0
    trained, base, out = tmp_path / "runs/talk/version_0", tmp_path / "base", tmp_path / "adapter"
    assert main(["export", "--weights", str(tiny_run), "--out", str(base)]) == 0
    assert main(["export", "--weights", str(trained), "--format", "peft", "--out", str(out)]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out)).eval()
    ids = torch.arange(20)[None]
    ours, theirs = load_decoder(str(trained)).eval()(ids), model(ids).logits
    # See test_parity.py.
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours - load_decoder(str(tiny_run)).eval()(ids)).abs().max() > 1e-3


def test_exports_that_cannot_be(words: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words, "--trainer.max_steps", "4") == 0
    mine, adapter = str(directory(words)), words / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for arguments, message in [
        (
            (mine, "--format", "gguf", "--out", str(words / "x.gguf")),
            "is a classifier, which llama.cpp has no head for",
        ),
        (
            (mine, "--adapter", str(adapter), "--out", str(words / "x")),
            "is a classifier with its own adapter; leave it out",
        ),
        (
            (str(tiny_run), "--format", "peft", "--out", str(words / "x")),
            "has none, so name one with --adapter",
        ),
    ]:
        assert main(["export", "--weights", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (words / "x").exists() and not os.path.exists(words / "x.gguf")
