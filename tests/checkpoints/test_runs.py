"""Where a run's checkpoints are found, and where a new run writes."""

import errno
import os
from pathlib import Path

import pytest
import torch

from lightning_danube.checkpoints.runs import closing_lines, newest_checkpoint, remove_if_unused, resolve_checkpoint
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.terminal import runnable


def save(run: Path, *names: str) -> None:
    for name in names:
        DurableCheckpointIO().save_checkpoint({"a": torch.ones(1)}, run / "checkpoints" / f"{name}.ckpt")


def test_the_newest_checkpoint_is_that_of_most_steps_whatever_its_name(tmp_path: Path) -> None:
    save(tmp_path, "step_00000015", "stage_1_web_step_00000012", "stage_2_wiki_step_00000020")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "stage_2_wiki_step_00000020.ckpt"
    save(tmp_path, "step_00000021")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000021.ckpt"


@pytest.mark.parametrize("name", [None, "epoch=0-step=40", "step_00000040"])
def test_a_next_command_is_named_only_if_it_finds_a_checkpoint(tmp_path: Path, name: str | None) -> None:
    run = tmp_path / "my run"
    (run / "checkpoints").mkdir(parents=True)
    if name is not None:
        (run / "checkpoints" / f"{name}.ckpt").touch()
    following = "this run has no checkpoint to use: add lightning_danube.callbacks.Checkpoints to trainer.callbacks"
    if name == "step_00000040":
        following = f'next: {runnable()} chat --weights "{run}"'
    assert closing_lines("40 steps", run, "chat", "--weights", run) == ["40 steps", f"run:  {run}", following]


def test_version_ten_is_newer_than_version_nine(tmp_path: Path) -> None:
    for version in (2, 9, 10):
        save(tmp_path / "run" / f"version_{version}", "step_00000001")
    (tmp_path / "run" / "version_11").mkdir()
    place = resolve_checkpoint("fit", str(tmp_path), "run", "last")
    assert place.checkpoint == tmp_path / "run" / "version_10" / "checkpoints" / "step_00000001.ckpt"
    (warning,) = place.warnings
    assert "version_11 has no checkpoint yet: taking" in warning


@pytest.mark.parametrize(
    ("verb", "asked", "version", "directory"),
    [
        ("fit", "last", "version_3", "run"),
        ("fit", "last-or-new", "version_3", "run"),
        ("fit", "RUN", None, "run"),
        ("fit", "RUN/checkpoints/step_00000001.ckpt", None, "run"),
        ("validate", "last", None, "run-validate"),
        ("test", "RUN/checkpoints/step_00000001.ckpt", None, "run-test"),
    ],
)
def test_only_last_goes_on_in_the_same_version(
    tmp_path: Path, verb: str, asked: str, version: str | None, directory: str
) -> None:
    run = tmp_path / "run" / "version_3"
    save(run, "step_00000001")
    place = resolve_checkpoint(verb, str(tmp_path), "run", asked.replace("RUN", str(run)))
    assert place.checkpoint == run / "checkpoints" / "step_00000001.ckpt"
    assert place.run == tmp_path / directory / (version or ("version_4" if directory == "run" else "version_0"))
    assert place.claim() == place.claim() == run if version else place.claim() != place.claim()


def test_last_or_new_begins_where_there_is_no_checkpoint_yet(tmp_path: Path) -> None:
    place = resolve_checkpoint("fit", str(tmp_path), "run", "last-or-new")
    assert place.checkpoint is None and place.run.name == "version_0" and not place.warnings
    # The job ended before its first checkpoint.
    (tmp_path / "run" / "version_0" / "checkpoints").mkdir(parents=True)
    place = resolve_checkpoint("fit", str(tmp_path), "run", "last-or-new")
    assert place.checkpoint is None and place.run.name == "version_1"
    assert place.warnings == [f"there is no checkpoint under {tmp_path / 'run'}: the run starts from the beginning"]
    with pytest.raises(ValueError, match="last-or-new is for fit: test needs a checkpoint"):
        resolve_checkpoint("test", str(tmp_path), "run", "last-or-new")


def test_last_or_new_never_begins_over_damaged_checkpoints(tmp_path: Path) -> None:
    damaged = tmp_path / "run" / "version_0" / "checkpoints" / "step_00000001.ckpt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"no checkpoint under .* is complete"):
        resolve_checkpoint("fit", str(tmp_path), "run", "last-or-new")


def test_two_runs_that_begin_at_once_take_two_versions(tmp_path: Path) -> None:
    one, other = (resolve_checkpoint("fit", str(tmp_path), "run", None) for _ in range(2))
    assert one.run == other.run
    assert [one.claim().name, other.claim().name] == ["version_0", "version_1"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        resolve_checkpoint("fit", str(tmp_path), "file", None).claim()


@pytest.mark.parametrize("result", [None, "checkpoints/step_00000001.ckpt", "summary.json"])
def test_a_version_is_removed_only_if_nothing_came_of_it(tmp_path: Path, result: str | None) -> None:
    version = tmp_path / "runs" / "run" / "version_0"
    (version / "checkpoints").mkdir(parents=True)
    of_every_start = ["config.yaml", "hparams.yaml", "history.jsonl", "events.out.tfevents.1"]
    of_every_start += [".lock", "metrics.csv", "trackers.json", "wandb/run-1/files/output.log"]
    for name in [*of_every_start, result] if result else of_every_start:
        (version / name).parent.mkdir(parents=True, exist_ok=True)
        (version / name).touch()
    remove_if_unused(version)
    assert version.exists() == (result is not None)
    assert (tmp_path / "runs").exists() == (result is not None), "empty parents go as well"
    remove_if_unused(tmp_path / "nowhere")


def test_a_parent_that_cannot_be_removed_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the mount point of a full disk, where the run has just failed."""

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    version = tmp_path / "run" / "version_0"
    version.mkdir(parents=True)
    monkeypatch.setattr(Path, "rmdir", busy)
    remove_if_unused(version)
    assert not version.exists() and version.parent.exists()
