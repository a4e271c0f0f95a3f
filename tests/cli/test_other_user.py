"""Runs, caches and places of another user: what may be read is used, and anything else ends in one line.

A process of root without capabilities is an ordinary user: it may not touch what another user keeps for itself. Unlike
a process with another user id, it may read a Python below /root.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.runs import LOCK
from tests.forked import Forked

pytestmark = pytest.mark.faults

ORDINARY = """
import ctypes, sys

version, all_capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(version, all_capabilities) == 0
from lightning_danube.__main__ import main

sys.exit(main(sys.argv[1:]))
"""
OTHER = 65534
RUN = "runs/tiny/version_0"


def give(place: Path, rights: int) -> None:
    """Makes a place and all below it another user's. `rights`: of folders; files have them without execution."""
    for path in [place, *place.rglob("*")]:
        os.chown(path, OTHER, OTHER)
        path.chmod(rights if path.is_dir() else rights & 0o666)


def said(command: list[str], place: Path) -> tuple[int, str]:
    """Returns the exit code and the outputs of a command of an ordinary user."""
    output = place / "said.txt"
    output.unlink(missing_ok=True)
    process = Forked(command, output, place, program=ORDINARY)
    code = process.wait(300)
    return code, output.read_text()


@pytest.fixture
def place(tiny: Path, tiny_run: Path) -> Path:
    """A directory with a run, its cache and its configuration."""
    if os.geteuid() != 0:
        pytest.skip("needs the right to mount: only root gives a file to another user")
    shutil.copytree(tiny_run, tiny / RUN)
    assert main(["prepare", "--config", str(tiny / "tiny.yaml"), "--processes", "1"]) == 0
    return tiny


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "generate": lambda at: ["generate", "--weights", str(at / RUN), "--prompt", "The", "--max-new-tokens", "4"],
    "export": lambda at: ["export", "--weights", str(at / RUN), "--out", str(at / "out" / "model")],
    "gguf": lambda at: [
        "export",
        "--weights",
        str(at / RUN),
        "--format",
        "gguf",
        "--out",
        str(at / "out" / "model.gguf"),
    ],
    "prepare": lambda at: ["prepare", "--config", str(at / "tiny.yaml"), "--processes", "1"],
    "prepare anew": lambda at: [*COMMANDS["prepare"](at), "--data.init_args.cache_dir", str(at / "new")],
    "fit": lambda at: ["fit", "--config", str(at / "tiny.yaml"), "--runs", str(at / "mine")],
    "resume": lambda at: ["fit", "--config", str(at / "tiny.yaml"), "--ckpt_path", "last"],
    "new": lambda at: ["fit", "--config", str(at / "tiny.yaml")],
}


@pytest.mark.parametrize(
    ("verb", "others", "rights", "code"),
    [
        ("generate", "runs", 0o700, 2),
        ("generate", "runs", 0o755, 0),
        ("export", "runs", 0o700, 2),
        ("export", "runs", 0o755, 0),
        ("export", "out", 0o700, 2),
        ("export", "out", 0o755, 2),
        ("gguf", "runs", 0o700, 2),
        ("gguf", "runs", 0o755, 0),
        ("gguf", "out", 0o755, 2),
        ("prepare", "cache", 0o700, 2),
        ("prepare", "cache", 0o755, 0),
        # Shards that are there need no source.
        ("prepare", "web.jsonl", 0o700, 0),
        ("prepare anew", "web.jsonl", 0o700, 2),
        ("fit", "cache", 0o700, 2),
        ("fit", "cache", 0o755, 0),
        ("fit", "mine", 0o700, 2),
        ("fit", "mine", 0o755, 2),
        ("resume", "runs", 0o700, 2),
        ("resume", "runs", 0o755, 2),
        ("new", "runs", 0o700, 2),
        ("new", "runs", 0o755, 2),
    ],
)
def test_what_another_user_keeps_ends_in_one_line(place: Path, verb: str, others: str, rights: int, code: int) -> None:
    """Nothing of the other user changes."""
    if not (place / others).exists():
        (place / others).mkdir()
    before = {path: path.stat().st_mtime_ns for path in (place / others).rglob("*")}
    give(place / others, rights)
    found, text = said(COMMANDS[verb](place), place)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text and found == code, text
    if code == 2:
        (line,) = errors
        assert str(place / others) in line and "ermission denied" in line, text
    else:
        assert not errors
    assert {path: path.stat().st_mtime_ns for path in (place / others).rglob("*")} == before
    assert not list(place.rglob(LOCK)) and not [path for path in place.rglob(".*") if path.suffix == ".partial"]


def test_an_empty_cache_of_another_user_is_named(place: Path) -> None:
    shutil.rmtree(place / "cache")
    (place / "cache").mkdir()
    give(place / "cache", 0o755)
    for verb in ("prepare", "fit"):
        code, text = said(COMMANDS[verb](place), place)
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and str(place / "cache") in errors[0], text
        assert "ermission denied" in errors[0] and "Traceback" not in text, text
