"""`prepare --engine datatrove --executor slurm` on a real SLURM: its jobs make the shards that one machine makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import PATIENCE, ROOT, Slurm, missing, wait_until

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"SLURM is not installed: {', '.join(missing())}"),
]

CONFIG = """
data:
  class_path: lightning_danube.pretraining.CurriculumData
  init_args:
    tokenizer: danube-small
    context_length: 32
    batch_tokens: 256
    held_out: 0.1
    deduplicate: exact
    sources: {web: {path: texts}}
    stages: [{name: all, tokens: 1K, mix: {web: 1}}]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two files, so two tasks. The second file holds copies of texts of the first one."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for file, numbers in enumerate((range(60), range(40, 100))):
        rows = (json.dumps({"text": f"text {n}: the river passes the quiet town {n * n} times"}) for n in numbers)
        (folder / f"{file}.jsonl").write_text("".join(row + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path / "run.yaml"


def prepare(slurm: Slurm, config: Path, cache: str, *options: str) -> str:
    """Runs the command, and returns what it has said."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_danube", "prepare", "--config", config.name, "--engine", "datatrove",
         "--data.init_args.cache_dir", cache, *options],
        cwd=config.parent, env={**slurm.environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def shards(config: Path, cache: str) -> dict[str, bytes]:
    (directory,) = (config.parent / cache / "shards").glob("web-*")
    found = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".arrow", ".npy")}
    assert len(found) == 6, found.keys()
    return found


def test_a_task_that_is_cancelled_is_made_at_the_next_call(slurm: Slurm, config: Path) -> None:
    on_slurm = ("--executor", "slurm", "--slurm", "partition=all", "--slurm", "time=1:00:00")

    def ended() -> bool:
        return not slurm.call("squeue", "--noheader")

    said = prepare(slurm, config, "cache", *on_slurm)
    assert "web: 2 tasks are submitted, the last job is " in said and "run the same command when it is over" in said
    (first, *_) = slurm.call("squeue", "--noheader", "--array", "--sort=i", "--format=%F").split()
    wait_until(lambda: slurm.job(f"{first}_1").get("JobState") != "PENDING", "the second task")
    slurm.call("scancel", f"{first}_1")
    # SLURM also ends the jobs that wait for this one.
    wait_until(ended, "an empty queue")
    assert slurm.job(f"{first}_1")["JobState"] == "CANCELLED"
    assert not list((config.parent / "cache" / "shards").glob("web-*"))

    said = prepare(slurm, config, "cache", *on_slurm)
    assert "web: 2 tasks are submitted" in said
    wait_until(ended, "an empty queue")
    assert "the last job is" not in prepare(slurm, config, "cache", *on_slurm)
    prepare(slurm, config, "here", "--processes", "1")
    assert shards(config, "cache") == shards(config, "here")
