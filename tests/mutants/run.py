"""Plants small bugs one at a time, and looks whether the fast tests notice.

    python tests/mutants/run.py                       mutants whose file or tests changed since their last run
    python tests/mutants/run.py --again               all mutants
    python tests/mutants/run.py studies chat          mutants of these tables
    python tests/mutants/run.py chat:ranking          mutants of a table whose names hold a word

A mutant is an entry of a table `tests/mutants/<room>.yaml`:

    - name: the divergence has its arguments exchanged
      file: lightning_danube/quantization/levels.py
      find: divergence(full, quantized)                # stands exactly once in the file
      replace: divergence(quantized, full)
      tests: [tests/quantization/test_levels.py]       # files or tests, one of which must fail
      survives: why no test can see it                 # only where that is so

Each mutant runs in a copy of the working tree, in a process that is forked from this one, which has imported the heavy
libraries. New mutants and survivors run first, then those with fast tests. Mutants with the same tests run one after
another, and the test that killed a mutant last runs before the others. Then the tests that killed them run without a
mutant: a test that fails there, too, kills nothing. Results are kept in results.jsonl beside the tables, a line for
each mutant, and docs/mutants.md gets the table. A run that was stopped goes on when it is started again. The exit code
is 1 if a mutant survives without a stated reason.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.jsonl"
PAGE = ROOT / "docs" / "mutants.md"
TIME_LIMIT = 300
"""Seconds that the tests of one mutant may take. A mutant that makes them hang counts as killed."""
TIME_IS_OVER = "time limit"
AT_ONCE = 8
"""Most mutants whose results are written together. A run that is stopped loses at most so many."""
ENDS = (0, 1, -signal.SIGKILL)
"""Exit codes of tests that pass, that fail, and that hang."""

HEAVY = (
    "datasets",
    "gguf",
    "lightning.pytorch.cli",
    "optuna",
    "peft",
    "pyarrow.parquet",
    "pytest",
    "s3fs",
    "statsmodels.stats.power",
    "tokenizers",
    "torch.utils.tensorboard",
    "torchmetrics.text",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
)
"""What is imported before the fork. Nothing of this project may be among it: a mutant would not be seen."""


@dataclass(frozen=True)
class Mutant:
    """One small bug, and the tests that should notice it."""

    room: str
    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    survives: str = ""

    @cached_property
    def mutated(self) -> str:
        """The text of the file with the bug in it, as the file is when this is first asked for."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.find) != 1:
            raise ValueError(
                f"{self.room}: {self.name}: {self.find!r} stands {text.count(self.find)} times in {self.file}"
            )
        return text.replace(self.find, self.replace)

    @property
    def files_of_tests(self) -> tuple[str, ...]:
        return tuple(sorted({test.partition("::")[0] for test in self.tests}))

    @cached_property
    def key(self) -> str:
        """A hash of the mutated file and of the tests, as they are when it is first asked for."""
        parts = [self.mutated, *self.tests]
        parts += [(ROOT / test.partition("::")[0]).read_text(encoding="utf-8") for test in self.tests]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What the tests said of a mutant when it ran last.

    `by`: the test that failed, `time limit`, or nothing if the mutant survived. `key`: the mutant's key at that time.
    """

    room: str
    name: str
    by: str
    seconds: float
    key: str


def mutants() -> list[Mutant]:
    """All mutants of all tables."""
    return [
        Mutant(**{"room": table.stem, **entry, "tests": tuple(entry["tests"])})
        for table in sorted(HERE.glob("*.yaml"))
        for entry in yaml.load(table.read_text(encoding="utf-8"), yaml.CSafeLoader)  # the one in Python takes seconds
    ]


def results() -> dict[tuple[str, str], Result]:
    """Room and name of a mutant → its last result."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {(result.room, result.name): result for result in (Result(**json.loads(line)) for line in lines)}


def is_valid(one: Mutant, result: Result | None) -> bool:
    """Whether the mutant would be the same today: neither its file nor its tests have changed."""
    return one.key == (result.key if result else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help="tables, or table:word (default: all)")
    parser.add_argument("--again", action="store_true", help="also run mutants that have a result")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes beside each other")
    arguments = parser.parse_args()
    chosen = [one for one in mutants() if not arguments.which or any(is_meant(one, word) for word in arguments.which)]
    known = {} if arguments.again else results()
    todo = [one for one in chosen if not is_valid(one, known.get((one.room, one.name)))]
    print(f"{len(chosen)} mutants, {len(todo)} to run", flush=True)
    if todo:
        run(todo, arguments.jobs)
    PAGE.write_text(page(), encoding="utf-8")
    known = results()
    survivors = [one for one in chosen if not known[one.room, one.name].by and not one.survives]
    for one in survivors:
        print(f"survived: {one.room}: {one.name}, in {one.file}")
    return 1 if survivors else 0


def is_meant(one: Mutant, word: str) -> bool:
    room, _, part = word.partition(":")
    return one.room == room and part in one.name


def run(todo: list[Mutant], jobs: int) -> None:
    """Runs the tests of each mutant. The results of mutants that share their tests are written together.

    Raises:
        SystemExit: at the end, if tests failed without a mutant, or did not run with one. Such results are not kept.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # Bytecode is known by the second and the size of its source, which two mutants of a file can share.
    sys.dont_write_bytecode = True
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()
    killed = {place: one.seconds for place, one in results().items() if one.by}
    groups: dict[tuple[bool, tuple[str, ...]], list[Mutant]] = {}
    for one in todo:
        groups.setdefault(((one.room, one.name) in killed, one.files_of_tests), []).append(one)

    def seconds(group: list[Mutant]) -> float:
        """Returns the mean seconds of mutants when they were killed last, so new ones and survivors come first."""
        return sum(killed.get((one.room, one.name), 0.0) for one in group) / len(group)

    parts = [group[n : n + AT_ONCE] for group in groups.values() for n in range(0, len(group), AT_ONCE)]
    waiting, failures = deque(sorted(parts, key=seconds)), list[str]()
    with tempfile.TemporaryDirectory() as directory:
        workers = [work(copy_of_the_tree(Path(directory) / str(n)), waiting, failures) for n in range(jobs)]
        trials = {n: next(worker) for n, worker in enumerate(workers) if waiting}
        try:
            while trials:
                time.sleep(0.02)
                for n in [n for n, trial in trials.items() if trial.is_over()]:
                    if trial := next(workers[n], None):
                        trials[n] = trial
                    else:
                        del trials[n]
        finally:
            for trial in trials.values():
                if trial.code is None:
                    trial.kill()
    if failures:
        raise SystemExit("\n".join(failures))


def work(copy: Path, waiting: deque[list[Mutant]], failures: list[str]) -> Iterator[Trial]:
    """Begins one trial after another, each when the last is over, and keeps the results of each group of mutants."""
    known = results()
    while waiting:
        found = []
        for one in waiting.popleft():
            last = known.get((one.room, one.name))
            yield (trial := Trial(copy, one, one.tests, last.by if last else ""))
            if trial.code in ENDS:
                found.append(trial.result())
            else:
                failures.append(f"{one.room}: {one.name}: its tests did not run\n{trial.output()}")
        if killers := sorted({result.by for result in found} - {"", TIME_IS_OVER}):
            yield (trial := Trial(copy, None, tuple(killers)))
            if trial.code != 0:
                failures.append(f"tests fail without a mutant\n{trial.output()}")
                found = [result for result in found if result.by not in trial.failed()] if trial.code == 1 else []
        keep(found)


def copy_of_the_tree(copy: Path) -> Path:
    """Copies what git knows, and what it does not ignore. Its bytecode is checked by the hash of the source."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    compiled = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
    subprocess.run([*compiled, "lightning_danube", "callbacks"], cwd=copy, check=True)
    return copy


class Trial:
    """Tests that run in a copy of the tree, in a process of their own.

    With a mutant, they end with the first failure. `first`: the test that runs before all others.
    """

    def __init__(self, copy: Path, mutant: Mutant | None, tests: tuple[str, ...], first: str = "") -> None:
        self.copy, self.mutant = copy, mutant
        self.code: int | None = None
        self.seconds, self.last = 0.0, time.monotonic()
        if mutant is not None:
            self.sound = (copy / mutant.file).read_bytes()
            (copy / mutant.file).write_text(mutant.mutated, encoding="utf-8")
        self.process = os.fork()
        if self.process == 0:
            test_in(copy, tests, first, ends=mutant is not None)

    def is_over(self) -> bool:
        """Whether the tests have ended or reached the time limit. The copy is restored then."""
        now = time.monotonic()
        self.seconds += min(1.0, now - self.last)  # without the time in which this machine was asleep
        self.last = now
        if self.seconds > TIME_LIMIT:
            self.kill()
            self.code = -signal.SIGKILL
        else:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process == 0:
                return False
            self.code = os.waitstatus_to_exitcode(status)
        if self.mutant is not None:
            (self.copy / self.mutant.file).write_bytes(self.sound)
        return True

    def kill(self) -> None:
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)

    def output(self) -> str:
        return (self.copy / "output.txt").read_text(encoding="utf-8", errors="replace")[-4000:]

    def failed(self) -> list[str]:
        return (self.copy / "failed.txt").read_text(encoding="utf-8").splitlines()

    def result(self) -> Result:
        assert self.mutant is not None
        by = {0: "", 1: next(iter(self.failed()), ""), -signal.SIGKILL: TIME_IS_OVER}[self.code or 0]
        return Result(self.mutant.room, self.mutant.name, by, round(self.seconds, 1), self.mutant.key)


def test_in(copy: Path, tests: tuple[str, ...], first: str, *, ends: bool) -> None:
    """Runs tests, until one fails if it `ends` there, and ends this process with the exit code of pytest."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        os.chdir(copy)
        with open("output.txt", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[0] = str(copy)
        import pytest

        class Failures:
            """Writes down which tests fail. The path is absolute: a test may be in another directory."""

            def __init__(self) -> None:
                (copy / "failed.txt").write_text("", encoding="utf-8")

            def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
                items.sort(key=lambda item: item.nodeid != first)

            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.failed:
                    with (copy / "failed.txt").open("a", encoding="utf-8") as file:
                        file.write(f"{report.nodeid}\n")

        unused = [f"-pno:{plugin}" for plugin in ("cacheprovider", "anyio", "xdist", "xdist.looponfail")]
        options = ["-q", *unused, "--basetemp", str(copy / "tmp"), *(["-x"] if ends else [])]
        code = pytest.main([*options, *tests], plugins=[Failures()])
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def keep(found: list[Result]) -> None:
    for one in found:
        print(f"{'killed' if one.by else 'SURVIVED':8} {one.seconds:5.1f} s  {one.room}: {one.name}", flush=True)
    kept = results() | {(one.room, one.name): one for one in found}
    lines = sorted(json.dumps(asdict(each), ensure_ascii=False) for each in kept.values())
    RESULTS.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def page() -> str:
    """The text of docs/mutants.md."""
    known, every = results(), mutants()
    found = [(one, known.get((one.room, one.name))) for one in every]
    ran = sum(result is not None for _, result in found)
    killed = sum(bool(result and result.by) for _, result in found)
    changed = sum(result is not None and not is_valid(one, result) for one, result in found)
    lines = [
        "# Mutants",
        "",
        "A mutant is a small, realistic bug that is planted in the code on purpose. The fast tests should fail.",
        "`make mutants` plants all of them, one at a time, and writes this page. [run.py](../tests/mutants/run.py)",
        "says how. The bugs are chosen by hand: tools that change operators at random do not exchange the arguments",
        "of a divergence, or call Bonferroni's correction Holm's.",
        "",
        f"**{killed} of {ran} mutants were killed when they ran last ({killed / max(1, ran):.1%}).**",
        f"{len(every) - ran} of {len(every)} have not run yet.",
        f"Since then the file or a test of {changed} has changed; they run again with `make mutants`.",
    ]
    for room in sorted({one.room for one in every}):
        lines += ["", f"## {room}", "", "| mutant | in | killed by |", "|---|---|---|"]
        lines += [
            f"| {one.name} | `{one.file}` | {verdict(one, result)} |" for one, result in found if one.room == room
        ]
    return "\n".join([*lines, ""])


def verdict(one: Mutant, result: Result | None) -> str:
    if result is None:
        return "has not run"
    return f"`{result.by}`" if result.by else f"**survives**: {one.survives or 'no reason known'}"


if __name__ == "__main__":
    sys.exit(main())
