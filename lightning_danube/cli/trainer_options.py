"""Checks the options of Lightning's trainer without importing Lightning, which takes seconds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_danube.cli.options import Reader, Refusal, Typed, no_option, plain_value
from lightning_danube.options import PRECISIONS
from lightning_danube.terminal import nearest_name

TRAINER_OPTIONS = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "fast_dev_run"),
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_val_batches"),
    *("limit_test_batches", "limit_predict_batches", "overfit_batches", "val_check_interval"),
    *("check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing"),
    *("enable_progress_bar", "enable_model_summary", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "deterministic", "benchmark", "inference_mode", "use_distributed_sampler", "profiler"),
    *("detect_anomaly", "barebones", "plugins", "sync_batchnorm", "reload_dataloaders_every_n_epochs"),
    *("default_root_dir", "enable_autolog_hparams", "model_registry"),
)
"""Options of Lightning's trainer."""

LIMITS = {
    "fit": ("limit_train_batches", "max_steps", "max_epochs"),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
}
"""Verb → the trainer's options that leave nothing of it when they are 0."""


@dataclass(frozen=True)
class Plain:
    """An option of the trainer whose value is a number, a text or true or false.

    Args:
        hint: its type, as Lightning's trainer states it, without classes of Lightning.
        fits: returns whether the trainer takes a value of that type.
        works: what the trainer takes, for messages.
    """

    hint: Any
    fits: Callable[[Any], bool] = lambda value: True
    works: str = ""


def _whole(least: int, works: str, hint: Any = int | None) -> Plain:
    return Plain(hint, lambda number: number >= least, works)


def _batches(works: str) -> Plain:
    return Plain(int | float | None, lambda number: 0 <= number <= 1 or (number > 1 and number % 1 == 0), works)


def _is_interval(value: Any) -> bool:
    if isinstance(value, int | float):
        return 0 < value <= 1 or (value > 1 and value % 1 == 0)
    return _is_time(value)


def _is_time(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"\d+:\d+:\d+:\d+", value) is not None
    return all(isinstance(number, int) and number >= 0 for number in value.values())


def _are_devices(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) > 0 and min(value) >= 0
    if isinstance(value, str):
        return re.fullmatch(r"auto|-1|0*[1-9]\d*|\d+(\s*,\s*\d+)*\s*,?", value.strip()) is not None and value != "0"
    return bool(value == -1 or value >= 1)


_LIMIT = "give a number of batches from 0 on, or a share from 0.0 to 1.0"
_FROM_1 = "give a whole number from 1 on"
_FROM_0 = "give a whole number from 0 on"
_TIME = "days:hours:minutes:seconds, such as 00:02:30:00"
_BOOL = Plain(bool)
_BOOL_OR_NULL = Plain(bool | None)

PLAIN: dict[str, Plain] = {
    "devices": Plain(list[int] | str | int, _are_devices, 'give a number from 1 on, a list such as "0,1", or auto'),
    "num_nodes": _whole(1, _FROM_1, int),
    "fast_dev_run": Plain(int | bool, lambda steps: steps >= 0, "give true, or a number of steps from 1 on"),
    "max_epochs": _whole(-1, f"{_FROM_1}, or -1 for no limit"),
    "min_epochs": _whole(0, _FROM_0),
    "max_steps": _whole(-1, f"{_FROM_1}, or -1 for no limit", int),
    "min_steps": _whole(0, _FROM_0),
    "max_time": Plain(str | dict[str, int] | None, _is_time, f"give {_TIME}"),
    "limit_train_batches": _batches(_LIMIT),
    "limit_val_batches": _batches(_LIMIT),
    "limit_test_batches": _batches(_LIMIT),
    "limit_predict_batches": _batches(_LIMIT),
    "overfit_batches": Plain(int | float, _batches("").fits, _LIMIT),
    "val_check_interval": Plain(
        int | float | str | dict[str, int] | None,
        _is_interval,
        f"give a number of batches from 1 on, a share of the epoch such as 0.25, or a time as {_TIME}",
    ),
    "check_val_every_n_epoch": _whole(1, _FROM_1),
    "num_sanity_val_steps": _whole(-1, f"{_FROM_0}, or -1 for all"),
    "log_every_n_steps": _whole(0, f"{_FROM_1}, or 0 for no log"),
    "enable_checkpointing": _BOOL_OR_NULL,
    "enable_progress_bar": _BOOL_OR_NULL,
    "enable_model_summary": _BOOL_OR_NULL,
    "accumulate_grad_batches": _whole(1, "leave it out, since it follows from the batch of the data", int),
    "gradient_clip_val": Plain(
        int | float | None, lambda norm: 0 <= norm < math.inf, "give the largest norm, such as 1.0, or 0 for none"
    ),
    "deterministic": Plain(bool | Literal["warn"] | None),
    "benchmark": _BOOL_OR_NULL,
    "inference_mode": _BOOL,
    "use_distributed_sampler": _BOOL,
    "detect_anomaly": _BOOL,
    "barebones": _BOOL,
    "sync_batchnorm": _BOOL,
    "reload_dataloaders_every_n_epochs": _whole(0, _FROM_0, int),
    "enable_autolog_hparams": _BOOL,
}
"""Options of the trainer that take no class of Lightning."""

_DDP = ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
NAMES: dict[str, tuple[str, ...]] = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "strategy": (
        *("auto", *_DDP, *(f"{name}_find_unused_parameters_{used}" for name in _DDP for used in ("false", "true"))),
        *("deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3"),
        *("deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme", "fsdp", "fsdp_cpu_offload"),
        *("single_device", "single_xla", "xla_debug", "xla", "single_tpu"),
    ),
    "profiler": ("simple", "advanced", "pytorch", "xla"),
    "gradient_clip_algorithm": ("norm", "value"),
}
"""Option of the trainer → the names that it takes. Other packages may register more names."""


def check_trainer_options(given: Mapping[str, Any]) -> None:
    """Checks the trainer's section of a configuration. References such as `${seed_everything}` are not checked.

    Raises:
        Refusal: the trainer has no such option, or does not take its value.
    """
    for key, value in given.items():
        path = ("trainer", str(key))
        if key not in TRAINER_OPTIONS:
            raise Refusal(path, no_option(str(key), TRAINER_OPTIONS, "Trainer"), shown=())
        if "${" in str(value):
            continue
        if key == "precision" and value is not None and str(value) not in PRECISIONS:
            works = f"choose one of {', '.join(PRECISIONS[:5])}, or null for the fastest"
            raise Refusal(path, f"is {value}: {works}", goes_on=True)
        if key in PLAIN:
            read = Reader().value(PLAIN[key].hint, value, path)
            if read is not None and not PLAIN[key].fits(read):
                raise Refusal(path, f"is {value}: {PLAIN[key].works}", goes_on=True)
        elif key in NAMES:
            _check_name(path, plain_value(value), NAMES[key])


def _check_name(path: tuple[str, ...], value: Any, known: Collection[str]) -> None:
    """Refuses a text that is nearly a known name. Another text may be a name that a package has registered."""
    if isinstance(value, str) and value not in known and value.islower() and "." not in value:
        near = nearest_name(value, known)
        if near is not None:
            raise Refusal(path, f"is {value}: did you mean {near}?", goes_on=True)


def check_limits(verb: str, trainer: Mapping[str, Any]) -> None:
    """Checks that a verb has something to do: Lightning would end at once, and the exit code would be 0.

    Args:
        trainer: options of the trainer, as typed or with their types.

    Raises:
        Refusal: a limit of the trainer is 0.
    """
    for name in LIMITS[verb]:
        value = trainer.get(name)
        number = plain_value(value) if isinstance(value, Typed) else value
        if number == 0 and number is not False:
            reason = f"is 0, so {verb} would do nothing: leave it out, or raise it"
            raise Refusal(("trainer", name), reason, goes_on=True)
