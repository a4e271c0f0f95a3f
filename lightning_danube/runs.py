"""Where runs live: `<runs>/<name>/version_<n>/checkpoints/…step_<k>.ckpt`."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPlace:
    """The directory of runs with one name, and the checkpoint this run starts from.

    Args:
        directory: `<runs>/<name>`.
        checkpoint: file to load, if any.
        continues: the run goes on in the checkpoint's own version instead of a new one.
    """

    directory: Path
    checkpoint: Path | None
    continues: bool

    def logger_place(self) -> tuple[str, str, str | None]:
        """save_dir, name and version for a Lightning logger; version None means the next free one."""
        version = None
        if self.continues:
            assert self.checkpoint is not None
            version = self.checkpoint.parent.parent.name
        return str(self.directory.parent), self.directory.name, version


def resolve_checkpoint(verb: str, runs: str, name: str, ckpt_path: str | None) -> RunPlace:
    """What `--ckpt_path` means: nothing, a file, a run's directory, or "last".

    `fit` with "last" goes on in the same version; anything else begins a new one. Evaluation writes beside the runs, to
    `<runs>/<name>-<verb>`.

    Raises:
        ValueError: the checkpoint is not there, or evaluation was asked for without one.
    """
    directory = Path(runs) / name
    place = directory if verb == "fit" else Path(runs) / f"{name}-{verb}"
    if ckpt_path is None:
        if verb != "fit":
            raise ValueError(
                f"{verb} needs a trained model: give --ckpt_path last, a checkpoint file or a run's directory"
            )
        return RunPlace(place, None, continues=False)
    if ckpt_path == "last":
        last = last_checkpoint(directory)
        if last is None:
            raise ValueError(
                f"there is no checkpoint under {directory} to go on from: leave out --ckpt_path last to begin, "
                "or name the run with --name"
            )
        return RunPlace(place, last, continues=verb == "fit")
    path = Path(ckpt_path)
    if path.is_dir():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise ValueError(f"--ckpt_path {ckpt_path}: the directory has no checkpoints/*.ckpt")
        path = checkpoint
    if not path.is_file():
        raise ValueError(f"--ckpt_path {ckpt_path}: there is no such file")
    return RunPlace(place, path, continues=False)


def last_checkpoint(directory: Path) -> Path | None:
    """Newest checkpoint of the newest version under `<runs>/<name>` that has one."""
    versions = {
        int(match[1]): path for path in directory.glob("version_*") if (match := re.search(r"_(\d+)$", path.name))
    }
    for number in sorted(versions, reverse=True):
        checkpoint = newest_checkpoint(versions[number])
        if checkpoint is not None:
            return checkpoint
    return None


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the most optimizer steps in a run's directory, if there is one."""
    paths = [path for path in (run / "checkpoints").glob("*.ckpt") if re.search(r"step_\d+$", path.stem)]
    return max(paths, key=lambda path: (read_step(path), path.name)) if paths else None


def read_step(checkpoint: Path) -> int:
    """Optimizer steps after which a checkpoint was saved, from its name; 0 if the name does not say."""
    match = re.search(r"step_(\d+)$", checkpoint.stem)
    return int(match[1]) if match else 0


def remove_if_unused(version: Path) -> None:
    """Removes a version's directory that holds nothing but what every start writes, and its parents if that was all."""
    if not version.is_dir():
        return
    files = [path for path in version.rglob("*") if not path.is_dir()]
    if all(path.name in ("config.yaml", "hparams.yaml") or path.name.startswith("events.out") for path in files):
        shutil.rmtree(version)
        for parent in version.parents[:2]:
            if any(parent.iterdir()):
                break
            parent.rmdir()
