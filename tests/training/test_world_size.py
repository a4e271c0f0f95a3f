"""A run that resumes with another number of processes, another micro-batch or both is the same run, to rounding."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.pretraining.curriculum import Stage
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.text.corpora import Source
from tests.pretraining.test_run import scalars
from tests.probes import losses_of_steps, samples_of_steps

ROOT = Path(__file__).resolve().parents[2]
LAST = "checkpoints/stage_3_finish_step_00000026.ckpt"
# Sums over rows, micro-batches and ranks in another order differ in the last bits of a float64 (1e-16). After 26 steps
# of Adam at a high rate the largest difference is 1.1e-11 of a tensor's norm. Weights rounded to float32 once: 1e-8.
ROUNDING = 1e-10


class Sessions:
    """Writes the config of each session of a run in float64 that notes its samples and losses."""

    def __init__(self, tiny: Path) -> None:
        self.tiny = tiny
        config = (tiny / "tiny.yaml").read_text()
        for probe in ("KeysOfSteps", "LossesOfSteps"):
            config += f"    - class_path: tests.probes.{probe}\n      init_args: {{directory: NOTES}}\n"
        self._config = config.replace("precision: 32-true", "precision: 64-true")

    def notes(self, session: str) -> Path:
        return self.tiny / f"notes-{session}"

    def run(self, name: str) -> Path:
        return self.tiny / "runs" / name / "version_0"

    def config(self, session: str) -> Path:
        file = self.tiny / f"{session}.yaml"
        file.write_text(self._config.replace("NOTES", str(self.notes(session))))
        return file

    def command(self, session: str, name: str, micro_batch: int, *options: str) -> list[str]:
        rows = ["--data.init_args.micro_batch_size", str(micro_batch)]
        return ["fit", "--config", str(self.config(session)), "--name", name, *rows, *options]


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


def assert_same_run(
    sessions: Sessions, name: str, *parts: tuple[str, int], devices: tuple[int, ...] = (2, 1, 2)
) -> None:
    """The run `name` is the run "full"; `parts` has its sessions, and the steps that were done before each."""
    full, other = sessions.run("full"), sessions.run(name)
    samples = samples_of_steps(sessions.notes("full"))
    losses = losses_of_steps(sessions.notes("full"))
    assert len(samples) == len(losses) == 26 and all(len(step) == 8 for step in samples)
    for session, done in parts:
        # Up to the last, in the middle of which the session may have been killed.
        *whole, last = samples_of_steps(sessions.notes(session))
        assert whole == samples[done : done + len(whole)]
        assert last == samples[done + len(whole)][: len(last)]
        noted = losses_of_steps(sessions.notes(session))
        assert len(noted) >= len(whole) > 1 and min(noted) == done + 1
        assert noted == pytest.approx({step: losses[step] for step in noted}, rel=ROUNDING)
    a, b = (DurableCheckpointIO().load_checkpoint(run / LAST) for run in (full, other))
    assert {tensor.dtype for tensor in a["state_dict"].values()} == {torch.float64}
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "CurriculumData", "token_ledger", "global_step"):
        assert_close(a[part], b[part], part)
    for tag in ("optimizer/learning_rate", "mix/web", "tokens_seen/web", "tokens_seen/wiki"):
        assert scalars(full, tag) == scalars(other, tag), tag
    summaries = [json.loads((run / "summary.json").read_text())["stages"] for run in (full, other)]
    for stage, again in zip(*summaries, strict=True):
        assert again.pop("val_loss") == pytest.approx(stage.pop("val_loss"), rel=ROUNDING)
        assert again == stage
    history = [json.loads(line) for line in (other / "history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["devices"]) for line in history] == [
        (done, number) for (_, done), number in zip(parts, devices, strict=True)
    ]


@pytest.mark.slow
def test_from_two_processes_to_one_and_back_nothing_changes(sessions: Sessions) -> None:
    """The second and the third session begin inside a stage and cross its end."""
    last = ["--ckpt_path", "last"]
    run_in_ranks(
        (1, sessions.command("full", "full", 8)),
        (2, sessions.command("first", "moved", 2, "--trainer.max_steps", "8")),
        (1, sessions.command("second", "moved", 8, *last, "--trainer.max_steps", "16")),
        (2, sessions.command("third", "moved", 1, *last)),
    )
    assert_same_run(sessions, "moved", ("first", 0), ("second", 8), ("third", 16))


@pytest.mark.parametrize(
    ("replicas", "micro_batch", "numbers"),
    [
        (2, 8, "2 devices × micro-batch of 8 rows: data.micro_batch_size = 1, 2 or 4 would"),
        (8, 2, "8 devices × micro-batch of 2 rows: data.micro_batch_size = 1 would"),
        (
            3,
            1,
            "3 devices × micro-batch of 1 row: no data.micro_batch_size would, "
            "a multiple of 3 rows does: data.batch_tokens = 288",
        ),
        (64, 1, "no data.micro_batch_size would, a multiple of 64 rows does: data.batch_tokens = 2048"),
    ],
)
def test_a_step_that_does_not_divide_is_refused_with_numbers_that_would(
    tiny: Path, replicas: int, micro_batch: int, numbers: str
) -> None:
    """One process is enough to see the words; tests/training/test_ranks.py has two, which say them once."""
    data = CurriculumData(
        {"web": Source(str(tiny / "web.jsonl"))},
        [Stage("a", 5_000, {"web": 1.0})],
        context_length=32,
        batch_tokens=256,
        micro_batch_size=micro_batch,
    )
    with pytest.raises(ValueError, match=re.escape(numbers)):
        data.accumulation(replicas)
