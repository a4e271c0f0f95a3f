"""The paper's pre-training runs on made-up text: their configurations as they are, but for the sources, the number of
steps, and what a variant changes. And the callback that measures the steps."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import math
import os
import random
import re
import signal
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from device_times import GIB, kernels_of, new_profiler, peak_flops, speed
from lightning.pytorch import Callback
from steps import ROOT, Report

WARM_UP = 2
PROFILED = 2
TINY_DECODER = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as configured": {},
    # A new way to train is a line here: name → arguments of `Pretraining`. A variant whose arguments `Pretraining` does
    # not have is left out.
    "compiled, float8": {"compile_blocks": True, "float8": True},
    "compiled": {"compile_blocks": True},
    "eager": {"compile_blocks": False},
}


def known_variants() -> dict[str, dict[str, Any]]:
    """Returns the variants that this version of the package can train."""
    from lightning_danube.pretraining import Pretraining

    known = inspect.signature(Pretraining.__init__).parameters
    return {name: changes for name, changes in VARIANTS.items() if set(changes) <= set(known)}


def compiles_as_configured() -> bool:
    """Returns whether a run compiles its blocks on this device, if its configuration does not say.

    Every default but false counts as yes: it may depend on the device.
    """
    from lightning_danube.pretraining.settings import PretrainingSettings

    return PretrainingSettings.compile_blocks is not False


def write_texts(file: Path, tokens: int, seed: int = 0) -> None:
    """Writes jsonl of random words with at least so many tokens of any tokenizer."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(max(40, tokens // 300)):
            lines.write(json.dumps({"text": " ".join(rng.choices(words, k=300))}) + "\n")


def tokenizer_here() -> str:
    """Returns Mistral's tokenizer, as the paper has it, where its file is installed."""
    from lightning_danube.tokens.tokenizer import mistral_model_file

    try:
        mistral_model_file()
    except (ValueError, ImportError):
        return "danube-small"
    return "mistral"


def configuration(
    name: str,
    directory: Path,
    *,
    steps: int,
    device: str,
    tiny: bool = False,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    recorder: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the configuration of a run of so many optimizer steps, one micro-batch each, and writes its text.

    Args:
        name: of a configuration in configs/pretrain.
        tiny: a decoder of next to no work, for a CPU.
        model, data: arguments of the task and of the data module to change.
        recorder: arguments of `StepRecorder`.
    """
    config = yaml.safe_load((ROOT / "configs" / "pretrain" / f"{name}.yaml").read_text(encoding="utf-8"))
    arguments, task, trainer = config["data"]["init_args"], config["model"]["init_args"], config["trainer"]
    if tiny:
        arguments |= {"context_length": 64, "micro_batch_size": 2}
        task["decoder"] = dict(TINY_DECODER)
        trainer["precision"] = "32-true"
    arguments |= data or {}
    task |= model or {}
    batch = arguments["micro_batch_size"] * arguments["context_length"]
    texts = directory / "texts.jsonl"
    if not texts.exists():
        # A tenth of the run: passes over the same text take as long as new text.
        write_texts(texts, max(20 * arguments["context_length"], steps * batch // 10))
    arguments |= {
        "tokenizer": tokenizer_here(),
        "batch_tokens": batch,
        "sources": {"words": {"path": str(texts)}},
        "stages": [{"name": "all", "tokens": steps * batch, "mix": {"words": 1}}],
        "max_epochs": 1000.0,
        "held_out": 0.1,
        "validation_rows": 2,
    }
    task["learning_rate"] = {"peak": 2e-4, "final": 0.0, "warmup": 0}
    if (recorder or {}).get("steps") is not None:
        # A run of a few steps would be validated at most of them, and the steps' times would have that in them.
        trainer["limit_val_batches"] = 0
    trainer |= {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, "log_every_n_steps": 1}
    trainer["callbacks"].append({"class_path": "paper_run.StepRecorder", "init_args": dict(recorder or {})})
    config["runs"] = str(directory / "runs")
    return config


def write_configuration(config: Mapping[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    return file


def planned_gib(config: Path) -> float | None:
    """Returns the memory that `plan` expects of a run, in GiB; None if it tells none."""
    from lightning_danube.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(["plan", "--config", str(config)])
    return planned_of(said.getvalue())


def planned_of(text: str) -> float | None:
    """Returns GiB of the first column of the table of memory in what `plan` prints."""
    unit, total = re.search(r"(GiB|MiB) on a device", text), re.search(r"^in all\s+([\d.,]+)", text, re.MULTILINE)
    if unit is None or total is None:
        return None
    value = float(total[1].replace(",", ""))
    return value if unit[1] == "GiB" else value / 1024


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Returns the tokens of a micro-batch, without padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if "position_ids" in batch:  # packed conversations, numbered from 1; 0 is padding
        return int((batch["document_ids"] > 0).sum())
    return int(batch["input_ids"].numel())


class StepRecorder(Callback):
    """Measures training steps: time, memory, loss, and the kernels of the last steps. Then it ends the process.

    The process ends in the middle of the run, without the last checkpoint, because minutes on a GPU are few.

    Args:
        steps: measured steps, after two that are not. None: the loss of each step only, to the end of the run.
        profile: two more steps under PyTorch's profiler.
        stop_after: the step after which the run gets SIGTERM.
    """

    def __init__(self, steps: int | None = None, profile: bool = True, stop_after: int | None = None) -> None:
        self.steps, self.profile, self.stop_after = steps, profile, stop_after
        self.report: Report = Report()
        self.began = time.monotonic()
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self._profiler: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.steps is not None and self.profile and len(self.ends) == WARM_UP + self.steps:
            self._profiler = new_profiler()
            self._profiler.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))  # waits for the device
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())
        self.tokens.append(tokens_of(batch))
        if self.steps is None:
            self.report.row(step=trainer.global_step, loss=self.losses[-1])
            if trainer.global_step == self.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if len(self.ends) == 1:
            self.report(seconds_to_first_step=self.ends[0] - self.began)
        if len(self.ends) == WARM_UP + self.steps:
            self._report_speed(trainer, pl_module, batch)
        if len(self.ends) == WARM_UP + self.steps + (PROFILED if self.profile else 0):
            if self._profiler is not None:
                self._profiler.stop()
                self._report_kernels()
            self.finish()

    def finish(self) -> None:
        os._exit(0 if all(map(math.isfinite, self.losses)) else 1)

    def _report_speed(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        seconds = [after - before for before, after in zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:], strict=False)]
        tokens = statistics.mean(self.tokens[WARM_UP:])
        # Only full rows without masks, trained with all weights, have the FLOPs that the formula counts.
        counted = set(batch) <= {"input_ids", "labels", "keys"}
        flops = pl_module.config.flops_per_token(trainer.datamodule.context_length)
        self.report(**speed(seconds, tokens, flops, peak_flops() if counted else None))
        self.report(loss_first=self.losses[0], loss_last=self.losses[-1])
        if pl_module.device.type == "cuda":
            self.report(
                peak_gib=torch.cuda.max_memory_allocated() / GIB, reserved_gib=torch.cuda.max_memory_reserved() / GIB
            )

    def _report_kernels(self) -> None:
        for row in kernels_of(self._profiler, PROFILED):
            self.report.row(**row)
