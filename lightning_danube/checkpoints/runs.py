"""Where runs live: `<runs>/<name>/version_<n>/checkpoints/…step_<k>.ckpt`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_danube.checkpoints.files import damage, is_sharded, refuse_address
from lightning_danube.files import read_regular
from lightning_danube.outside.names import inside
from lightning_danube.terminal import amount, quoted, runnable
from lightning_danube.yaml_files import load_yaml

LAST_OR_NEW = "last-or-new"


@dataclass(frozen=True)
class RunPlace:
    """The directory of the runs with one name, and the checkpoint that this run starts from.

    Args:
        directory: `<runs>/<name>`.
        checkpoint: file to load, if any.
        continues: whether the run writes to the checkpoint's own version instead of a new version.
        warnings: lines to show to the user: versions without a checkpoint and damaged checkpoints that were skipped.
    """

    directory: Path
    checkpoint: Path | None
    continues: bool
    warnings: Sequence[str] = ()

    @property
    def run(self) -> Path:
        """Returns the directory of this run: the checkpoint's own, or that of the next free version."""
        if self.continues:
            assert self.checkpoint is not None
            return self.checkpoint.parent.parent
        numbers = [_version_number(version) for version in versions_of(self.directory)]
        return self.directory / f"version_{max(numbers, default=-1) + 1}"

    def claim(self) -> Path:
        """Returns the directory of this run, and makes it, so that no run that begins later takes the same version.

        Raises:
            OSError: the directory cannot be made.
        """
        while True:
            run = self.run
            try:
                run.mkdir(parents=True, exist_ok=self.continues)
                return run
            except FileExistsError:
                if not run.is_dir():
                    raise


def resolve_checkpoint(
    verb: str, runs: str, name: str, ckpt_path: str | None, *, has_weights: bool = False
) -> RunPlace:
    """Finds the checkpoint that `--ckpt_path` names: None, a file, a run's directory, "last" or "last-or-new".

    `fit` with "last" continues in the same version, and with "last-or-new" too, or begins if there is no checkpoint
    yet: a job that is started again may have ended before its first one. Every other value begins a new version.
    Evaluation writes beside the runs, to `<runs>/<name>-<verb>`. A damaged checkpoint is never loaded. For a run, the
    newest undamaged checkpoint is taken instead, with a warning. A damaged file that the user named has no substitute.

    Raises:
        ValueError: the name is a path, there is no checkpoint, all are damaged, or evaluation got no checkpoint and
            the model has no weights from elsewhere (`has_weights`).
    """
    directory = inside(Path(runs), name, "--name")
    place = directory if verb == "fit" else Path(runs) / f"{name}-{verb}"
    if ckpt_path is None:
        if verb != "fit" and not has_weights:
            raise ValueError(
                f"{verb} needs a trained model: give --ckpt_path last, a checkpoint file or a run's directory"
            )
        return RunPlace(place, None, continues=False)
    if ckpt_path == LAST_OR_NEW and verb != "fit":
        raise ValueError(f"--ckpt_path {LAST_OR_NEW} is for fit: {verb} needs a checkpoint, so give --ckpt_path last")
    refuse_address(ckpt_path)
    check_named(directory, ckpt_path)
    if ckpt_path in ("last", LAST_OR_NEW):
        versions = versions_of(directory)
        with_checkpoint = [version for version in versions if newest_checkpoint(version) is not None]
        if not with_checkpoint:
            warnings = (
                [f"there is no checkpoint under {directory}: the run starts from the beginning"] if versions else []
            )
            return RunPlace(place, None, continues=False, warnings=warnings)
        last = with_checkpoint[0]
        checkpoint, warnings = newest_whole_checkpoint(last)
        warnings = [*_without_checkpoint(versions[: versions.index(last)], last), *warnings]
        return RunPlace(place, checkpoint, verb == "fit", warnings)
    path = Path(ckpt_path)
    if path.is_dir() and not is_sharded(path):
        if newest_checkpoint(path) is None:
            raise ValueError(f"--ckpt_path {ckpt_path}: the directory has no checkpoints/*.ckpt")
        checkpoint, warnings = newest_whole_checkpoint(path)
        return RunPlace(place, checkpoint, False, warnings)
    if wrong := damage(path):
        raise ValueError(
            f"--ckpt_path {ckpt_path} is damaged: {wrong}; name another checkpoint, or the run's directory for its "
            "newest complete one"
        )
    return RunPlace(place, path, continues=False)


def check_named(directory: Path, ckpt_path: str) -> None:
    """Refuses a value of `--ckpt_path` that names nothing. Reads no checkpoint.

    Args:
        directory: `<runs>/<name>`.

    Raises:
        ValueError: there is no such file or directory, or no checkpoint for "last".
    """
    if ckpt_path == "last" and all(newest_checkpoint(version) is None for version in versions_of(directory)):
        raise ValueError(
            f"there is no checkpoint under {directory} to resume from: leave out --ckpt_path last to begin, "
            "or name the run with --name"
        )
    if ckpt_path not in ("last", LAST_OR_NEW) and not Path(ckpt_path).exists():
        raise ValueError(f"--ckpt_path {ckpt_path}: there is no such file")


def _without_checkpoint(skipped: Sequence[Path], taken: Path) -> list[str]:
    """Returns the warnings about newer versions without a checkpoint. Thousands of versions are one line."""
    if len(skipped) > 3:
        return [
            f"{amount(len(skipped), 'version')} up to {skipped[0].name} "
            f"{'has' if len(skipped) == 1 else 'have'} no checkpoint yet: taking {taken}, which began "
            "before them"
        ]
    return [f"{version} has no checkpoint yet: taking {taken}, which began before it" for version in reversed(skipped)]


def newest_whole_checkpoint(run: Path) -> tuple[Path, list[str]]:
    """Returns the undamaged checkpoint with the most optimizer steps in a run's directory, and warning lines.

    The warnings name each newer checkpoint that is damaged, then the checkpoint that is used.

    Raises:
        ValueError: every checkpoint is damaged. Says what is wrong with each.
    """
    damaged: list[str] = []
    for checkpoint in _newest_first(run):
        wrong = damage(checkpoint)
        if wrong is None:
            warnings = [f"damaged checkpoint {name}" for name in damaged]
            return checkpoint, [*warnings, f"resuming from {checkpoint} instead"] if damaged else []
        damaged.append(f"{checkpoint}: {wrong}")
    raise ValueError(
        f"no checkpoint under {run} is complete: {'; '.join(damaged)}. Restore one from a copy, or leave out "
        "--ckpt_path to start from the beginning"
    )


def versions_of(directory: Path) -> list[Path]:
    """Returns the version directories of the runs with one name, newest first."""
    return sorted(directory.glob("version_*"), key=_version_number, reverse=True)


def _version_number(version: Path) -> int:
    match = re.search(r"_(\d+)$", version.name)
    return int(match[1]) if match else -1


def _newest_first(run: Path) -> list[Path]:
    paths = [path for path in (run / "checkpoints").glob("*.ckpt") if re.search(r"step_\d+$", path.stem)]
    return sorted(paths, key=lambda path: (read_step(path), path.name), reverse=True)


def newest_checkpoint(run: Path) -> Path | None:
    """Returns the checkpoint with the most optimizer steps in a run's directory, or None."""
    return next(iter(_newest_first(run)), None)


def read_step(checkpoint: Path) -> int:
    """Returns the optimizer step of a checkpoint, read from its file name; 0 if the name has no step."""
    match = re.search(r"step_(\d+)$", checkpoint.stem)
    return int(match[1]) if match else 0


def closing_lines(done: str, run: Path, *arguments: object) -> list[str]:
    """Returns the last lines of a finished run: what was done, its directory, and the next command.

    If the directory has no checkpoint that this command would find, the last line says how to save one.

    Args:
        arguments: verb and options of that command; a path is quoted for a shell.
    """
    command = " ".join(quoted(argument) if isinstance(argument, Path) else str(argument) for argument in arguments)
    following = f"next: {runnable()} {command}"
    if newest_checkpoint(run) is None:
        following = "this run has no checkpoint to use: add lightning_danube.callbacks.Checkpoints to trainer.callbacks"
    return [done, f"run:  {run}", following]


LOCK = ".lock"
"""The lock file in a run's directory. A training run holds it, so that no second process trains the same run."""

WRITTEN_AT_EVERY_START = (LOCK, "config.yaml", "hparams.yaml", "history.jsonl", "metrics.csv", "trackers.json")


def remove_if_unused(version: Path) -> None:
    """Removes a version's directory if it holds only what every start and the loggers write, then its empty parents."""
    if not version.is_dir():
        return
    files = [path.relative_to(version) for path in version.rglob("*") if not path.is_dir()]
    if all(
        path.name in WRITTEN_AT_EVERY_START or path.name.startswith("events.out") or path.parts[0] == "wandb"
        for path in files
    ):
        shutil.rmtree(version)
        with suppress(OSError):  # a parent may be a mount point; the user needs the reason why the run failed
            for parent in version.parents[:2]:
                if any(parent.iterdir()):
                    break
                parent.rmdir()


def read_saved_config(path: Path) -> dict[str, Any] | None:
    """Reads a saved config. None if it is missing or unreadable, for example beside a checkpoint that was moved."""
    try:
        config = load_yaml(read_regular(path).decode())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None
