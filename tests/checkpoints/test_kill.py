"""SIGKILL to real runs, then `--ckpt_path last` until they are done: the result is the uninterrupted run's, bitwise.

The moments come from outside: lines that a callback prints (it does nothing else) and the files in `checkpoints/`.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_danube.checkpoints.runs import newest_checkpoint, read_step
from tests.forked import Forked
from tests.training.test_world_size import Sessions, assert_same_run

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and signals processes")
MOMENTS = """
from lightning.pytorch import Callback

class Moments(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        print(f"@train {batch_idx}", flush=True)

    def on_validation_batch_end(self, trainer, *rest):
        print(f"@validation {trainer.global_step}", flush=True)

    def on_train_end(self, trainer, pl_module):
        print("@end", flush=True)
"""
DROPOUT = ("--model.init_args.decoder.attention_dropout", "0.1")
ACCUMULATION = ("--data.init_args.micro_batch_size", "2")


@pytest.fixture
def watched(tiny: Path) -> Path:
    """`tiny` with a checkpoint every two steps, validation between stage ends, and a voice."""
    (tiny / "moments.py").write_text(MOMENTS)
    config = (tiny / "tiny.yaml").read_text()
    config = config.replace("every_n_steps: 5", "every_n_steps: 2")
    config = config.replace(
        "lightning_danube.callbacks.CurriculumStages",
        "lightning_danube.callbacks.CurriculumStages\n      init_args: {validate_every: 1K}",
    )
    (tiny / "tiny.yaml").write_text(config + "    - class_path: moments.Moments\n")
    return tiny


@dataclass
class Run:
    """One run, over all the processes that it takes."""

    directory: Path
    name: str
    options: tuple[str, ...] = ()
    kills: list[str] = field(default_factory=list)
    processes: list[Forked] = field(default_factory=list)

    @property
    def place(self) -> Path:
        """The version that goes on: one killed before its first checkpoint is begun anew, as the next."""
        versions = sorted((self.directory / "runs" / self.name).glob("version_*"))
        return versions[-1] if versions else self.directory / "runs" / self.name / "version_0"

    def start(self) -> tuple[Forked, Path]:
        goes_on = ["--ckpt_path", "last"] if newest_checkpoint(self.place) else []
        output = self.directory / f"{self.name}-{len(self.processes) + 1}.txt"
        arguments = ["fit", "--config", str(self.directory / "tiny.yaml"), "--name", self.name, *self.options, *goes_on]
        environment = {"PYTHONPATH": f"{self.directory}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        self.processes.append(Forked(arguments, output, self.directory, environment))
        return self.processes[-1], output

    def kill_when(self, moment: str, ready: Callable[[str], bool], delay: float = 0.0) -> bool:
        """Starts the next process and kills it; False if it was done first."""
        process, output = self.start()
        while process.poll() is None:
            if ready(output.read_text(errors="replace") if output.exists() else ""):
                time.sleep(delay)
                process.kill()
                break
            time.sleep(0.002)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), output.read_text()
        if code:
            self.kills.append(moment)
        return code != 0

    def saved_steps(self) -> int:
        """The step from which the next process goes on."""
        newest = newest_checkpoint(self.place)
        return read_step(newest) if newest else 0

    def finish(self) -> None:
        process, output = self.start()
        assert process.wait(timeout=900) == 0, output.read_text()  # a busy machine

    # --- moments ------------------------------------------------------------------------------------------------------

    def micro_batch(self, number: int) -> Callable[[str], bool]:
        return lambda text: f"@train {number}\n" in text

    def validation(self, text: str) -> bool:
        return "@validation" in text

    def writing(self, pattern: str = "*") -> Callable[[str], bool]:
        return lambda text: any(self.place.glob(f"checkpoints/.{pattern}.ckpt.*.partial"))

    def written(self, pattern: str = "*") -> Callable[[str], bool]:
        before: set[Path] | None = None

        def ready(text: str) -> bool:
            nonlocal before
            now = set(self.place.glob(f"checkpoints/{pattern}.ckpt"))
            # Files of processes before this one count as there; those of a version not begun yet do not.
            before = now if before is None and "@train" not in text else before or set()
            return bool(now - before)

        return ready

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def orphans(self) -> list[int]:
        """Groups of this run that live, loaders among them; torch lets these look for their parent every 5 s."""
        return [process.pid for process in self.processes if process.family_lives(20)]


def mismatches(full: Path, resumed: Path) -> list[str]:
    """What differs between two finished runs: every logged value that is not a time, weights, optimizer, schedule, data
    position, ledger, and the stages of the summary."""
    found = []
    last = newest_checkpoint(full)
    assert last is not None and last.name == "stage_3_finish_step_00000026.ckpt"
    a, b = (torch.load(run / "checkpoints" / last.name, weights_only=True) for run in (full, resumed))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "CurriculumData", "token_ledger", "global_step"):
        if not same(a[part], b[part]):
            found.append(part)
    left, right = logged(full), logged(resumed)
    # A resumed run says again in which stage it is: more points, none of them different.
    stages, stages_again = left.pop("mix/stage"), right.pop("mix/stage")
    if not stages.items() <= stages_again.items():
        found.append("mix/stage")
    found += [tag for tag in sorted(left.keys() | right.keys()) if left.get(tag) != right.get(tag)]
    summaries = [json.loads((run / "summary.json").read_text())["stages"] for run in (full, resumed)]
    return found + ([] if summaries[0] == summaries[1] else ["summary.json"])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def logged(run: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("throughput/")]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


@pytest.mark.medium
def test_runs_killed_at_chosen_moments_end_as_if_they_were_not(watched: Path) -> None:
    full = Run(watched, "full", (*DROPOUT, *ACCUMULATION))
    plain = Run(watched, "plain", (*DROPOUT, *ACCUMULATION))
    # This one writes its checkpoints while it trains.
    plugin = ("--trainer.plugins", "lightning_danube.checkpoints.single.DurableCheckpointIO")
    background = ("--trainer.plugins.background", "true")
    options = (*DROPOUT, *ACCUMULATION, *plugin, *background, "--data.init_args.workers", "2")
    with_workers = Run(watched, "workers", options)
    # The shards are written once; two runs that began together would both do it.
    full.finish()

    def first() -> None:
        assert plain.kill_when("after a checkpoint", plain.written())
        assert plain.kill_when("in a stage's checkpoint", plain.writing("stage_*"))
        assert plain.kill_when("mid-accumulation", plain.micro_batch(4 * 15 + 2))
        plain.finish()

    def second() -> None:
        assert with_workers.kill_when("before the first checkpoint", with_workers.micro_batch(5))
        assert with_workers.kill_when("in a checkpoint", with_workers.writing("step_*6"))
        assert with_workers.kill_when("in validation", with_workers.validation)
        with_workers.finish()

    with ThreadPoolExecutor() as pool:
        for chain in [pool.submit(first), pool.submit(second)]:
            chain.result()
    for run in (plain, with_workers):
        assert len(run.kills) == 3
        assert mismatches(full.place, run.place) == [], run.kills
        assert run.orphans() == []
        assert not list(run.place.glob("checkpoints/.*"))


@pytest.mark.slow
def test_killed_between_two_processes_one_and_two_nothing_changes(watched: Path) -> None:
    """SIGKILL of the first process, within an accumulation and right at a stage's end; the others are to end by
    themselves."""
    sessions = Sessions(watched)
    full, run = Run(watched, "full"), Run(watched, "moved")
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")

    def begin(run: Run, session: str, micro_batch: int, *options: str) -> None:
        sessions.config(session).replace(watched / "tiny.yaml")
        run.options = ("--data.init_args.micro_batch_size", str(micro_batch), *options)

    begin(full, "full", 8)
    full.finish()
    begin(run, "first", 2, *two)
    # On a busy machine the kill may come some steps late.
    assert run.kill_when("within an accumulation", run.micro_batch(2 * 7 + 1))
    second = run.saved_steps()
    begin(run, "second", 8)
    assert run.kill_when("after a stage's checkpoint", run.written("stage_2_*"))
    third = run.saved_steps()
    begin(run, "third", 1, *two, "--data.init_args.workers", "1")
    run.finish()
    assert run.orphans() == []
    assert_same_run(sessions, "moved", ("first", 0), ("second", second), ("third", third))
    assert 0 < second < 20 <= third


KILLS_A_RUN = 8


@pytest.mark.slow
def test_runs_killed_at_random_end_as_if_they_were_not(watched: Path) -> None:
    """Writes `runs/kills.md`. The seed is new each time, and in it."""
    seed = random.SystemRandom().randrange(2**32)
    shapes = {
        "plain": (),
        "accumulation": ACCUMULATION,
        "dropout": DROPOUT,
        "accumulation, dropout": (*ACCUMULATION, *DROPOUT),
    }
    # More loader processes must not matter either: one uninterrupted run of each shape stands for all of them.
    full = {shape: Run(watched, f"full-{n}", options) for n, (shape, options) in enumerate(shapes.items())}
    for run in full.values():
        run.finish()

    def chain(number: int) -> tuple[str, Run, list[str]]:
        dice = random.Random(f"{seed}/{number}")
        shape = list(shapes)[number % 4]
        run = Run(watched, f"killed-{number}", (*shapes[shape], "--data.init_args.workers", str((number // 2) % 4)))
        for _ in range(KILLS_A_RUN):
            if not kill_somewhere(run, dice):
                break
        else:
            run.finish()
        return f"{shape}, {(number // 2) % 4} workers", run, mismatches(full[shape].place, run.place)

    began = time.monotonic()
    results: list[tuple[str, Run, list[str]]] = []
    with ThreadPoolExecutor(2) as pool:
        # A run may be done before it has been killed as often as it could: then there are more runs.
        while len(results) < 8 or (len(results) < 16 and sum(len(run.kills) for _, run, _ in results) < 40):
            results += pool.map(chain, range(len(results), len(results) + 4))
    moments: Counter[str] = Counter()
    lines = ["| run | kills | mismatches | orphans |", "|---|---|---|---|"]
    wrong, orphans = 0, 0
    for what, run, different in results:
        left = run.orphans()
        moments.update(run.kills)
        wrong, orphans = wrong + bool(different), orphans + len(left)
        lines.append(f"| {what} | {len(run.kills)} | {', '.join(different) or 0} | {len(left)} |")
    lines += ["", "| killed | times |", "|---|---|", *(f"| {moment} | {n} |" for moment, n in moments.most_common())]
    total = f"{sum(moments.values())} kills, {wrong} runs with mismatches, {orphans} orphans"
    lines += ["", f"{total}; seed {seed}; {time.monotonic() - began:.0f} s"]
    table = ROOT / "runs" / "kills.md"
    table.parent.mkdir(exist_ok=True)
    table.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    assert wrong == 0 and orphans == 0, "\n".join(lines)
    assert sum(moments.values()) >= 40


def kill_somewhere(run: Run, dice: random.Random) -> bool:
    """Kills the next process at a moment drawn at random; False if the run was done first."""
    delay = dice.uniform(0, 0.05)
    match dice.choice(
        ["any time", "any time", "micro-batch", "in a write", "in a write", "after a write", "validation"]
    ):
        case "any time":
            return run.kill_when("at any time", lambda text: "@train" in text, dice.uniform(0, 2))
        case "micro-batch":
            begun = dice.randrange(1, 12)
            return run.kill_when("at a micro-batch", lambda text: text.count("@train") > begun)
        case "in a write":
            return run.kill_when("in a checkpoint's write", run.writing(), dice.uniform(0, 0.02))
        case "after a write":
            return run.kill_when("after a checkpoint's write", run.written(), delay)
        case _:
            return run.kill_when("in validation", run.validation, delay)
