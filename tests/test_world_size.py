"""A run that goes on with another number of processes, another micro-batch or both is the same run, to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.__main__ import main
from tests.probes import losses_of_steps, samples_of_steps
from tests.test_pretraining_run import scalars

ROOT = Path(__file__).resolve().parents[1]
LAST = "checkpoints/stage_3_finish_step_00000026.ckpt"
# Sums over rows, micro-batches and ranks in another order differ in the last bits of a float64 (1e-16), which 26 steps
# of Adam at a high rate make 1e-14 of a tensor's norm at most. Weights rounded to float32 once would show as 1e-8.
ROUNDING = 1e-12


class Sessions:
    """Writes the command line of each session of a run in float64 that notes its samples and losses."""

    def __init__(self, tiny: Path) -> None:
        self.tiny = tiny
        config = (tiny / "tiny.yaml").read_text()
        for probe in ("KeysOfSteps", "LossesOfSteps"):
            config += f"    - class_path: tests.probes.{probe}\n      init_args: {{directory: NOTES}}\n"
        self._config = config.replace("accelerator: cpu", "accelerator: cpu\n  precision: 64-true")

    def notes(self, session: str) -> Path:
        return self.tiny / f"notes-{session}"

    def run(self, name: str) -> Path:
        return self.tiny / "runs" / name / "version_0"

    def command(self, session: str, name: str, micro_batch: int, *options: str) -> list[str]:
        file = self.tiny / f"{session}.yaml"
        file.write_text(self._config.replace("NOTES", str(self.notes(session))))
        rows = ["--data.init_args.micro_batch_size", str(micro_batch)]
        return ["fit", "--config", str(file), "--name", name, *rows, *options]


@pytest.fixture
def sessions(tiny: Path) -> Sessions:
    return Sessions(tiny)


def run_in_ranks(*sessions: tuple[int, list[str]]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.forked_ranks", json.dumps(sessions)]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_close(a: Any, b: Any, where: str = "") -> None:
    """The same structure; floating-point numbers to rounding, everything else exactly."""
    if isinstance(a, torch.Tensor):
        if a.is_floating_point():
            assert a.dtype == b.dtype, where
            assert (a - b).norm() <= ROUNDING * a.norm(), where
        else:
            assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_close(left, right, f"{where}.{number}")
    else:
        assert a == b, where


def assert_same_run(sessions: Sessions, name: str, parts: dict[str, tuple[int, int]]) -> None:
    """The run `name` is the run "full"; `parts` has the steps (after, up to) of each of its sessions."""
    full, other = sessions.run("full"), sessions.run(name)
    samples = samples_of_steps(sessions.notes("full"))
    losses = losses_of_steps(sessions.notes("full"))
    assert len(samples) == len(losses) == 26 and all(len(step) == 8 for step in samples)
    for session, (after, up_to) in parts.items():
        assert samples_of_steps(sessions.notes(session)) == samples[after:up_to], session
        noted = losses_of_steps(sessions.notes(session))
        assert noted == pytest.approx({step: losses[step] for step in range(after + 1, up_to + 1)}, rel=ROUNDING)
    a, b = (torch.load(run / LAST, weights_only=True) for run in (full, other))
    assert {tensor.dtype for tensor in a["state_dict"].values()} == {torch.float64}
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "CurriculumData", "token_ledger", "global_step"):
        assert_close(a[part], b[part], part)
    for tag in ("optimizer/learning_rate", "mix/web", "tokens_seen/web", "tokens_seen/wiki"):
        assert scalars(full, tag) == scalars(other, tag), tag
    summaries = [json.loads((run / "summary.json").read_text())["stages"] for run in (full, other)]
    for stage, again in zip(*summaries, strict=True):
        assert again.pop("val_loss") == pytest.approx(stage.pop("val_loss"), rel=ROUNDING)
        assert again == stage


def test_from_two_processes_to_one_and_back_nothing_changes(sessions: Sessions) -> None:
    """Each session ends between two checkpoints; the second and the third begin inside a stage and cross its end."""
    assert main(sessions.command("full", "full", 8)) == 0
    last = ["--ckpt_path", "last"]
    run_in_ranks(
        (2, sessions.command("first", "moved", 2, "--trainer.max_steps", "8")),
        (1, sessions.command("second", "moved", 8, *last, "--trainer.max_steps", "16")),
        (2, sessions.command("third", "moved", 1, *last)),
    )
    assert_same_run(sessions, "moved", {"first": (0, 8), "second": (5, 16), "third": (15, 26)})
