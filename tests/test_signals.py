"""Ctrl-C and SIGTERM while a process is busy in one long call: the answer comes before the call returns."""

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_danube import signals
from lightning_danube.__main__ import TRAINER_VERBS, main
from lightning_danube.cli.verbs import COMMANDS
from lightning_danube.signals import ANSWERING, PROMPTING, SIGNALS, Stopped, run_child
from tests.conftest import write_tiny
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[1]

# One call into C that no signal interrupts, and that leaves Python's lock to other threads, as torch's products do.
# 10 million rounds take seconds; the tests that end the process at once have the call take minutes.
BUSY = """
import hashlib, os, signal, sys, threading

def say(what):
    os.write(1, f"{what}\\n".encode())  # print writes text and newline apart, and another thread may come between

def busy(rounds, what="returned"):
    threading.Timer(0.1, say, ["busy"]).start()  # when the call has begun
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
    say(what)
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals to other processes")


class Busy:
    """A Python program that is told to stop while it works; `lines` are what it prints on both outputs, in order."""

    def __init__(self, folder: Path, program: str, *arguments: str, imported: bool = False) -> None:
        """`imported`: the process is forked from one that has imported the package."""
        if imported:
            os.mkfifo(folder / "output")
            quiet = "import warnings; warnings.simplefilter('ignore')\n"
            variables = {"PYTHONPATH": str(folder)}
            self.process: Any = Forked(
                [*arguments], folder / "output", folder, variables, program=quiet + BUSY + program
            )
            self.lines = iter((folder / "output").open())
            return
        script = folder / "program.py"
        script.write_text(BUSY + program)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",  # a warning quotes a line of the program
        }
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder,
            process_group=0,
        )
        assert self.process.stdout is not None
        self.lines = iter(self.process.stdout)

    def wait_for(self, text: str) -> list[str]:
        """What it prints until a line has the text."""
        seen = []
        for line in self.lines:
            seen.append(line.rstrip("\n"))
            if text in line:
                return seen
        raise AssertionError(f"it ended without {text!r}: {seen}")

    def end(self) -> tuple[int, list[str]]:
        """Its exit code, and what it still prints. Its children have its outputs, too: they have ended as well."""
        rest = [line.rstrip("\n") for line in self.lines]
        return self.process.wait(timeout=60), rest


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Any]:
    started: list[Busy] = []

    def start(text: str, *arguments: str, imported: bool = False) -> Busy:
        started.append(Busy(tmp_path, text, *arguments, imported=imported))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


VERB = """
if __name__ == "__main__":
    from lightning_danube import __main__

    def dispatch(args):
        WORK

    __main__._dispatch = dispatch
    sys.exit(__main__.main())
"""


def verb(work: str) -> str:
    return VERB.replace("WORK", work)


@pytest.mark.parametrize(
    ("number", "answer", "code"),
    [
        (signal.SIGINT, "SIGINT: stopping; once more ends at once", 130),
        (signal.SIGTERM, "SIGTERM: stopping", 143),
        (signal.SIGUSR1, "SIGUSR1: stopping", 138),
    ],
)
def test_the_answer_comes_before_the_call_returns(program: Any, number: int, answer: str, code: int) -> None:
    busy = program(verb("busy(3_000_000); busy(10**9)"))
    busy.wait_for("busy")
    busy.process.send_signal(number)
    assert busy.wait_for("SIG") == [answer]
    # It ends as soon as the first call has returned, and does not begin the second.
    assert busy.end() == (code, [])


@pytest.mark.parametrize(("task", "lines"), [("0", ["SIGUSR1: stopping", "SLURM job 4711 requeued"]), ("1", [])])
def test_the_time_limit_of_slurm_requeues_what_has_not_begun(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, lines: list[str]
) -> None:
    """Whatever the verb: only the first task of a step answers and asks, and no task counts as failed."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\n[ \"$*\" = 'requeue 4711' ]\n")
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_PROCID", task)
    busy = program(verb("busy(3_000_000); busy(10**9)"))
    busy.wait_for("busy")
    busy.process.send_signal(signal.SIGUSR1)
    assert busy.end() == (75, lines)


def test_the_time_limit_of_slurm_does_not_change_an_exit_code_that_is_decided(program: Any) -> None:
    busy = program(verb("return 0").replace("sys.exit(__main__.main())", "__main__.main(); busy(3_000_000)"))
    busy.wait_for("busy")
    busy.process.send_signal(signal.SIGUSR1)
    assert busy.end() == (0, ["returned"])


def test_the_time_limit_of_slurm_is_nothing_to_a_run_that_is_done() -> None:
    with SIGNALS.listening(own_process=False):
        SIGNALS.hold([signal.SIGUSR1])
        SIGNALS.all_done()
        SIGNALS.release()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert SIGNALS.received == signal.SIGUSR1


def test_a_second_interrupt_ends_the_process_in_the_midst_of_a_call(program: Any) -> None:
    busy = program(verb("busy(10**9)"))
    busy.wait_for("busy")
    busy.process.send_signal(signal.SIGINT)
    busy.wait_for("SIGINT: stopping")
    time.sleep(0.3)  # two at once count as one
    busy.process.send_signal(signal.SIGINT)
    assert busy.end() == (130, [])


def test_one_stop_may_arrive_twice(program: Any) -> None:
    """`timeout` sends its signal to the child and then to its group."""
    busy = program(verb("busy(3_000_000); busy(10**9)"))
    busy.wait_for("busy")
    for _ in range(2):
        busy.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert busy.end() == (130, ["SIGINT: stopping; once more ends at once"])


POOL = """
        from lightning_danube.text.worker_pool import WorkerPool
        with WorkerPool(2) as pool:
            say("begin")
            for work in [pool.submit(busy, ROUNDS, "made") for _ in range(20)]:
                work.result()
"""


@pytest.mark.parametrize(
    ("early", "number", "line"),
    [
        (True, signal.SIGINT, "SIGINT: stopping; once more ends at once"),
        (False, signal.SIGINT, "SIGINT: stopping; once more ends at once"),
        (True, signal.SIGUSR1, "SIGUSR1: stopping"),
        (False, signal.SIGUSR1, "SIGUSR1: stopping"),
    ],
)
def test_a_pool_leaves_the_answer_to_its_parent(program: Any, early: bool, number: int, line: str) -> None:
    """A terminal sends Ctrl-C to all processes of a command, SLURM its signal; here also while they still import."""
    busy = program(verb(POOL.replace("ROUNDS", "300_000")))
    busy.wait_for("begin" if early else "busy")
    if early:
        time.sleep(0.05)
    os.killpg(busy.process.pid, number)
    code, rest = busy.end()
    assert code == 128 + number
    # No traceback, no warning about semaphores; what had begun was finished, what waited was not begun.
    assert rest.count(line) == 1
    assert set(rest) <= {line, "busy", "made"}
    assert rest.count("made") < 20


def test_a_second_interrupt_ends_a_pool_as_well(program: Any) -> None:
    busy = program(verb(POOL.replace("ROUNDS", "10**9")))
    busy.wait_for("busy")
    for _ in range(2):
        os.killpg(busy.process.pid, signal.SIGINT)
        time.sleep(0.3)
    code, rest = busy.end()  # returns when the outputs are closed by all processes
    assert code == 130 and set(rest) <= {"busy", "SIGINT: stopping; once more ends at once"}, rest


FEW_VERBS = ("fit", "generate")


@pytest.mark.parametrize(
    "name",
    [
        *FEW_VERBS,
        *(
            pytest.param(name, marks=pytest.mark.medium)
            for name in {**COMMANDS, **TRAINER_VERBS}
            if name not in FEW_VERBS
        ),
    ],
)
def test_every_verb_answers(program: Any, name: str) -> None:
    """Whatever module does a verb's work."""
    module = "trainer_verbs" if name in TRAINER_VERBS else f"verbs.{name}"
    function = "main" if name in TRAINER_VERBS else "run"
    text = f"""
import types
import lightning_danube.cli
module = types.ModuleType("lightning_danube.cli.{module}")
module.add_arguments = lambda parser: None
module.{function} = lambda arguments: busy(10**9)
sys.modules[module.__name__] = module
if "{module}" == "trainer_verbs":
    lightning_danube.cli.trainer_verbs = module
from lightning_danube.__main__ import main
sys.exit(main())
"""
    busy = program(text, name)
    busy.wait_for("busy")
    busy.process.send_signal(signal.SIGTERM)
    assert busy.wait_for("SIGTERM") == ["SIGTERM: stopping"]
    time.sleep(0.3)
    busy.process.send_signal(signal.SIGINT)
    assert busy.end() == (130, [])


CHILD = """
from lightning_danube.signals import run_child
print(run_child([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(600)"]))
"""


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGINT)])
def test_a_program_that_was_started_ends_too(program: Any, numbers: tuple[int, ...]) -> None:
    busy = program(verb("exec(CHILD)").replace("if __name__", f"CHILD = '''{CHILD}'''\nif __name__", 1))
    busy.wait_for("child")
    for number in numbers:
        busy.process.send_signal(number)
        time.sleep(0.3)
    code, rest = busy.end()
    assert (code, rest) == (143, ["SIGTERM: stopping"])


SAVING_CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
def save(*_):
    # As a run does: it is told once by the terminal, and once by the process that started it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("saves", flush=True)
    time.sleep(SECONDS)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("child", flush=True)
time.sleep(600)
"""


def with_saving_child(program: Any, seconds: float) -> Busy:
    """Returns a program that has started another one, which saves for some seconds when it is told to stop."""
    child = SAVING_CHILD.replace("SECONDS", str(seconds))
    start = "from lightning_danube import signals; signals.run_child([sys.executable, '-c', CHILD], saves=True)"
    busy: Busy = program(verb(start).replace("if __name__", f"CHILD = {child!r}\nif __name__", 1))
    busy.wait_for("child")
    return busy


@pytest.mark.parametrize(
    ("number", "line", "code"),
    [
        (signal.SIGINT, "SIGINT: the run saves and ends first; once more ends it at once, unsaved", 130),
        (signal.SIGTERM, "SIGTERM: the run saves and ends first", 143),
    ],
)
def test_a_run_that_was_started_saves_first(program: Any, number: int, line: str, code: int) -> None:
    """Also where a terminal sends Ctrl-C to both, and no time limit ends the parent before."""
    busy = with_saving_child(program, seconds=0.5)
    os.killpg(busy.process.pid, number)
    ended, lines = busy.end()
    # Two processes print; only the last line has its place.
    assert ended == code and sorted(lines[:-1]) == sorted([line, "saves"]) and lines[-1] == "saved"


def test_a_second_interrupt_ends_a_run_that_was_started(program: Any) -> None:
    busy = with_saving_child(program, seconds=600)
    busy.process.send_signal(signal.SIGINT)
    busy.wait_for("SIGINT: the run saves")
    busy.wait_for("saves")
    time.sleep(0.3)
    busy.process.send_signal(signal.SIGINT)
    assert busy.end() == (130, [])


GRANDCHILD = """
from lightning_danube import signals
signals.run_child([sys.executable, __file__, "child"], saves=True)
"""


def test_a_run_ends_when_the_process_that_started_it_was_killed(program: Any) -> None:
    """As `study` does after kill -9: the run is told to stop, as by SIGTERM, and so saves."""
    busy = program(
        verb("busy(3_000_000, 'over') if 'child' in sys.argv else exec(START)").replace(
            "if __name__", f"START = {GRANDCHILD!r}\nif __name__", 1
        )
    )
    busy.wait_for("busy")
    busy.process.send_signal(signal.SIGKILL)
    code, rest = busy.end()  # returns when the child has closed the outputs as well
    assert code == -signal.SIGKILL and rest[0] == "SIGTERM: stopping"


def test_a_fork_leaves_signals_to_its_parent(program: Any) -> None:
    busy = program(verb("child = os.fork(); busy(2_000_000, 'parent' if child else 'child'); child or os._exit(0)"))
    busy.wait_for("busy")
    busy.wait_for("busy")
    os.killpg(busy.process.pid, signal.SIGINT)
    code, rest = busy.end()
    assert code == 130 and sorted(rest) == ["SIGINT: stopping; once more ends at once", "child"], rest


def test_an_ignored_signal_stays_ignored(program: Any) -> None:
    """As `nohup`, or a shell's background job, asks."""
    busy = program("signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + verb("busy(2_000_000); return 0"))
    busy.wait_for("busy")
    busy.process.send_signal(signal.SIGINT)
    assert busy.end() == (0, ["returned"])


@pytest.mark.parametrize(("rank", "code", "said"), [("0", -signal.SIGINT, ["ends"]), ("1", 0, ["ends", "ended"])])
def test_a_signal_while_a_rank_shuts_down_is_no_failure(program: Any, rank: str, code: int, said: list[str]) -> None:
    """Rank zero would end itself because of another rank that a signal ended, perhaps within a save."""
    at_end = (
        "lambda: (say('ends'), os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGTERM), say('ended'))"
    )
    busy = program(
        f"import atexit; os.environ['LOCAL_RANK'] = '{rank}'; atexit.register({at_end})\n" + verb("return 0")
    )
    assert busy.end() == (code, said)


def test_another_listener_keeps_its_descriptor(program: Any) -> None:
    """Without a thread the answer waits for the call, but comes."""
    text = "ours, theirs = os.pipe(); os.set_blocking(theirs, False); signal.set_wakeup_fd(theirs)\n"
    busy = program(text + verb("busy(2_000_000); busy(10**9)"))
    busy.wait_for("busy")
    busy.process.send_signal(signal.SIGINT)
    assert busy.end() == (130, ["SIGINT: stopping; once more ends at once"])


# --- inside another program -------------------------------------------------------------------------------------------


def test_called_as_a_function_it_gives_all_handlers_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["--version"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_in_a_thread_it_takes_no_signals() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_held_signals_are_remembered_and_a_second_interrupt_raises(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    SIGNALS.hold([signal.SIGINT])
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert SIGNALS.received is signal.SIGINT
        time.sleep(0.3)
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
        assert stopped.value.code == 130
    finally:
        SIGNALS.release()
    assert signal.getsignal(signal.SIGINT) is before
    line = "SIGINT: saving after this optimizer step, then stopping; once more stops at once, without saving\n"
    assert capfd.readouterr().err == line


def test_an_interrupt_after_sigterm_is_the_first_one_where_a_run_is_saved(capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody has told the user that it ends the run unsaved."""
    saves = "saving after this optimizer step, then stopping"
    SIGNALS.hold([signal.SIGINT, signal.SIGTERM])
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        for _ in range(2):  # at once: one Ctrl-C
            os.kill(os.getpid(), signal.SIGINT)
        assert SIGNALS.received is signal.SIGTERM
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
        assert stopped.value.code == 130
    finally:
        SIGNALS.release()
    line = f"SIGTERM: {saves}\nSIGINT: {saves}; once more stops at once, without saving\n"
    assert capfd.readouterr().err == line


def test_a_chat_goes_on_after_an_interrupt(capfd: pytest.CaptureFixture[str]) -> None:
    with SIGNALS.listening(own_process=False), SIGNALS.during(PROMPTING):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt), SIGNALS.during(ANSWERING):
                os.kill(os.getpid(), signal.SIGINT)
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)  # at the prompt
        with pytest.raises(Stopped) as stopped, SIGNALS.during(ANSWERING):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert capfd.readouterr().err == "SIGTERM: stopping\n"


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Windows cannot signal a thread")
def test_an_interrupt_that_a_prompt_has_not_seen_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """input() does not see a signal between the prompt and its wait for a key."""
    monkeypatch.setattr(signals, "SECONDS_OF_PATIENCE", 0.01)
    monkeypatch.setattr(SIGNALS, "_at_prompt", 0.0)
    with SIGNALS.listening(own_process=False), SIGNALS.during(PROMPTING):
        with pytest.raises(KeyboardInterrupt):
            SIGNALS._interrupt_prompt_again()
            time.sleep(5)
        assert SIGNALS._at_prompt > 0
        SIGNALS._interrupt_prompt_again()  # it has just been taken
        time.sleep(0.1)


# --- a run ------------------------------------------------------------------------------------------------------------

CALLBACK = """
import hashlib, threading
from lightning.pytorch import Callback

class Block(Callback):
    def __init__(self, moment: str, rounds: int) -> None:
        self.moment, self.rounds = moment, rounds

    def _block(self, moment):
        if moment == self.moment:
            threading.Timer(0.1, lambda: print("busy", flush=True)).start()  # when the call has begun
            hashlib.pbkdf2_hmac("sha256", b"", b"", self.rounds)
            self.moment = ""

    def on_fit_start(self, trainer, pl_module):
        self._block("start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            self._block("step")

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step:  # before the first step nothing would be saved
            self._block("validation")

    def on_fit_end(self, trainer, pl_module):
        self._block("end")
"""

SAVES = "saving after this optimizer step, then stopping"


@pytest.mark.medium
@pytest.mark.parametrize(
    ("moment", "answer", "code", "then"),
    [
        ("start", "SIGTERM: stopping", 143, ""),
        ("step", f"SIGTERM: {SAVES}", 75, "stopped after step 4, saved: resume with --ckpt_path last"),
        ("end", "SIGTERM: all steps are done and saved, the run ends soon", 0, ""),
    ],
)
def test_a_run_answers_at_any_moment(
    program: Any, tmp_path: Path, moment: str, answer: str, code: int, then: str
) -> None:
    busy = run(program, tmp_path, moment, 4_000_000, "--trainer.max_steps", "6")
    busy.wait_for("busy")
    busy.process.send_signal(signal.SIGTERM)
    assert busy.wait_for("SIG")[-1] == answer
    found, rest = busy.end()
    assert found == code and "Traceback" not in "\n".join(rest), rest
    assert then in "\n".join(rest)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "step", "validation"])
def test_a_second_interrupt_ends_a_run_and_its_processes(program: Any, tmp_path: Path, moment: str) -> None:
    busy = run(program, tmp_path, moment, 10**9, "--data.init_args.workers", "1")
    busy.wait_for("busy")
    os.killpg(busy.process.pid, signal.SIGINT)
    busy.wait_for("SIGINT: stopping" if moment == "start" else "SIGINT: saving")
    time.sleep(0.3)
    os.killpg(busy.process.pid, signal.SIGINT)
    assert busy.end() == (130, [])


def run(program: Any, folder: Path, moment: str, rounds: int, *options: str) -> Busy:
    (folder / "blocking.py").write_text(CALLBACK)
    tiny = write_tiny(folder)
    callback = f"    - class_path: blocking.Block\n      init_args: {{moment: {moment}, rounds: {rounds}}}\n"
    (folder / "told.yaml").write_text((tiny / "tiny.yaml").read_text() + callback)
    text = "from lightning_danube.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    busy: Busy = program(text, "fit", "--config", "told.yaml", *options, imported=True)
    return busy


def test_python_still_has_the_private_end_of_its_processes() -> None:
    import multiprocessing.util

    assert "minpriority" in inspect.signature(vars(multiprocessing.util)["_run_finalizers"]).parameters


# --- in this process --------------------------------------------------------------------------------------------------


def test_an_interrupt_waits_until_processes_are_started(capfd: pytest.CaptureFixture[str]) -> None:
    """A process that starts has the signal blocked; the parent hears of it when the start is over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    SIGNALS.hold([signal.SIGINT, signal.SIGTERM])
    try:
        with SIGNALS.starting_processes():
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert SIGNALS.received is None
        assert SIGNALS.received is signal.SIGTERM
    finally:
        SIGNALS.release()
    assert (
        blocked == before | {signal.SIGINT, signal.SIGUSR1} and signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    )
    assert capfd.readouterr().err == "SIGTERM: saving after this optimizer step, then stopping\n"


def test_one_rank_answers_a_terminal_and_each_its_own_signal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for variable, rank, number, said in (
        ("LOCAL_RANK", "0", signal.SIGINT, "SIGINT: saving after this optimizer step, then stopping; once more stops"),
        ("LOCAL_RANK", "1", signal.SIGINT, ""),
        (
            "LOCAL_RANK",
            "1",
            signal.SIGTERM,
            "SIGTERM on local rank 1: saving after this optimizer step, then stopping\n",
        ),
        # SLURM tells every task, and sets no LOCAL_RANK.
        ("SLURM_PROCID", "0", signal.SIGUSR1, "SIGUSR1: saving after this optimizer step, then stopping\n"),
        ("SLURM_PROCID", "1", signal.SIGUSR1, ""),
        ("SLURM_PROCID", "1", signal.SIGTERM, ""),
    ):
        for name in ("LOCAL_RANK", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(variable, rank)
        SIGNALS.hold([number])
        try:
            os.kill(os.getpid(), number)
            assert SIGNALS.received is number
        finally:
            SIGNALS.release()
        error = capfd.readouterr().err
        assert error.startswith(said) and bool(error) == bool(said)


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_child(["sh", "-c", f"sleep 1; touch {tmp_path}/done"], timeout=0.1)
    assert not (tmp_path / "done").exists(), "it was waited for"
    done = run_child(["sh", "-c", "echo said; exit 3"], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (3, "said\n")
