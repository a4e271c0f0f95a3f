"""Checkpoints as files: whole or not there, verified before they are read, saved when a run is told to stop."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_danube.__main__ import main, user_message
from lightning_danube.callbacks import Checkpoints
from lightning_danube.checkpoints import files
from lightning_danube.checkpoints.files import (
    HashingWriter,
    damage,
    not_written,
    prepare_directory,
    read_manifest,
    read_plain,
    write_checkpoint,
)
from lightning_danube.checkpoints.runs import newest_checkpoint, resolve_checkpoint
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.signals import requeue_slurm_job
from tests.commands import fit
from tests.training.test_ranks import TwoRanks

ROOT = Path(__file__).resolve().parents[2]
IO = DurableCheckpointIO()
CONTENT: dict[str, Any] = {"state_dict": {"weights": torch.arange(250_000, dtype=torch.float32)}, "step": 3}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def mount(where: Path, *options: str) -> None:
    result = subprocess.run(["mount", *options, str(where)], capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"needs the right to mount: {result.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB: room for one checkpoint of `tiny` (24.8 MB)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=40m", "tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Any]:
    """Makes directories refuse every write, root's too."""
    mounted: list[Path] = []

    def make(directory: Path) -> None:
        mount(directory, "--bind", str(directory))
        mounted.append(directory)
        mount(directory, "-o", "remount,bind,ro")

    yield make
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)


# --- one file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_listed_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step_1.ckpt"
    IO.save_checkpoint(CONTENT, path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["manifest.json", "step_1.ckpt"]
    assert read_manifest(path.parent)["step_1.ckpt"].bytes == path.stat().st_size
    assert damage(path) is None
    assert torch.equal(IO.load_checkpoint(path)["state_dict"]["weights"], CONTENT["state_dict"]["weights"])


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("harm", [flip_a_bit, truncate, lambda path: path.write_bytes(b"")])
def test_damage_is_found_with_and_without_a_manifest(tmp_path: Path, harm: Any, listed: bool) -> None:
    """Without: copied from elsewhere, or killed between the renaming and the listing."""
    path = tmp_path / "step_1.ckpt"
    IO.save_checkpoint(CONTENT, path)
    if not listed:
        (tmp_path / "manifest.json").write_text("{torn")
        assert damage(path) is None
    harm(path)
    assert damage(path) is not None


def test_every_bit_counts(tmp_path: Path) -> None:
    path = tmp_path / "step_1.ckpt"
    IO.save_checkpoint({"a": torch.zeros(4)}, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 128]) + whole[place + 1 :])
        assert damage(path) is not None, place


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/null", "directory", "nothing"])
def test_what_is_no_regular_file_is_damage_and_is_not_read(tmp_path: Path, kind: str) -> None:
    path, (good,) = tmp_path / "run/version_0/checkpoints/step_9.ckpt", checkpoints_of_a_run(tmp_path, 5)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(kind)
    assert damage(path) is not None
    assert resolve_checkpoint("fit", str(tmp_path), "run", "last").checkpoint == good


@pytest.mark.parametrize("typed", ["/dev/zero", "/dev/null", "PIPE", "/proc/self/mem", "a\0b", "x" * 5000, "a\nb"])
def test_a_checkpoint_that_is_named_and_no_file_is_refused_in_one_line(tmp_path: Path, typed: str) -> None:
    if typed == "PIPE":
        os.mkfifo(tmp_path / "pipe")
        typed = str(tmp_path / "pipe")
    with pytest.raises((ValueError, OSError)) as refused:
        resolve_checkpoint("fit", str(tmp_path), "run", typed)
    said = user_message(refused.value)
    assert said is not None and "\n" not in said


def test_a_thousand_versions_without_a_checkpoint_are_one_line(tmp_path: Path) -> None:
    (good,) = checkpoints_of_a_run(tmp_path, 5)
    for number in range(1, 1000):
        (tmp_path / "run" / f"version_{number}").mkdir()
    found = resolve_checkpoint("fit", str(tmp_path), "run", "last")
    assert found.checkpoint == good
    assert found.warnings == [
        f"999 versions up to version_999 have no checkpoint yet: taking {good.parents[1]}, which began before them"
    ]


def test_an_archive_that_says_it_is_encrypted_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "step_1.ckpt"
    IO.save_checkpoint(CONTENT, path)
    (tmp_path / "manifest.json").unlink()
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # a flag of the first entry in the archive's own list
    path.write_bytes(content)
    assert "encrypted" in str(damage(path))


@pytest.mark.parametrize(
    "entry",
    [
        b"[" * 100_000,
        b'{"checkpoints": {"step_1.ckpt": {"bytes": 1e400, "sha256": "x"}}}',
        b'{"checkpoints": [1]}',
        b"7",
    ],
)
def test_a_damaged_manifest_leaves_the_judgement_to_the_archive(tmp_path: Path, entry: bytes) -> None:
    path = tmp_path / "step_1.ckpt"
    IO.save_checkpoint(CONTENT, path)
    (tmp_path / "manifest.json").write_bytes(entry)
    assert read_manifest(tmp_path) == {} and damage(path) is None
    flip_a_bit(path)
    assert damage(path) is not None


def test_leftovers_of_a_killed_write_go_at_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / f".step_1.ckpt.{'0' * 32}.partial"
    for remove in (lambda: prepare_directory(tmp_path), lambda: IO.save_checkpoint(CONTENT, tmp_path / "step_2.ckpt")):
        leftover.write_bytes(b"half")
        remove()
        assert not leftover.exists()


def test_a_removed_checkpoint_leaves_the_manifest(tmp_path: Path) -> None:
    for name in ("step_1.ckpt", "step_2.ckpt"):
        IO.save_checkpoint(CONTENT, tmp_path / name)
    IO.remove_checkpoint(tmp_path / "step_1.ckpt")
    assert list(read_manifest(tmp_path)) == ["step_2.ckpt"]


def test_a_replaced_checkpoint_is_never_judged_by_the_hash_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each rename in turn: what then has the name is whole."""
    path = tmp_path / "step_1.ckpt"
    IO.save_checkpoint(CONTENT, path)
    replace, renames = os.replace, 0

    class Killed(BaseException):
        pass

    def die_after(*names: Any) -> None:
        nonlocal renames
        replace(*names)
        renames += 1
        if renames == last:
            raise Killed

    monkeypatch.setattr(os, "replace", die_after)
    for last in (1, 2, 3):
        renames = 0
        with pytest.raises(Killed):
            IO.save_checkpoint({**CONTENT, "step": last}, path)
        assert damage(path) is None, last


@pytest.mark.parametrize("where", ["https://example.org/a.ckpt", "http://h/a", "s3://bucket/a.ckpt"])
def test_addresses_are_refused(tmp_path: Path, where: str) -> None:
    for refuse in (
        lambda: resolve_checkpoint("fit", str(tmp_path), "run", where),
        lambda: IO.load_checkpoint(where),
        lambda: IO.save_checkpoint(CONTENT, where),
    ):
        with pytest.raises(ValueError, match="files of this machine only"):
            refuse()


class Payload:
    """What a pickle may do when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("weights_only", [None, False, True])
def test_a_payload_is_refused_and_does_not_run(tmp_path: Path, weights_only: bool | None) -> None:
    ran, path = tmp_path / "ran", tmp_path / "step_1.ckpt"
    torch.save({**CONTENT, "extra": Payload(ran)}, path)
    torch.load(path, weights_only=False)
    assert ran.exists(), "the payload would not run anyway: this test shows nothing"
    ran.unlink()
    with pytest.raises(ValueError, match="more than tensors and plain data"):
        IO.load_checkpoint(path, weights_only=weights_only)
    assert not ran.exists()


@pytest.mark.medium
def test_a_payload_does_not_run_from_the_command_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = tiny / "ran"
    torch.save({"state_dict": {}, "extra": Payload(ran)}, tiny / "step_1.ckpt")
    for verb in ("fit", "validate"):
        assert main([verb, "--config", str(tiny / "tiny.yaml"), "--ckpt_path", str(tiny / "step_1.ckpt")]) == 2
        assert "loading it could run code" in capsys.readouterr().err
    assert fit(tiny, "--weights_only", "false") == 2
    assert not ran.exists()


# --- a disk that refuses ----------------------------------------------------------------------------------------------


def test_the_temporary_directory_plays_no_part(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would stage there: on another file system its last step is a copy, here it would not even fit."""
    (small_disk / "full").write_bytes(bytes(40 * 2**20))
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setattr(tempfile, "tempdir", None)
    IO.save_checkpoint(CONTENT, tmp_path / "step_1.ckpt")
    assert damage(tmp_path / "step_1.ckpt") is None


@pytest.mark.medium
def test_a_full_disk_keeps_the_old_checkpoint(tiny: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tiny, "--runs", str(small_disk), "--data.init_args.tokenizer", "mistral") == 2
    checkpoints = small_disk / "tiny" / "version_0" / "checkpoints"
    error = capsys.readouterr().err.strip()
    assert error == (
        f"error: {checkpoints}/step_00000010.ckpt: checkpoint not written: no space left on device; free some space, "
        "then resume with --ckpt_path last"
    )
    assert sorted(path.name for path in checkpoints.iterdir()) == ["manifest.json", "step_00000005.ckpt"]
    assert damage(checkpoints / "step_00000005.ckpt") is None


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks(tiny: Path, small_disk: Path) -> None:
    """Those that do not write wait for the one that does."""
    code, said = TwoRanks(tiny).fit("--runs", str(small_disk), "--data.init_args.tokenizer", "mistral")
    assert code == 2
    checkpoints = small_disk / "tiny" / "version_0" / "checkpoints"
    assert said == (
        f"error: {checkpoints}/step_00000010.ckpt: checkpoint not written: no space left on device; free some space, "
        "then resume with --ckpt_path last\n"
    )
    assert damage(checkpoints / "step_00000005.ckpt") is None


@pytest.mark.medium
def test_a_read_only_directory_is_refused_at_the_start(
    tiny: Path, read_only: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tiny, "--trainer.max_steps", "6") == 0
    checkpoints = tiny / "runs" / "tiny" / "version_0" / "checkpoints"
    read_only(checkpoints)
    capsys.readouterr()
    assert fit(tiny, "--ckpt_path", "last") == 2
    printed = capsys.readouterr()
    assert printed.err.strip() == (
        f"error: {checkpoints}: checkpoints cannot be written here: read-only file system; make the file system "
        "writable or name another place with --runs"
    )
    assert "going on" not in printed.out
    assert damage(checkpoints / "step_00000005.ckpt") is None


def test_a_directory_that_turns_read_only_keeps_its_checkpoints(tmp_path: Path, read_only: Any) -> None:
    IO.save_checkpoint(CONTENT, tmp_path / "run" / "step_1.ckpt")
    read_only(tmp_path / "run")
    with pytest.raises(OSError, match="make the file system writable"):
        IO.save_checkpoint(CONTENT, tmp_path / "run" / "step_1.ckpt")
    assert damage(tmp_path / "run" / "step_1.ckpt") is None


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(OSError, match="move what is there out of the way") as error:
        IO.save_checkpoint(CONTENT, tmp_path / "checkpoints" / "step_1.ckpt")
    assert error.value.filename == str(tmp_path / "checkpoints" / "step_1.ckpt")
    assert (tmp_path / "checkpoints").read_text() == "mine"


# --- resuming from damage ---------------------------------------------------------------------------------------------


def checkpoints_of_a_run(runs: Path, *steps: int) -> list[Path]:
    paths = [runs / "run" / "version_0" / "checkpoints" / f"step_{step:08d}.ckpt" for step in steps]
    for path in paths:
        IO.save_checkpoint(CONTENT, path)
    return paths


def test_the_newest_that_is_whole_is_taken_and_the_damaged_are_named(tmp_path: Path) -> None:
    good, flipped, cut = checkpoints_of_a_run(tmp_path, 5, 10, 15)
    flip_a_bit(flipped)
    truncate(cut)
    for asked in ("last", str(tmp_path / "run" / "version_0")):
        place = resolve_checkpoint("fit", str(tmp_path), "run", asked)
        assert place.checkpoint == good
        assert len(place.warnings) == 3
        assert str(cut) in place.warnings[0] and "bytes" in place.warnings[0]
        assert str(flipped) in place.warnings[1] and "SHA-256" in place.warnings[1]
        assert str(good) in place.warnings[2]


def test_without_a_whole_one_nothing_starts(tmp_path: Path) -> None:
    for path in checkpoints_of_a_run(tmp_path, 5, 10):
        truncate(path)
    with pytest.raises(ValueError, match=r"no checkpoint under .* is complete: .*10.ckpt: .*; .*05.ckpt: .*copy"):
        resolve_checkpoint("fit", str(tmp_path), "run", "last")


def test_a_damaged_file_asked_for_by_name_is_an_error(tmp_path: Path) -> None:
    _, newest = checkpoints_of_a_run(tmp_path, 5, 10)
    truncate(newest)
    with pytest.raises(ValueError, match=r"00000010.ckpt is damaged: .* bytes, .* were saved"):
        resolve_checkpoint("fit", str(tmp_path), "run", str(newest))


def test_a_newer_version_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    (path,) = checkpoints_of_a_run(tmp_path, 5)
    (tmp_path / "run" / "version_1").mkdir()
    place = resolve_checkpoint("fit", str(tmp_path), "run", "last")
    assert place.checkpoint == path and "version_1 has no checkpoint yet" in place.warnings[0]


@pytest.mark.medium
def test_a_run_goes_on_from_before_the_damage_and_ends_the_same(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tiny) == 0
    assert fit(tiny, "--name", "hurt", "--trainer.max_steps", "15") == 0
    hurt = tiny / "runs" / "hurt" / "version_0" / "checkpoints"
    truncate(hurt / "step_00000015.ckpt")
    capsys.readouterr()
    # Other steps than before: nothing overwrites what is damaged, and pruning must not take it for the newest.
    config = (tiny / "tiny.yaml").read_text()
    (tiny / "tiny.yaml").write_text(config.replace("{every_n_steps: 5}", "{every_n_steps: 13, keep: 1}"))
    options = ["--name", "hurt", "--ckpt_path", "last", "--trainer.max_steps", "14"]
    assert fit(tiny, *options) == 0
    assert f"warning: damaged checkpoint {hurt}/step_00000015.ckpt" in capsys.readouterr().err
    assert (hurt / "step_00000014.ckpt").exists() and not (hurt / "step_00000010.ckpt").exists()
    assert fit(tiny, "--name", "hurt", "--ckpt_path", "last") == 0
    last = "stage_3_finish_step_00000026.ckpt"
    assert same_weights(tiny / "runs" / "tiny" / "version_0" / "checkpoints" / last, hurt / last)


def same_weights(left: Path, right: Path) -> bool:
    a, b = (torch.load(path, weights_only=True)["state_dict"] for path in (left, right))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_two_are_kept_unless_asked_otherwise(tiny: Path) -> None:
    """With one alone there would be nothing to fall back on inside the first stage."""
    assert Checkpoints().schedule.keep == 2
    assert fit(tiny, "--trainer.max_steps", "11", "--data.init_args.micro_batch_size", "4") == 0
    names = sorted(path.name for path in (tiny / "runs" / "tiny" / "version_0" / "checkpoints").glob("*.ckpt"))
    assert names == ["step_00000010.ckpt", "step_00000011.ckpt"]


# --- told to stop -----------------------------------------------------------------------------------------------------

SENDER = """
import os
from lightning.pytorch import Callback

class Sender(Callback):
    def __init__(
        self, numbers: list[int], micro_batch: int | None = None, validation: int | None = None, group: bool = False
    ) -> None:
        self.group = group
        self.numbers, self.micro_batch, self.validation = numbers, micro_batch, validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.micro_batch and trainer.is_global_zero:
            for number in self.numbers:
                os.kill(0 if self.group else os.getpid(), number)

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == self.validation:
            for number in self.numbers:
                os.kill(os.getpid(), number)
"""


@pytest.fixture
def signalled(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `tiny` as the run "told", which sends itself signals at a moment, and resumes it."""
    (tiny / "sender.py").write_text(SENDER)
    monkeypatch.syspath_prepend(str(tiny))
    config = (tiny / "tiny.yaml").read_text()

    def run(signals: list[int], *options: str, **moment: int) -> int:
        arguments = json.dumps({"numbers": signals, **moment})
        (tiny / "told").mkdir(exist_ok=True)
        (tiny / "told" / "told.yaml").write_text(
            f"{config}    - class_path: sender.Sender\n      init_args: {arguments}\n"
        )
        return main(["fit", "--config", str(tiny / "told" / "told.yaml"), "--name", "told", *options])

    return run


@pytest.mark.medium
@pytest.mark.parametrize(
    ("number", "moment", "saved"),
    [
        (signal.SIGUSR1, {"micro_batch": 7}, "step_00000008.ckpt"),
        (signal.SIGINT, {"validation": 12}, "stage_1_foundation_step_00000012.ckpt"),
    ],
)
def test_a_run_told_to_stop_saves_at_the_next_step(
    tiny: Path, signalled: Any, capsys: pytest.CaptureFixture[str], number: int, moment: dict[str, int], saved: str
) -> None:
    before = signal.getsignal(number)
    assert signalled([number], **moment) == 75
    assert signal.getsignal(number) is before
    newest = newest_checkpoint(tiny / "runs" / "told" / "version_0")
    assert newest is not None and newest.name == saved
    assert "saved: resume with --ckpt_path last" in capsys.readouterr().err


@pytest.mark.medium
def test_a_run_told_to_stop_within_an_accumulation_ends_as_if_it_was_not(tiny: Path, signalled: Any) -> None:
    accumulating = ["--data.init_args.micro_batch_size", "4"]
    assert signalled([signal.SIGTERM], *accumulating, micro_batch=2 * 7) == 75
    assert fit(tiny, *accumulating) == 0
    assert fit(tiny, *accumulating, "--name", "told", "--ckpt_path", "last") == 0
    told = tiny / "runs" / "told" / "version_0"
    last = "checkpoints/stage_3_finish_step_00000026.ckpt"
    assert same_weights(tiny / "runs" / "tiny" / "version_0" / last, told / last)


@pytest.mark.medium
def test_told_while_the_last_step_is_validated_the_run_is_done(tiny: Path, signalled: Any) -> None:
    assert signalled([signal.SIGTERM], validation=26) == 0
    assert (tiny / "runs" / "told" / "version_0" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "options"),
    [
        ({"micro_batch": 7, "group": True}, ["--data.init_args.workers", "2"]),
        ({"micro_batch": 6}, ["--trainer.devices", "2", "--trainer.strategy", "ddp"]),
    ],
)
def test_processes_that_belong_to_the_run_do_not_keep_it_from_saving(
    tiny: Path, moment: dict[str, Any], options: list[str]
) -> None:
    """Loader processes, which the signal of a group reaches as well; ranks, which one rank's signal does not reach."""
    (tiny / "sender.py").write_text(SENDER)
    arguments = json.dumps({"numbers": [signal.SIGTERM], **moment})
    config = (tiny / "tiny.yaml").read_text().replace("micro_batch_size: 8", "micro_batch_size: 4")
    (tiny / "told").mkdir()
    (tiny / "told" / "told.yaml").write_text(f"{config}    - class_path: sender.Sender\n      init_args: {arguments}\n")
    command = [sys.executable, "-m", "lightning_danube", "fit", "--config", str(tiny / "told" / "told.yaml"), *options]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tiny}", "OMP_NUM_THREADS": "1"}

    def exit_code(*more: str) -> tuple[int, str]:
        done = subprocess.run(
            [*command, *more], env=environment, cwd=tiny, timeout=240, capture_output=True, text=True, process_group=0
        )
        return done.returncode, done.stderr

    code, said = exit_code()
    assert code == 75, said
    newest = newest_checkpoint(tiny / "runs" / "tiny" / "version_0")
    assert newest is not None and damage(newest) is None
    # Micro-batch 7 is in step 4 of one device. Micro-batch 6 is in step 7 of two devices, which read the vote of that
    # step after the next. After a step with a validation they read it at once.
    assert newest.name == ("step_00000008.ckpt" if "ddp" in options else "step_00000004.ckpt")
    code, said = exit_code("--ckpt_path", "last", "--trainer.max_steps", "10")
    assert code == 0, said


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM job of one task, and an `scontrol` that writes down what it is asked."""
    asked = tmp_path / "asked.txt"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    variables = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return asked


@pytest.mark.medium
def test_slurm_requeues_on_its_signal_and_the_job_goes_on(tiny: Path, signalled: Any, slurm: Path) -> None:
    assert signalled([signal.SIGUSR1], micro_batch=7) == 75
    assert slurm.read_text() == "requeue 4711\n"
    # Lightning's handler would have saved this, in the middle of a step.
    assert not list((tiny / "runs").rglob("hpc_ckpt*"))
    assert fit(tiny, "--name", "told", "--ckpt_path", "last", "--trainer.max_steps", "10") == 0
    assert newest_checkpoint(tiny / "runs" / "told" / "version_0").name == "step_00000010.ckpt"  # type: ignore[union-attr]
    assert slurm.read_text() == "requeue 4711\n"


def test_a_cancelled_slurm_job_saves_and_is_not_requeued(tiny: Path, signalled: Any, slurm: Path) -> None:
    """SIGTERM is what scancel sends: somebody wants it gone."""
    assert signalled([signal.SIGTERM], micro_batch=7) == 75
    assert not slurm.exists()
    assert newest_checkpoint(tiny / "runs" / "told" / "version_0") is not None


def test_an_array_task_is_requeued_by_its_number(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue_slurm_job() == "SLURM job 12_3 requeued"
    assert slurm.read_text() == "requeue 12_3\n"


def test_a_requeue_that_fails_is_told(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho 'access denied' >&2; exit 1\n")
    assert requeue_slurm_job() == "SLURM job 4711 was not requeued: access denied"
    monkeypatch.setenv("PATH", "")
    assert "scontrol: No such file" in requeue_slurm_job()
    monkeypatch.setenv("SLURM_JOB_ID", "1; rm")
    assert "no SLURM job to requeue" in requeue_slurm_job()


# --- the manifest, and what a disk says -------------------------------------------------------------------------------


def test_the_manifest_lists_what_is_there(tmp_path: Path) -> None:
    for name in ("step_1.ckpt", "step_2.ckpt"):
        IO.save_checkpoint({"a": 1}, tmp_path / name)
    (tmp_path / "step_1.ckpt").unlink()
    IO.save_checkpoint({"a": 1}, tmp_path / "step_3.ckpt")
    assert list(read_manifest(tmp_path)) == ["step_2.ckpt", "step_3.ckpt"]


@pytest.mark.parametrize(("free", "number"), [(2**10, errno.ENOSPC), (2**40, errno.EIO)])
def test_an_error_of_torchs_archive_is_a_full_disk_only_where_it_is_full(
    tmp_path: Path, free: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    error = not_written(tmp_path / "step_1.ckpt", RuntimeError("[enforce fail]\n  unexpected pos"), " (rank 3)")
    assert error.errno == number and error.filename == str(tmp_path / "step_1.ckpt")
    why = "no space left on device; free some space" if number == errno.ENOSPC else "[enforce fail] unexpected pos"
    assert f"checkpoint not written (rank 3): {why}" in str(error)


def test_a_failed_write_says_what_the_disk_said(tmp_path: Path) -> None:
    """torch makes an error of its own of it."""

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    def write(writer: HashingWriter) -> None:
        writer._file = Full()  # type: ignore[assignment]
        try:
            writer.write(b"content")
        except OSError:
            raise RuntimeError("unexpected pos") from None

    with pytest.raises(OSError, match=r"checkpoint not written: disk quota exceeded; free some space") as error:
        write_checkpoint(tmp_path / "step_1.ckpt", write)
    assert error.value.errno == errno.EDQUOT and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOMEM, "Cannot allocate memory"), OSError(errno.EMFILE, "Too many open files"), MemoryError()],
)
def test_a_checkpoint_is_not_damaged_where_the_machine_lacks_memory(
    error: Exception, listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be passed over for an older one."""
    path = tmp_path / "step_1.ckpt"
    IO.save_checkpoint(CONTENT, path)
    if not listed:
        (tmp_path / "manifest.json").unlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", refuse)
        patch.setattr("zipfile.ZipFile", refuse)
        with pytest.raises(type(error)):
            damage(path)
        patch.setattr("torch.load", refuse)
        with pytest.raises(type(error)):
            read_plain(path)
        if isinstance(error, OSError):
            patch.setattr(files, "read_json", refuse)
            with pytest.raises(OSError, match=error.strerror):
                read_manifest(tmp_path)
    assert damage(path) is None
