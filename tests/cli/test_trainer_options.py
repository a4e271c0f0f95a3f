"""Options of the trainer that are checked before Lightning is imported."""

import re
import typing
from datetime import timedelta
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_danube.cli.command_line import check_command_line
from lightning_danube.cli.options import Refusal, Typed, options_of
from lightning_danube.cli.trainer_options import NAMES, PLAIN, TRAINER_OPTIONS, check_limits, check_trainer_options

BATCHES = "give a number of batches from 0 on, or a share from 0.0 to 1.0"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("gradient_clip_val -1", "is -1: give the largest norm, such as 1.0, or 0 for none"),
        ("gradient_clip_val nan", "is nan: give the largest norm, such as 1.0, or 0 for none"),
        ("gradient_clip_val x", ": expected a whole number or a number or null, not x"),
        ("gradient_clip_algorithm nrm", "is nrm: did you mean norm?"),
        ("max_epochs -3", "is -3: give a whole number from 1 on, or -1 for no limit"),
        ("max_epochs 1.5", ": expected a whole number or null, not 1.5"),
        ("max_steps -2", "is -2: give a whole number from 1 on, or -1 for no limit"),
        ("min_steps -1", "is -1: give a whole number from 0 on"),
        ("devices -2", 'is -2: give a number from 1 on, a list such as "0,1", or auto'),
        ("devices 0", 'is 0: give a number from 1 on, a list such as "0,1", or auto'),
        ("devices two", 'is two: give a number from 1 on, a list such as "0,1", or auto'),
        ("devices []", 'is []: give a number from 1 on, a list such as "0,1", or auto'),
        ("num_nodes 0", "is 0: give a whole number from 1 on"),
        ("accumulate_grad_batches 0", "is 0: leave it out, since it follows from the batch of the data"),
        ("val_check_interval 0", "is 0: give a number of batches from 1 on, a share of the epoch such as 0.25, or a"),
        ("val_check_interval 1.5", "is 1.5: give a number of batches from 1 on"),
        ("val_check_interval x", "is x: give a number of batches from 1 on"),
        ("limit_train_batches -1", f"is -1: {BATCHES}"),
        ("limit_val_batches 1.5", f"is 1.5: {BATCHES}"),
        ("limit_test_batches -0.5", f"is -0.5: {BATCHES}"),
        ("limit_predict_batches nan", f"is nan: {BATCHES}"),
        ("overfit_batches -1", f"is -1: {BATCHES}"),
        ("check_val_every_n_epoch 0", "is 0: give a whole number from 1 on"),
        ("num_sanity_val_steps -2", "is -2: give a whole number from 0 on, or -1 for all"),
        ("log_every_n_steps -1", "is -1: give a whole number from 1 on, or 0 for no log"),
        ("fast_dev_run -1", "is -1: give true, or a number of steps from 1 on"),
        ("reload_dataloaders_every_n_epochs -1", "is -1: give a whole number from 0 on"),
        ("max_time 5", "is 5: give days:hours:minutes:seconds, such as 00:02:30:00"),
        ("deterministic maybe", ": expected true or false or one of 'warn' or null, not maybe"),
        ("benchmark 3", ": expected true or false or null, not 3"),
        ("precision bf15", "is bf15: choose one of 32-true, bf16-mixed"),
        ("accelerator gpuu", "is gpuu: did you mean gpu?"),
        ("strategy dpp", "is dpp: did you mean ddp?"),
        ("profiler simpel", "is simpel: did you mean simple?"),
    ],
)
def test_a_value_that_the_trainer_does_not_take_is_refused(flag: str, message: str) -> None:
    option, _, value = flag.partition(" ")
    text = f"--trainer.{option}{'' if message.startswith(':') else ' '}{message}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        check_command_line(["--config", "quickstart", f"--trainer.{option}", value])


GOOD: dict[str, list[Any]] = {
    "devices": ["auto", -1, "-1", 1, "2", "0,1", "0,", [0, 1]],
    "max_epochs": [-1, 1, None],
    "max_steps": [-1, 5],
    "max_time": ["00:01:00:00", {"hours": 1}, None],
    "limit_train_batches": [0, 0.5, 1.0, 7, None],
    "val_check_interval": [1, 0.5, 1.0, 7, "00:01:00:00", {"minutes": 5}, None],
    "num_sanity_val_steps": [-1, 0, 2],
    "gradient_clip_val": [0, 0.5, 3, None],
    "fast_dev_run": [True, False, 0, 3],
    "deterministic": [True, False, "warn", None],
    "accelerator": ["auto", "cpu", "my_device", {"class_path": "my.Accelerator"}],
    "strategy": ["ddp", "MyStrategy", "my.own.Strategy", {"class_path": "lightning_danube.ShardedStrategy"}],
    "log_every_n_steps": [0, 1, None],
}


@pytest.mark.parametrize(("option", "value"), [(one, value) for one, values in GOOD.items() for value in values])
def test_a_value_that_the_trainer_takes_is_accepted_as_typed_and_as_read(option: str, value: Any) -> None:
    check_trainer_options({option: value})
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)):
        check_trainer_options({option: Typed("null" if value is None else str(value))})


def test_a_reference_is_not_checked() -> None:
    check_trainer_options({"max_steps": "${name}", "devices": Typed("${nothing}")})


def test_the_types_are_those_of_lightnings_trainer() -> None:
    real = options_of(Trainer)[0]
    assert set(PLAIN) | set(NAMES) <= set(TRAINER_OPTIONS) == set(real)
    for name, plain in PLAIN.items():
        types = set(typing.get_args(real[name].hint) or [real[name].hint]) - {timedelta}  # no text stands for one
        assert set(typing.get_args(plain.hint) or [plain.hint]) == types, name


def test_the_names_are_those_that_lightning_registers() -> None:
    assert set(StrategyRegistry.available_strategies()) <= set(NAMES["strategy"])
    assert set(AcceleratorRegistry.available_accelerators()) <= set(NAMES["accelerator"])


@pytest.mark.parametrize(
    ("verb", "given"),
    [("fit", {"max_steps": 0}), ("fit", {"limit_train_batches": Typed("0.0")}), ("test", {"limit_test_batches": 0})],
)
def test_a_limit_of_0_leaves_nothing_to_do(verb: str, given: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match=f"is 0, so {verb} would do nothing: leave it out, or raise it"):
        check_limits(verb, given)
    check_limits("predict", given)
    check_limits(verb, dict.fromkeys(given, 1))
