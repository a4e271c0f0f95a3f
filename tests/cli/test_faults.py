"""Whole runs on full disks and beside each other: one line, no traceback, and what was saved stays."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.files import damage
from lightning_danube.checkpoints.runs import LOCK, newest_checkpoint
from tests.forked import Forked
from tests.quantization.test_run import CONFIG as QUANTIZATION
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.faults


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory that `fill` makes a small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    yield place
    subprocess.run(["umount", str(place)], check=False, capture_output=True)


def mount(place: Path, size: str, inodes: int = 0) -> None:
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


def told(capfd: pytest.CaptureFixture[str]) -> str:
    """The one error of a command. Nothing else is on stderr but warnings of loggers."""
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("kibibytes", [4, 8, 12, 16, 24, 32, 64, 256, 800, 2000, 4000])
def test_a_run_on_a_full_disk(tiny: Path, disk: Path, capfd: pytest.CaptureFixture[str], kibibytes: int) -> None:
    """Each size is full at another moment, from the first file on. The advice fits what is there."""
    assert main(["prepare", "--config", str(tiny / "tiny.yaml")]) == 0
    mount(disk, f"{kibibytes}k")
    capfd.readouterr()
    code = main(["fit", "--config", str(tiny / "tiny.yaml"), "--runs", str(disk)])
    run = disk / "tiny" / "version_0"
    if code == 0:
        assert (run / "summary.json").exists()
        return
    line, checkpoint = told(capfd), newest_checkpoint(run)
    assert code == 2 and "o space left on device" in line and str(disk) in line
    assert ("--ckpt_path last" in line) <= (checkpoint is not None)
    assert checkpoint is None or damage(checkpoint) is None


@pytest.mark.parametrize("inodes", [3, 5, 7, 9])
def test_a_run_where_no_more_files_fit(tiny: Path, disk: Path, capfd: pytest.CaptureFixture[str], inodes: int) -> None:
    assert main(["prepare", "--config", str(tiny / "tiny.yaml")]) == 0
    mount(disk, "50m", inodes)
    capfd.readouterr()
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), "--runs", str(disk)]) == 2
    assert "o space left on device" in told(capfd)


@pytest.mark.parametrize("kibibytes", [4, 8, 64, 120, 160, 250])
def test_prepare_on_a_full_disk(tiny: Path, disk: Path, capfd: pytest.CaptureFixture[str], kibibytes: int) -> None:
    mount(disk, f"{kibibytes}k")
    command = ["prepare", "--config", str(tiny / "tiny.yaml"), "--data.init_args.cache_dir", str(disk)]
    assert main(command) == 2
    assert "o space left on device" in told(capfd)
    subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
    assert main(command) == 0
    assert not [path.name for path in (disk / "shards").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kibibytes", [4, 64, 300])
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_export_on_a_full_disk(
    tiny_run: Path, disk: Path, capfd: pytest.CaptureFixture[str], kibibytes: int, form: str
) -> None:
    mount(disk, f"{kibibytes}k")
    out = disk / ("model.gguf" if form == "gguf" else "model")
    assert main(["export", "--weights", str(tiny_run), "--format", form, "--out", str(out)]) == 2
    line = told(capfd)
    assert line.startswith(f"error: {out}") and "o space left on device" in line
    assert not list(disk.iterdir())


def test_of_two_resumes_one_trains_the_run(tiny: Path) -> None:
    """And after kill -9 the run can be resumed at once."""
    config = tiny / "tiny.yaml"
    config.write_text(config.read_text().replace("tokens: 3K", "tokens: 1M"))
    fit = ["fit", "--config", str(config), "--data.init_args.max_epochs", "1000"]
    first = Forked(fit, tiny / "first.txt", tiny)
    run = tiny / "runs" / "tiny" / "version_0"
    while newest_checkpoint(run) is None:
        assert first.poll() is None
        time.sleep(0.05)
    second = Forked([*fit, "--ckpt_path", "last"], tiny / "second.txt", tiny)
    assert second.wait(120) == 2
    assert f"{run} is in use by process {first.pid} on " in (tiny / "second.txt").read_text()
    first.kill()
    first.wait(60)
    saved = newest_checkpoint(run)
    third = Forked([*fit, "--ckpt_path", "last"], tiny / "third.txt", tiny)
    while newest_checkpoint(run) == saved:
        assert third.poll() is None, (tiny / "third.txt").read_text()
        time.sleep(0.05)
    assert (run / LOCK).read_text().split()[1] == str(third.pid)
    third.send_signal(signal.SIGTERM)
    assert third.wait(120) == 75
    assert not (run / LOCK).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("verb", ["test", "quantization", "export", "generate", "prepare"])
def test_a_verb_that_has_nothing_to_save_ends_and_leaves_nothing(
    tiny_run: Path, tmp_path: Path, verb: str, number: int
) -> None:
    """At twelve moments of its work. No traceback; what it wrote is whole or absent."""
    commands = {
        "test": ["test", "--config", str(tiny_run / "config.yaml"), "--ckpt_path", "last"],
        "export": ["export", "--weights", str(tiny_run), "--out", str(tmp_path / "out" / "model")],
        "generate": ["generate", "--weights", str(tiny_run), "--prompt", "The river", "--max-new-tokens", "30"],
        "prepare": [
            "prepare",
            "--config",
            str(tiny_run / "config.yaml"),
            "--data.init_args.cache_dir",
            str(tmp_path / "c"),
        ],
    }
    if verb == "quantization":
        levels = re.sub(r"levels: .*", "levels: [rounding:4/64, rounding:2/64]", QUANTIZATION)
        save_tiny(tmp_path / "model")
        (tmp_path / "text.txt").write_text(" ".join(f"the {number} things of them" for number in range(300)))
        (tmp_path / "bits.yaml").write_text(levels.replace("TMP", str(tmp_path)))
        commands[verb] = ["test", "--config", str(tmp_path / "bits.yaml")]
    for moment in range(12):
        output = tmp_path / f"said-{moment}.txt"
        process = Forked(commands[verb], output, tmp_path)
        time.sleep(0.3 + 0.15 * moment)  # first, the process is forked and begins
        process.send_signal(number)
        code = process.wait(60)
        said = output.read_text() if output.exists() else ""
        assert "Traceback" not in said, (moment, said)
        assert code in (0, 2, 128 + number, -number), (moment, code, said)
        exported = tmp_path / "out" / "model"
        assert not exported.exists() or (exported / "model.safetensors").exists()


def test_a_clock_that_goes_backwards(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run measures with the monotonic clock; the times of its files decide nothing."""
    now = [time.time()]

    def backwards() -> float:
        now[0] -= 60.0
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), "--trainer.max_steps", "10"]) == 0
    run = tiny / "runs" / "tiny" / "version_0"
    for path in run.rglob("*"):
        os.utime(path, (1.0, 1.0))
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), "--ckpt_path", "last"]) == 0
    found = newest_checkpoint(run)
    assert found is not None and damage(found) is None and found.stem.endswith("step_00000026")
