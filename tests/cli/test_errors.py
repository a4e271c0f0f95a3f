"""What is said when the argument parser, or a class, refuses a value that was read before."""

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_danube.cli.command_line import Stated, in_one_line, read_command_line
from lightning_danube.cli.errors import (
    located,
    lost_by_the_parser,
    parse,
    raised_by_a_class,
    unresolved,
    while_restoring,
)
from lightning_danube.cli.options import Refusal
from lightning_danube.model.config import DecoderShape


def test_a_place_is_told_once() -> None:
    places = {("model", "rate"): "a.yaml, line 3", ("model", "decoder", "heads"): "--model.decoder.heads"}
    stated = Stated([], {}, places)
    refusal = Refusal(("model", "rate", "peek"), "'peek' is unknown", shown=("model", "rate"))
    assert in_one_line(refusal, stated) == "a.yaml, line 3: model.rate: 'peek' is unknown"
    assert in_one_line(Refusal(("model", "decoder", "heads"), "no"), stated) == "--model.decoder.heads: no"
    assert in_one_line(Refusal(("data",), "nothing there"), stated) == "data: nothing there"


def test_a_reason_may_go_on_after_the_key() -> None:
    stated = Stated(
        [], {}, {("model", "rate"): "a.yaml, line 3", ("model", "decoder", "heads"): "--model.decoder.heads"}
    )
    assert (
        in_one_line(Refusal(("model", "decoder", "heads"), "is 0", goes_on=True), stated)
        == "--model.decoder.heads is 0"
    )
    refusal = Refusal(("model", "rate", "peak"), "is 0", goes_on=True)
    assert in_one_line(refusal, stated) == "a.yaml, line 3: model.rate.peak is 0"
    assert in_one_line(refusal, Stated([])) == "model.rate.peak is 0"


def test_the_message_of_a_class_gets_the_place_of_its_option() -> None:
    places = {
        ("data",): "a.yaml, line 1",
        ("data", "batch_tokens"): "a.yaml, line 3",
        ("data", "stages", "1", "tokens"): "a.yaml, line 9",
        ("data", "stages", "0", "tokens"): "a.yaml, line 8",
        ("model", "learning_rate", "warmup"): "--model.init_args.learning_rate.warmup",
        ("trainer", "callbacks", "2", "save_every"): "a.yaml, line 20",
    }
    for message, expected in {
        "data.batch_tokens is 3": "a.yaml, line 3: data.batch_tokens is 3",
        "model.learning_rate.warmup is 5M, too long": "--model.init_args.learning_rate.warmup is 5M, too long",
        "learning_rate.warmup is 5M": "--model.init_args.learning_rate.warmup is 5M",
        "data.stages.1.tokens is '5 %'": "a.yaml, line 9: data.stages.1.tokens is '5 %'",
        "data.stages[0].tokens is 5": "a.yaml, line 8: data.stages.0.tokens is 5",
        "data.batch_tokens: too many": "a.yaml, line 3: data.batch_tokens: too many",
        "save_every is 5x": "a.yaml, line 20: trainer.callbacks.2.save_every is 5x",
        # Not stated, stated twice, or no option at all.
        "data.held_out is 2": "data.held_out is 2",
        "tokens is 5": "tokens is 5",
        "data has no rows": "data has no rows",
        "source 'web' has 0 rows": "source 'web' has 0 rows",
        "": "",
    }.items():
        assert located(message, Stated([], {}, places)) == expected


def test_what_only_the_parser_refuses_is_one_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--many", type=list[int])
    with pytest.raises(ValueError, match="many") as caught:
        parse(parser, ["--many", "x"], Stated([]))
    assert "\n" not in str(caught.value)


def test_the_words_of_a_class_come_without_those_of_the_parser() -> None:
    """The parser wraps what a class raises. Fails when a new version of jsonargparse no longer chains the errors."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--shape", type=DecoderShape | str)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = parser.parse_object({"shape": {**shape, "num_key_value_heads": 3}})
    with pytest.raises(ValueError) as caught:
        parser.instantiate(config)
    inner = raised_by_a_class(caught.value)
    assert inner is not None and str(inner).startswith("num_key_value_heads 3 does not divide num_attention_heads 4")


def test_references_to_nothing_are_named(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("seed: 1\ndata:\n  init_args:\n    seed: ${seed}\n    path: /tmp/${root.dir}\nroot: {other: 1}\n")
    said = unresolved(read_command_line(["--config", str(config)]))
    assert said == f"{config}, line 5: ${{root.dir}} refers to a key that no config states"
    config.write_text("seed: 1\ndata: {seed: '${seed}'}\n")
    assert unresolved(read_command_line(["--config", str(config)])) is None


def test_references_to_items_of_a_list_are_followed(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("stages: [{tokens: 5}]\ndata: {first: '${stages.0.tokens}'}\n")
    assert unresolved(read_command_line(["--config", str(config)])) is None
    config.write_text("stages: [{tokens: 5}]\ndata: {second: '${stages.1.tokens}'}\n")
    said = unresolved(read_command_line(["--config", str(config)]))
    assert said == f"{config}, line 2: ${{stages.1.tokens}} refers to a key that no config states"


def test_what_lightning_raises_on_a_foreign_checkpoint_is_one_line(tmp_path: Path) -> None:
    """Only where it takes the checkpoint apart, and only what is not a message of our own."""
    file, places = tmp_path / "step_1.ckpt", {"here": str(tmp_path / "checkpoint_connector.py"), "elsewhere": "loop.py"}

    def raised(where: str, source: str) -> Exception:
        try:
            exec(compile(source, places[where], "exec"), {"located": located})
        except Exception as error:
            return error
        raise AssertionError

    told = while_restoring(raised("here", "{}['loops']"), file)
    assert str(told).startswith(f"{file} does not fit this run, or another program wrote it (KeyError: 'loops'): name")
    assert while_restoring(raised("here", "{}['loops']"), None) is None
    assert while_restoring(raised("elsewhere", "{}['loops']"), file) is None
    assert while_restoring(raised("here", "open('/nowhere')"), file) is None
    try:
        DecoderShape(0, 1, 1, 1, 1)
    except ValueError as error:
        assert while_restoring(error, file) is None


class OutOfMemory:
    def __init__(self, size: int = 1) -> None:
        raise MemoryError


class Outer:
    def __init__(self, inner: OutOfMemory | None) -> None: ...


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"class_path": f"{__name__}.OutOfMemory"}, IndexError),
        (
            {
                "class_path": f"{__name__}.Outer",
                "init_args": {"inner": {"class_path": f"{__name__}.OutOfMemory"}},
            },
            ValueError,
        ),
    ],
)
def test_an_error_without_a_text_is_not_lost_in_the_parser(given: dict[str, Any], kind: type[Exception]) -> None:
    """jsonargparse reads the first line of what each type of a union has raised, and fails where there is none."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=Outer | OutOfMemory | None)
    config = parser.parse_object({"data": given})
    with pytest.raises(kind) as failed:
        parser.instantiate(config)
    assert isinstance(lost_by_the_parser(failed.value), MemoryError)
    assert lost_by_the_parser(IndexError("a fault of ours")) is None
