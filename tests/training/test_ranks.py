"""Runs of two ranks in which one fails: all end soon, one of them says why, none is left."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_danube.signals import Stopped
from lightning_danube.training import ranks
from lightning_danube.training.ranks import (
    RankLauncher,
    check_host_name,
    end_with_launcher,
    explain_silence,
    let_rank_zero_speak,
)
from tests.probes import samples_of_steps

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
"""For a whole run on a busy machine, its start included. Left alone, a rank waits half an hour for another."""


def processes_marked(mark: str) -> Iterator[int]:
    wanted = f"KILL_TEST={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = set((entry / "environ").read_bytes().split(b"\0"))
            except OSError:
                continue
            if wanted in environment:
                yield int(entry.name)


class TwoRanks:
    """A run of `tiny` in two ranks, started as a person would."""

    def __init__(self, tiny: Path) -> None:
        self.tiny, self.mark = tiny, uuid.uuid4().hex
        self.config = (tiny / "tiny.yaml").read_text().replace("micro_batch_size: 8", "micro_batch_size: 4")

    def with_callback(self, name: str, **arguments: object) -> None:
        # Before the last, Checkpoints.
        head, last, tail = self.config.rpartition("    - class_path:")
        self.config = f"{head}    - class_path: {name}\n      init_args: {json.dumps(arguments)}\n{last}{tail}"

    def fit(self, *options: str) -> tuple[int, str]:
        """Exit code of the process that was started, and what all say on stderr, once none is left."""
        (self.tiny / "two.yaml").write_text(self.config)
        command = [sys.executable, "-m", "lightning_danube", "fit", "--config", str(self.tiny / "two.yaml")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KILL_TEST": self.mark}
        with (self.tiny / "stderr.txt").open("w") as stderr:
            process = self.process = subprocess.Popen(
                [*command, "--trainer.devices", "2", "--trainer.strategy", "ddp", *options],
                env=environment,
                cwd=self.tiny,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                process_group=0,
            )
        try:
            code = process.wait(SECONDS)
            end = time.monotonic() + 20
            while left := list(processes_marked(self.mark)):
                assert time.monotonic() < end, f"{len(left)} processes are left"
                time.sleep(0.1)
        finally:
            for left_over in processes_marked(self.mark):
                os.kill(left_over, signal.SIGKILL)
        return code, (self.tiny / "stderr.txt").read_text()


@pytest.fixture
def two(tiny: Path) -> TwoRanks:
    return TwoRanks(tiny)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_over_the_ranks_is_refused_once(two: TwoRanks) -> None:
    code, said = two.fit("--data.init_args.micro_batch_size", "8")
    assert code == 2
    assert said == (
        "error: a step of 8 rows (data.batch_tokens / data.context_length) does not divide into 2 devices × "
        "micro-batch of 8 rows: data.micro_batch_size = 1, 2 or 4 would\n"
    )
    assert not (two.tiny / "runs").exists()


@pytest.mark.slow
def test_a_mistake_that_only_rank_zero_meets_ends_all(two: TwoRanks) -> None:
    """After the first stage, while the other rank waits for the checkpoint that rank zero is to write."""
    two.config = two.config.replace("The river", "The river " * 40)
    code, said = two.fit()
    assert code == 2
    assert said.startswith("error: the sample prompt") and said.endswith("tokens, the context 32\n")
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "rank", "workers", "code", "line"),
    [
        (
            "kill",
            1,
            2,
            128 + 9,
            "error: rank 1 of 2 was ended by SIGKILL, as when memory runs out, and the other ranks",
        ),
        ("kill", 0, 2, -9, "error: rank 0 was ended, as when memory runs out, and the other ranks"),
        ("disk", 1, 0, 2, "error: web.arrow: Input/output error (on rank 1)\n"),
        ("disk", 0, 0, 2, "error: web.arrow: Input/output error\n"),
        ("disk", None, 0, 2, "error: web.arrow: Input/output error\n"),
    ],
)
def test_a_rank_that_ends_takes_the_others_with_it_and_the_cause_is_said_once(
    two: TwoRanks, what: str, rank: int | None, workers: int, code: int, line: str
) -> None:
    two.with_callback("tests.probes.Fail", what=what, micro_batch=7, rank=rank)
    found, said = two.fit("--data.init_args.workers", str(workers))
    assert said.startswith(line) and said.count("\n") == 1
    assert found == code


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_takes_the_others_with_it_when_the_time_is_over(two: TwoRanks, rank: int) -> None:
    two.with_callback("tests.probes.Fail", what="hang", micro_batch=7, rank=rank)
    begin = time.monotonic()
    strategy = ["--trainer.strategy", "lightning.pytorch.strategies.DDPStrategy"]
    code, said = two.fit(*strategy, "--trainer.strategy.timeout", "0:00:25")
    assert code == 2 and time.monotonic() - begin < SECONDS
    assert said.count("\n") == 1 and said.startswith("error: waited 25 s for another rank")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_ours_on_one_rank_shows_one_traceback(two: TwoRanks, rank: int) -> None:
    two.with_callback("tests.probes.Fail", what="fault", micro_batch=7, rank=rank)
    code, said = two.fit()
    assert code == 1
    assert said.count("Traceback") == 1 and "RuntimeError: a fault of ours" in said
    assert ("on rank 1" in said) == (rank == 1)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["one", "all"])
def test_sigterm_and_then_ctrl_c_save_the_run(two: TwoRanks, whom: str) -> None:
    """SIGTERM to rank zero alone (`kill`) or to all (`timeout`), and a second later Ctrl-C, which a terminal sends to
    all: the ranks may then train, save or shut down. The run is saved, and no rank is said to have failed."""
    two.config = two.config.replace("tokens: 3K", "tokens: 4M")
    run = two.tiny / "runs" / "tiny" / "version_0"

    def stop() -> None:
        while not list(run.glob("checkpoints/*.ckpt")):
            time.sleep(0.05)
        (os.killpg if whom == "all" else os.kill)(two.process.pid, signal.SIGTERM)
        time.sleep(1.0)
        with suppress(ProcessLookupError):
            os.killpg(two.process.pid, signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    code, said = two.fit("--data.init_args.max_epochs", "10000")
    assert code == 75 and "saved: resume with --ckpt_path last" in said and "error" not in said


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_is_skipped_by_both(two: TwoRanks) -> None:
    """They decide alike before the step: a rank that went on alone would train another model from there."""
    two.with_callback("lightning_danube.callbacks.SkipBadSteps", stop_after=2)
    two.with_callback("tests.probes.KeysOfSteps", directory=str(two.tiny / "keys"))
    two.with_callback("tests.probes.Poison", steps=[3, 6, 7], what="loss", rank=1)
    code, said = two.fit()
    run = two.tiny / "runs" / "tiny" / "version_0"
    assert code == 2
    assert said == (
        f"error: 2 optimizer steps in a row were skipped, up to step 7 ({run}/skipped.jsonl names their samples): the "
        f"last good checkpoint is {run}/checkpoints/step_00000005.ckpt\n"
    )
    records = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [(record["step"], record["cause"]) for record in records] == [
        (step, "loss is not finite") for step in (3, 6, 7)
    ]
    samples = samples_of_steps(two.tiny / "keys")
    for record in records:
        said_rows = [(sample["epoch"], sample["row"]) for sample in record["samples"]]
        assert said_rows == [(epoch, row) for _, _, epoch, row in samples[record["step"] - 1]]


# --- the launcher alone -----------------------------------------------------------------------------------------------


class Launcher(RankLauncher):
    """Starts programs in place of ranks."""

    def __init__(self, *programs: str) -> None:
        super().__init__(LightningEnvironment(), num_processes=1 + len(programs), num_nodes=1)
        self.programs = programs

    def _call_children_scripts(self) -> None:
        self.procs = [subprocess.Popen(["sh", "-c", program]) for program in self.programs]


@pytest.fixture(autouse=True)
def first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would make this process a rank that others have started."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_it_takes_the_place_of_lightnings() -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    for devices, launcher in ((2, RankLauncher), (1, type(None))):
        trainer = Trainer(devices=devices, strategy="ddp" if devices > 1 else "auto", **options)
        RankLauncher.install(trainer)
        assert type(trainer.strategy.launcher) is launcher


def exit_code_of(function: Callable[[], Any]) -> int:
    """Of a process of its own that calls the function, and would otherwise end with 0."""
    child = os.fork()
    if not child:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_rank_zero_is_done_when_all_are(tmp_path: Path) -> None:
    launcher = Launcher(f"sleep 0.3; touch {tmp_path}/done")
    assert launcher.launch(lambda n: n + 1, 2) == 3
    assert (tmp_path / "done").exists()


def test_told_to_stop_it_waits_for_the_others_as_well(tmp_path: Path) -> None:
    launcher = Launcher(f"sleep 0.3; touch {tmp_path}/done")

    def stop() -> None:
        raise Stopped("saved")

    with pytest.raises(Stopped):
        launcher.launch(stop)
    assert (tmp_path / "done").exists()


def test_the_echo_of_a_rank_that_is_slow_to_end_is_not_heard(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "SECONDS_OF_DOUBT", 0.1)
    launcher = Launcher("sleep 2; exit 7")

    def lose_the_connection() -> None:
        raise RuntimeError("[.../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    assert exit_code_of(lambda: launcher.launch(lose_the_connection)) == 7
    assert capfd.readouterr().err == ""


def test_a_rank_that_does_not_end_when_all_is_done_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SECONDS_TO_END", 0.2)
    launcher = Launcher("sleep 60")
    launcher.launch(lambda: None)
    assert launcher.procs[0].wait(5) == -signal.SIGKILL


def test_an_error_of_rank_zero_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    launcher = Launcher("sleep 60", "sleep 60")

    def fail() -> None:
        raise ValueError("wrong")

    def ended() -> None:
        with pytest.raises(ValueError, match="wrong"):
            launcher.launch(fail)
        assert [process.wait(5) for process in launcher.procs] == [-signal.SIGKILL] * 2
        time.sleep(0.5)  # time to take their ends for failures of theirs

    # In a process of its own: one that has failed is ended before long.
    assert exit_code_of(ended) == 0
    assert capfd.readouterr().err == ""


def test_an_error_that_keeps_rank_zero_from_ending_is_said_and_it_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a communicator may, whose destructor waits for a peer."""
    monkeypatch.setattr(ranks, "SECONDS_TO_END", 0.2)

    def fail() -> None:
        raise ValueError("wrong")

    def stuck() -> None:
        with pytest.raises(ValueError):
            Launcher("sleep 60").launch(fail)
        time.sleep(60)

    assert exit_code_of(stuck) == 1
    assert capfd.readouterr().err == "error: wrong\n"


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (
            "kill -9 $$",
            128 + 9,
            "error: rank 2 of 3 was ended by SIGKILL, as when memory runs out, and the other ranks",
        ),
        ("kill -11 $$", 128 + 11, "error: rank 2 of 3 was ended by SIGSEGV, and the other ranks with it: resume from"),
        (
            "kill -35 $$",
            128 + 35,
            "error: rank 2 of 3 was ended by signal 35, and the other ranks with it: resume from",
        ),
        ("exit 2", 2, ""),  # it has said why
    ],
)
def test_rank_zero_does_not_wait_for_one_that_failed(
    capfd: pytest.CaptureFixture[str], program: str, code: int, said: str, echo: bool
) -> None:
    """Neither in a collective operation that hangs nor in one that fails, with an error that names no cause."""

    def collective() -> None:
        if echo:
            raise RuntimeError("Connection closed by peer")
        time.sleep(60)

    launcher = Launcher("sleep 60", program)
    began = time.monotonic()
    assert exit_code_of(lambda: launcher.launch(collective)) == code
    assert time.monotonic() - began < 30
    error = capfd.readouterr().err
    assert error.startswith(said) and error.count("\n") == bool(said)


def test_a_rank_whose_launcher_is_gone_ends(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def rank() -> None:
        end_with_launcher()
        time.sleep(60)

    monkeypatch.setenv("LIGHTNING_DANUBE_LAUNCHER", "1")  # the parent is another process by now
    for number, said in (
        ("1", "error: rank 0 was ended, as when memory runs out, and the other ranks with it"),
        ("2", ""),
    ):
        monkeypatch.setenv("LOCAL_RANK", number)
        assert exit_code_of(rank) == 1
        assert capfd.readouterr().err.startswith(said)


def test_other_ranks_leave_the_word_to_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank, seconds, notes in ((0, [], []), (3, [10.0], ["on rank 3"])):
        error = ValueError("wrong")
        let_rank_zero_speak(rank, error)
        assert slept == seconds and getattr(error, "__notes__", []) == notes


def test_lightnings_launcher_has_the_private_parts_that_ours_uses() -> None:
    assert list(signature(_SubprocessScriptLauncher).parameters) == [
        "cluster_environment",
        "num_processes",
        "num_nodes",
    ]
    assert list(signature(_SubprocessScriptLauncher._call_children_scripts).parameters) == ["self"]
    assert list(signature(_set_num_threads_if_needed).parameters) == ["num_processes"]
    assert _SubprocessScriptLauncher(LightningEnvironment(), 2, 1).procs == []


def test_our_launcher_takes_the_place_of_lightnings() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    assert type(trainer.strategy._launcher) is _SubprocessScriptLauncher
    RankLauncher.install(trainer)
    assert type(trainer.strategy.launcher) is RankLauncher


def test_a_killed_rank_is_named_by_its_number_over_all_machines(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second of three machines with two ranks each has ranks 2 and 3."""
    monkeypatch.setenv("NODE_RANK", "1")
    launcher = Launcher("kill -9 $$")
    launcher.num_nodes = 3
    assert exit_code_of(lambda: launcher.launch(lambda: time.sleep(60))) == 128 + 9
    assert capfd.readouterr().err.startswith("error: rank 3 of 6 was ended by SIGKILL")


def test_rank_zero_keeps_nothing_that_it_tells_the_others() -> None:
    Launcher().launch(lambda: None)
    assert ranks.LAUNCHER not in os.environ and ranks.RANK_ZEROS not in os.environ


def test_silence_is_told_in_seconds() -> None:
    silence, other = RuntimeError("[gloo] Timed out waiting 15500ms for recv"), RuntimeError("Connection reset")
    for error in (silence, other):
        ranks.explain_silence(error)
    assert silence.user_message.startswith("waited 15.5 s for another rank, which hangs")  # type: ignore[attr-defined]
    assert not hasattr(other, "user_message")


# --- the name of a node -----------------------------------------------------------------------------------------------


def name_stands_for(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
        assert host == "node7"
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(ranks.socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(ranks.socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("address", ["127.0.1.1", "::1", None])
def test_a_name_by_which_no_other_node_finds_this_one_is_refused(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_stands_for(monkeypatch, address)
    said = rf"num_nodes is 2, and node7, the name of this machine, stands for {address or 'no address'}: no other node"
    with pytest.raises(ValueError, match=f"{said} .* Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface"):
        check_host_name(2)
    check_host_name(1)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_host_name(2)


@pytest.mark.parametrize("address", ["10.0.0.7", "fe80::1%eth0"])
def test_a_name_by_which_other_nodes_find_this_one_is_taken(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name_stands_for(monkeypatch, address)
    check_host_name(2)


# --- what a rank says that waits in vain ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation", "waited 15 s for"),
        ("wait timeout after 40000ms, keys: /default_pg/0//cpu//0/rank_1", "waited 40 s for another rank, which hangs"),
        (
            "[gloo/transport/tcp/pair.cc:534] Read error [10.77.0.2]:48512: Connection timed out",
            "lost the connection to another rank (Connection timed out), and ended all: see whether its node",
        ),
        (
            "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.2]:1",
            "another rank has ended (Connection closed by peer), so this rank ends too: see what that rank printed",
        ),
        (
            "[gloo/transport/tcp/pair.cc:553] Read error: Connection reset by peer",
            "another rank has ended (Connection reset",
        ),
        ("the hub: Connection reset by peer", None),
        ("https://host: Connection timed out", None),
    ],
)
def test_a_rank_says_that_it_has_waited_in_vain(raised: str, said: str | None) -> None:
    error = RuntimeError(raised)
    explain_silence(error)
    message: str = getattr(error, "user_message", "")
    if said is None:
        assert message == ""
    else:
        assert message.startswith(said) and message.endswith("resume from the last checkpoint with --ckpt_path last")


@pytest.mark.parametrize("starts", [False, True])
def test_ranks_that_do_not_find_each_other_say_so(starts: bool) -> None:
    """As where an address is wrong, or a node is slow to start. The errors are those of this torch."""
    with pytest.raises(RuntimeError) as caught:
        torch.distributed.TCPStore("127.0.0.1", 0 if starts else 1, 2, starts, timeout=timedelta(seconds=0.1))
    explain_silence(caught.value)
    message: str = getattr(caught.value, "user_message", "")
    if starts:
        assert re.match(r"waited \d+ s for all ranks to start, and 1 of 2 did: see whether the others have", message)
    else:
        assert message.startswith("tried 0.1 s to connect to rank zero at 127.0.0.1:1: see whether it has started")
    assert message.endswith("or raise trainer.strategy.timeout")


def test_only_errors_of_torch_are_explained() -> None:
    error = ValueError("Timed out waiting 15000ms")
    explain_silence(error)
    assert not hasattr(error, "user_message")
