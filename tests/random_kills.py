"""Whole runs of every task under `kill -9` at random moments. Each must end as the run that nobody killed.

    python -m tests.random_kills --work DIRECTORY --temporary DIRECTORY --kills 200

A trial starts a run, kills it, starts it again as a user would, and so on. In half of the kills the whole process group
gets the signal, otherwise the main process alone. When the run has ended, it is compared with an uninterrupted run:

- training (pre-training, SFT, DPO, classification): weights, optimizer, schedule, position in the data, ledger, every
  logged value that is no time, the micro-batches of each step, and the summary, all bitwise;
- evaluation, quantization and studies: every number of the results that is no time; of a study's runs the weights, too;
- prepare and export: every byte of what they wrote.

No process and no half-written file may be left. A line of `results.jsonl` in the work directory is one trial. The
script goes on where it was stopped. It runs one process at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch

from tests import forked
from tests.chat.test_fine_tuning import CONFIG as SFT
from tests.chat.test_preference_run import CONFIG as DPO
from tests.checkpoints.test_kill import logged, same
from tests.classification.test_run import CONFIG as CLASSIFICATION
from tests.classification.test_run import write as write_texts
from tests.conftest import WORDS, write_tiny
from tests.evaluation.test_run import YAML as EVALUATION
from tests.forked import Forked
from tests.quantization.test_run import CONFIG as QUANTIZATION
from tests.rows import write_rows
from tests.tiny_models import CONFIG, save_tiny

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 3600
"""A process that has not ended after so long counts as hanging, also on a busy machine."""

PROBE = """
    - class_path: tests.probes.BatchesOfSteps
      init_args: {directory: TMP/batches}
"""
STUDY = """
name: rates
base: INPUTS/study-base.yaml
baseline: slow
metric: val_loss.web
also: [val_loss.wiki]
seeds: [1]
variants:
  slow: {model.init_args.learning_rate.peak: 1.0e-3}
  fast: {model.init_args.learning_rate.peak: 2.0e-2}
"""
TIMES = ("seconds", "time", "per_second", "mfu", "flops", "memory", "peak_bytes", "commit", "machine", "command")
"""A key of a summary whose name holds one of these words says how fast or where the run was."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of run.

    Args:
        config: text of the configuration; TMP is the directory of the trial, INPUTS that of texts and models.
        command: arguments of the command line, given the directory of the trial.
        differences: compares two directories of trials, the uninterrupted one first.
    """

    name: str
    config: str
    command: Callable[[Path], list[str]]
    differences: Callable[[Path, Path], list[str]]
    most_kills: int = 12


def fit(place: Path) -> list[str]:
    return ["fit", "--config", str(place / "run.yaml"), "--ckpt_path", "last-or-new"]


def test(place: Path) -> list[str]:
    return ["test", "--config", str(place / "run.yaml")]


def prepare(place: Path) -> list[str]:
    return ["prepare", "--config", str(place / "run.yaml"), "--processes", "2"]


def study(place: Path) -> list[str]:
    begun = (place / "runs" / "studies" / "rates" / "study.sqlite3").exists()
    refused = place / "output.txt"
    if begun and refused.exists() and "leave out --resume" in refused.read_text(errors="replace")[-400:]:
        begun = False  # killed before the study was in its storage
    return ["study", "--config", str(place / "run.yaml"), "--runs", str(place / "runs"), *["--resume"] * begun]


def export(form: str) -> Callable[[Path], list[str]]:
    def command(place: Path) -> list[str]:
        out = place / "out" / ("model.gguf" if form == "gguf" else "model")
        again = ["--overwrite"] * out.exists()
        return [
            "export",
            "--weights",
            str(place.parents[1] / "inputs" / "mistral"),
            "--format",
            form,
            "--out",
            str(out),
            *again,
        ]

    return command


# --- what must be equal -----------------------------------------------------------------------------------------------


def newest_version(place: Path, name: str) -> Path:
    return max((place / "runs" / name).glob("version_*"), key=lambda path: int(path.name.split("_")[1]))


def trained(name: str) -> Callable[[Path, Path], list[str]]:
    def differences(full: Path, killed: Path) -> list[str]:
        found = [f"batches of step {step}" for step in different_batches(full / "batches", killed / "batches")]
        return found + different_runs(newest_version(full, name), newest_version(killed, name))

    return differences


def different_runs(full: Path, killed: Path) -> list[str]:
    """What differs between two finished runs."""
    names = [{path.name for path in run.glob("checkpoints/*")} for run in (full, killed)]
    if names[0] != names[1]:
        return [f"checkpoints: {sorted(names[0] ^ names[1])}"]
    found = []
    for name in sorted(names[0] - {"manifest.json"}):
        a, b = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (full, killed))
        # "loops" and "callbacks" hold times and paths; their numbers show in what follows from them.
        parts = (a.keys() | b.keys()) - {"loops", "callbacks"}
        found += [f"{name}: {part}" for part in sorted(parts) if not same(a.get(part), b.get(part))]
    left, right = logged(full), logged(killed)
    stages, again = left.pop("mix/stage", {}), right.pop("mix/stage", {})  # a resumed run says its stage again
    if not stages.items() <= again.items():
        found.append("mix/stage")
    found += [tag for tag in sorted(left.keys() | right.keys()) if left.get(tag) != right.get(tag)]
    return found + different_summaries(full, killed)


def different_summaries(full: Path, killed: Path) -> list[str]:
    if not (killed / "summary.json").exists():
        return ["there is no summary.json"]
    a, b = (without_times(json.loads((run / "summary.json").read_text())) for run in (full, killed))
    return [f"summary.json: {key}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        kept = [key for key in value if key != "run" and not any(word in str(key) for word in TIMES)]
        return {key: without_times(value[key]) for key in kept}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def different_batches(full: Path, killed: Path) -> list[int]:
    """Steps whose micro-batches differ. A step that was done again after a kill must have had the same ones."""
    wanted: dict[tuple[int, int], str] = {}
    for step, number, digest in lines_of(full):
        wanted[step, number] = digest
    found = {(step, number): digest for step, number, digest in lines_of(killed)}
    wrong = {step for step, number, digest in lines_of(killed) if wanted.get((step, number)) != digest}
    return sorted(wrong | {step for step, _ in wanted.keys() ^ found.keys()})


def lines_of(directory: Path) -> Iterator[tuple[int, int, str]]:
    for line in (directory / "batches.jsonl").read_text().splitlines():
        step, number, digest = json.loads(line)
        yield step, number, digest


def tested(name: str) -> Callable[[Path, Path], list[str]]:
    return lambda full, killed: different_summaries(newest_version(full, name), newest_version(killed, name))


def studied(full: Path, killed: Path) -> list[str]:
    rows = []
    for place in (full, killed):
        table = pyarrow.parquet.read_table(place / "runs" / "studies" / "rates" / "study.parquet").to_pylist()
        rows.append([without_times(row) for row in table])
    found = [] if rows[0] == rows[1] else ["study.parquet"]
    found += different_summaries(full / "runs" / "studies" / "rates", killed / "runs" / "studies" / "rates")
    for name in ("slow-seed1", "fast-seed1"):
        a, b = (newest_version(place / "runs" / "studies" / "rates", name) for place in (full, killed))
        found += [f"{name}: {one}" for one in different_runs(a, b)]
    return found


def same_bytes(folder: str) -> Callable[[Path, Path], list[str]]:
    def differences(full: Path, killed: Path) -> list[str]:
        a, b = (digests(place / folder) for place in (full, killed))
        return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]

    return differences


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name in ("report.json", "shards.json"):
                content = json.dumps(without_times(json.loads(content))).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


# --- trials -----------------------------------------------------------------------------------------------------------


def tasks(tiny: str) -> list[Task]:
    """
    Args:
        tiny: the configuration of a tiny pre-training run.
    """
    levels = "levels: [rounding:8/64, rounding:4/64, rounding:3/64, rounding:2/64+embeddings]"
    quantization = QUANTIZATION.replace("levels: [bitsandbytes:int8, hqq:4/64, rounding:2/64+embeddings]", levels)
    assert levels in quantization
    return [
        Task("pre-training", tiny + PROBE, fit, trained("tiny")),
        Task("SFT", SFT.replace("TMP/talk.jsonl", "INPUTS/chat.jsonl") + PROBE, fit, trained("talk")),
        Task("DPO", DPO.replace("TMP/talk.jsonl", "INPUTS/pairs.jsonl") + PROBE, fit, trained("talk")),
        Task("classification", CLASSIFICATION.replace("TMP/t", "INPUTS/t") + PROBE, fit, trained("words")),
        Task("quantization", with_inputs(quantization), test, tested("bits-test")),
        Task("evaluation", with_inputs(EVALUATION), test, tested("asked-test")),
        Task("prepare", tiny.replace("INPUTS/w", "INPUTS/large-w"), prepare, same_bytes("cache/shards")),
        Task("export, hf", "", export("hf"), same_bytes("out")),
        Task("export, gguf", "", export("gguf"), same_bytes("out")),
        # Optuna gives a trial three more attempts.
        Task("study", STUDY, study, studied, most_kills=2),
    ]


def with_inputs(config: str) -> str:
    for name in ("model", "text.txt", "texts.jsonl", "questions.jsonl"):
        config = config.replace(f"TMP/{name}", f"INPUTS/{name}")
    return config


def write_inputs(inputs: Path) -> str:
    """Writes texts and models. Returns the configuration of a tiny pre-training run."""
    if not (inputs / "done").exists():
        shutil.rmtree(inputs, ignore_errors=True)  # this script was stopped while it wrote them
        inputs.mkdir()
    config = write_tiny(inputs).joinpath("tiny.yaml").read_text()
    tiny = config.replace(f"{inputs}/w", "INPUTS/w").replace(str(inputs), "TMP")
    if (inputs / "done").exists():
        return tiny
    dice = random.Random(0)
    for source in ("web", "wiki"):
        rows = ({"text": f"{source} {n}: {' '.join(dice.choices(WORDS, k=60))}."} for n in range(6000))
        write_rows(inputs / f"large-{source}.jsonl", *rows)
    turns = [("river?", "stone"), ("mountain?", "green light")]
    chats = []
    for n in range(80):
        asked, said = turns[n % 2]
        turn = [{"role": "user", "content": asked + " now" * (n % 5)}, {"role": "assistant", "content": said}]
        chats.append({"messages": turn * (1 + n % 2)})
    write_rows(inputs / "chat.jsonl", *chats)
    pairs = ({"prompt": f"river? {'now ' * (n % 5)}{n}", "chosen": "stone", "rejected": "green"} for n in range(80))
    write_rows(inputs / "pairs.jsonl", *pairs)
    write_texts(inputs / "train.csv", 0, 90)
    write_texts(inputs / "test.csv", 200, 30)
    save_tiny(inputs / "model", dataclasses.replace(CONFIG, max_position_embeddings=512))
    (inputs / "text.txt").write_text(" ".join(f"the {number} things of them" for number in range(600)))
    texts = ({"text": f"{n}: the river and the other stones. " * 4} for n in range(6))
    write_rows(inputs / "texts.jsonl", *texts)
    questions = ({"question": "Which river?", "answers": "Nile", "passages": ["It is the Nile."]} for _ in range(20))
    write_rows(inputs / "questions.jsonl", *questions)
    (inputs / "study-base.yaml").write_text(
        tiny.replace("INPUTS", str(inputs)).replace("TMP/cache", str(inputs / "study-cache"))
    )
    base = inputs / "tiny-base.yaml"
    base.write_text(tiny.replace("INPUTS", str(inputs)).replace("TMP", str(inputs)))
    for name, tokenizer in (("base", "danube-small"), ("mistral", "mistral")):
        options = ["--name", name, "--data.init_args.tokenizer", tokenizer]
        process = Forked(["fit", "--config", str(base), *options], inputs / f"{name}.txt", inputs)
        assert process.wait(SECONDS) == 0, (inputs / f"{name}.txt").read_text()
        (inputs / name).symlink_to(newest_version(inputs, name))
    (inputs / "done").touch()
    return tiny


class Trials:
    """All trials of one work directory, and the file with their results."""

    def __init__(self, work: Path, temporary: Path, seed: int, only: Sequence[str] = ()) -> None:
        """
        Args:
            only: names of the tasks to run. All tasks by default.
        """
        self.work, self.temporary, self.seed = work, temporary, seed
        for folder in (work / "inputs", work / "full", work / "trials", temporary):
            folder.mkdir(parents=True, exist_ok=True)
        every = tasks(write_inputs(work / "inputs"))
        if unknown := set(only) - {task.name for task in every}:
            sys.exit(f"--only {' '.join(sorted(unknown))}: the tasks are {', '.join(task.name for task in every)}")
        self.tasks = [task for task in every if not only or task.name in only]

    def results(self) -> list[dict[str, Any]]:
        file = self.work / "results.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def kills(self) -> int:
        return sum(len(result["kills"]) for result in self.results())

    def start(self, task: Task, place: Path) -> Forked:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        return Forked(task.command(place), place / "output.txt", place, environment)

    def begin(self, task: Task, folder: str, name: str) -> Path:
        place = self.work / folder / name
        shutil.rmtree(place, ignore_errors=True)  # cut off when this script was stopped
        place.mkdir()
        base = "mistral" if task.name == "SFT" else "base"
        inputs = self.work / "inputs"
        config = task.config.replace("BASE", str(inputs / base)).replace("INPUTS", str(inputs))
        (place / "run.yaml").write_text(config.replace("TMP", str(place)))
        (place / "output.txt").touch()  # a kill can come before the process opens it
        return place

    def uninterrupted(self, task: Task) -> tuple[Path, float]:
        """The directory of a run that nobody killed, and the CPU seconds that it took."""
        place = self.work / "full" / task.name
        code, known = code_of_package(), place / "code"
        if not (place / "seconds").exists() or not known.exists() or known.read_text() != code:
            place = self.begin(task, "full", task.name)
            begin = time.monotonic()
            process, seconds = self.start(task, place), 0.0
            while process.poll() is None and time.monotonic() - begin < SECONDS:
                seconds = max(seconds, cpu_seconds(process.pid))
                time.sleep(0.05)
            assert process.wait(60) == 0, (place / "output.txt").read_text()
            (place / "seconds").write_text(str(seconds))
            known.write_text(code)  # of other code, a word of a model card can differ
        return place, float((place / "seconds").read_text())

    def trial(self, number: int) -> dict[str, Any]:
        task = self.tasks[number % len(self.tasks)]
        dice = random.Random(f"{self.seed}/{number}")
        full, seconds = self.uninterrupted(task)
        place = self.begin(task, "trials", f"{number:04d}-{task.name}")
        wanted = dice.randint(task.most_kills // 2, task.most_kills)
        kills: list[dict[str, Any]] = []
        wrong: list[str] = []
        processes: list[Forked] = []
        while True:
            process = self.start(task, place)
            processes.append(process)
            # In CPU seconds, so that a busy machine changes nothing.
            moment = dice.uniform(0, seconds) if len(kills) < wanted else float("inf")
            whole_group = dice.random() < 0.5
            begin = time.monotonic()
            while (code := process.poll()) is None and (left := moment - cpu_seconds(process.pid)) > 0:
                if time.monotonic() - begin > SECONDS:
                    break
                # Two processes at most compute at once. The last looks are close to each other.
                time.sleep(min(max(left / 3, dice.uniform(0.001, 0.012)), 0.5))
            if code is None and time.monotonic() - begin > SECONDS:
                wrong.append(f"hangs: after {SECONDS} s")
            if code is None:
                process.kill()
                if whole_group:
                    with suppress(ProcessLookupError):  # it was alone
                        os.killpg(process.pid, signal.SIGKILL)
                process.wait(60)
                kills.append({"seconds": round(moment, 3), "whole_group": whole_group, "there": state_of(place)})
            if wrong or code == 0:
                break
            said = (place / "output.txt").read_text(errors="replace")
            if code is not None and not (task.name == "study" and "leave out --resume" in said[-400:]):
                wrong.append(f"exit code {code}: {(said.splitlines() or [''])[-1]}")
                break
        if "Traceback" in (place / "output.txt").read_text(errors="replace"):
            wrong.append("traceback")
        wrong = wrong or task.differences(full, place)
        left = sum(process.family_lives(10) for process in processes)
        hidden = [str(path.relative_to(place)) for path in left_files(place)]
        if not wrong and not left and not hidden:
            shutil.rmtree(place)
        return {
            "trial": number,
            "task": task.name,
            "code": code_of_package(),
            "kills": kills,
            "starts": len(processes),
            "mismatches": wrong,
            "processes_left": left,
            "files_left": hidden,
        }

    def run(self, kills: int) -> None:
        while self.kills() < kills:
            result = self.trial(len(self.results()))
            with (self.work / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)

    def table(self) -> str:
        lines = [
            "| task | runs | kills | starts | mismatches | processes left | files left |",
            "|---|---|---|---|---|---|---|",
        ]
        results = self.results()
        for name in [*(task.name for task in self.tasks), "all"]:
            rows = [one for one in results if name in (one["task"], "all")]
            numbers = (
                len(rows),
                sum(len(one["kills"]) for one in rows),
                sum(one["starts"] for one in rows),
                sum(bool(one["mismatches"]) for one in rows),
                sum(one["processes_left"] for one in rows),
                sum(bool(one["files_left"]) for one in rows),
            )
            lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
        return "\n".join(lines)


def code_of_package() -> str:
    """Returns a hash of the sources of the package, links followed."""
    found = hashlib.sha256()
    for folder in ("lightning_danube", "callbacks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def left_files(place: Path) -> Iterator[Path]:
    """Yields half-written files and locks. A version that was killed before its first checkpoint is given up."""
    for path in place.rglob(".*"):
        given_up = any(
            parent.name.startswith("version_") and parent != newest_version(parent.parents[2], parent.parent.name)
            for parent in path.parents
            if parent.parent.parent.name == "runs"
        )
        if path.suffix in (".partial", ".replaced", ".lock") and not given_up:
            yield path


def cpu_seconds(process: int) -> float:
    """Returns the CPU time of a process and its descendants, and of those that they have waited for."""
    ticks = 0
    with suppress(OSError, IndexError):  # it has ended meanwhile
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks = sum(map(int, fields[11:15]))
    children = 0.0
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            children += sum(cpu_seconds(int(child)) for child in task.read_text().split())
    return ticks / os.sysconf("SC_CLK_TCK") + children


def state_of(place: Path) -> str:
    """What was on the disk when a process was killed."""
    if any(path.suffix == ".partial" for path in place.rglob(".*.partial")):
        return "a file was being written"
    if any(place.glob("runs/**/checkpoints/*.ckpt")):
        return "after a checkpoint"
    return "before a checkpoint or a result"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="runs and results.jsonl")
    parser.add_argument("--temporary", type=Path, required=True, help="TMPDIR of the runs, on another file system")
    parser.add_argument("--kills", type=int, default=200, help="ends after so many, those of earlier calls included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], metavar="TASK", help="a task to run, repeatable")
    arguments = parser.parse_args()
    arguments.work, arguments.temporary = arguments.work.resolve(), arguments.temporary.resolve()
    trials = Trials(arguments.work, arguments.temporary, arguments.seed, arguments.only)
    if os.stat(arguments.work).st_dev == os.stat(arguments.temporary).st_dev:
        sys.exit(f"{arguments.temporary} is on the file system of {arguments.work}")
    trials.run(arguments.kills)
    print(trials.table())


# More than tests of one task need.
forked.IMPORTED += [
    "lightning_danube.chat",
    "lightning_danube.classification",
    "lightning_danube.evaluation",
    "lightning_danube.quantization",
    "lightning_danube.cli.verbs.study",
    "lightning_danube.studies.trials",
    # Imported by libraries in the middle of a run.
    "gigatoken",
    "s3fs",
]

if __name__ == "__main__":
    main()
