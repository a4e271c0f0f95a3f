"""Files and folders are complete or absent: the order of flushing and renaming, failures, kills, locks."""

import ast
import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_danube.__main__ import user_message
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.files import (
    SECONDS_BETWEEN_LOOKS,
    InUse,
    append_line,
    causes,
    default_cache_dir,
    finish_folder,
    locked,
    naming,
    naming_cached,
    new_file,
    new_folder,
    parse_json,
    read_json,
    read_json_lines,
    read_sealed,
    remove_leftovers,
    remove_whole,
    scratch_folder,
    sync,
    write_bytes,
    write_json,
    write_parquet,
    write_sealed,
    write_text,
)
from lightning_danube.quantization.measured import Content, MeasuredLevel, save_measured
from lightning_danube.text.embedded.world import write_world
from lightning_danube.weights.adapters import add_adapter, save_adapter
from lightning_danube.weights.gguf.files import save_gguf
from lightning_danube.weights.huggingface import save_hf
from tests.tiny_models import tiny_decoder

ROOT = Path(__file__).resolve().parents[1]
DIGITS = "0123456789abcdef" * 2
Write = Callable[[Path], Any]


def a_folder(path: Path, **options: Any) -> None:
    with new_folder(path, **options) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "b").write_text("second")
        (partial / "a").write_text("first")


def a_fetched_folder(path: Path) -> None:
    hidden = path.with_name(".hidden")
    write_text(hidden / "a", "first")
    finish_folder(hidden, path)


def a_measurement(path: Path) -> None:
    values = np.ones((2, 3))
    save_measured(path, MeasuredLevel(Content(8, 8, {}), 1.0, {3: values}, values, values, np.ones(2)))


def an_adapter(path: Path) -> None:
    decoder = tiny_decoder()
    add_adapter(decoder, r=2, target_modules=["q_proj"])
    save_adapter(decoder, path, card="# card", overwrite=True)


WRITERS: dict[str, Write] = {
    "bytes": lambda path: write_bytes(path, b"content"),
    "text": lambda path: write_text(path, "content"),
    "json": lambda path: write_json(path, {"n": 1}),
    "parquet": lambda path: write_parquet(path, [{"n": 1}]),
    "folder": a_folder,
    "fetched folder": a_fetched_folder,
    "checkpoint": lambda path: DurableCheckpointIO().save_checkpoint({"a": torch.ones(8)}, path),
    "measurement": a_measurement,
    "GGUF": lambda path: save_gguf(tiny_decoder(), path, dtype=torch.float32, overwrite=True),
    "Hugging Face": lambda path: save_hf(tiny_decoder(), path, overwrite=True),
    "adapter": lambda path: an_adapter(path),
}
FOLDERS = ("folder", "fetched folder", "Hugging Face", "adapter")
OF_FILES = [name for name in WRITERS if name not in FOLDERS]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """("flush", inode, size) and ("rename", inode, target), in order."""
    found: list[tuple[Any, ...]] = []
    flush, replace = os.fsync, os.replace

    def record_flush(handle: int) -> None:
        flush(handle)
        found.append(("flush", os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def record_rename(old: Any, new: Any) -> None:
        inode = os.stat(old).st_ino
        replace(old, new)
        found.append(("rename", inode, Path(new)))

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(os, "replace", record_rename)
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_all_is_on_the_disk_before_it_has_the_name_and_the_name_follows(
    name: str, tmp_path: Path, events: list[tuple[Any, ...]]
) -> None:
    target = tmp_path / "target"
    WRITERS[name](target)
    renamed = events.index(("rename", target.stat().st_ino, target))
    contents = [target, *target.rglob("*")]
    for path in contents:
        flush = ("flush", path.stat().st_ino, path.stat().st_size)
        assert flush in events[:renamed], path
    assert ("flush", tmp_path.stat().st_ino) in [event[:2] for event in events[renamed:]]
    assert {path.name for path in tmp_path.iterdir()} <= {"target", "manifest.json"}


@pytest.mark.medium
def test_files_of_the_embedded_world_are_written_like_all_others(tmp_path: Path, events: list[tuple[Any, ...]]) -> None:
    for file in write_world(tmp_path).values():
        renamed = events.index(("rename", file.stat().st_ino, file))
        assert ("flush", file.stat().st_ino, file.stat().st_size) in events[:renamed]


def test_new_parents_are_flushed_into_theirs(tmp_path: Path, events: list[tuple[Any, ...]]) -> None:
    write_text(tmp_path / "a" / "b" / "c", "content")
    flushed = [event[1] for event in events if event[0] == "flush"]
    assert {tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino} <= set(flushed)


# --- failures ---------------------------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "fetched folder"])
def test_a_disk_that_refuses_leaves_what_was_there(
    name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    write: Write = (lambda path: a_folder(path, replace=True)) if name == "folder" else WRITERS[name]
    write(target)
    before = everything(tmp_path)
    real = os.replace

    def refuse(*names: Any) -> None:
        # A folder that was set aside must be able to come back.
        if call == "replace" and (Path(names[1]) != target or str(names[0]).endswith(".replaced")):
            return real(*names)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *map(str, names[:1] if call == "replace" else ()))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match=r"(?i)no space left") as error:
            write(target)
    assert error.value.errno == errno.ENOSPC
    after = everything(tmp_path)
    if name == "checkpoint":  # the checkpoint is judged by its own checksums until the manifest lists it again
        before.pop("manifest.json"), after.pop("manifest.json")
    assert after == before


@pytest.mark.parametrize("folder", [False, True])
def test_a_block_that_fails_leaves_nothing(folder: bool, tmp_path: Path) -> None:
    for error in (ValueError("a fault"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, (new_folder if folder else new_file)(tmp_path / "target") as partial:
            (partial / "half" if folder else partial).write_text("half")
            raise error
        assert raised.value is error
        assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_json_leave_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"n": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"n": object()})
    assert everything(tmp_path) == {"x.json": b'{\n  "n": 1\n}\n'}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_the_old_file_and_the_old_folder(small_disk: Path) -> None:
    write_text(small_disk / "file", "old")
    a_folder(small_disk / "folder")
    before = everything(small_disk)
    with pytest.raises(OSError, match="not written: no space left"):
        write_bytes(small_disk / "file", bytes(2**17))
    with (
        pytest.raises(OSError, match="not written: no space left") as error,
        new_folder(small_disk / "folder", replace=True) as partial,
    ):
        (partial / "a").write_bytes(bytes(2**17))
    assert error.value.filename == str(small_disk / "folder")
    assert everything(small_disk) == before


def test_an_error_about_a_file_elsewhere_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, new_folder(tmp_path / "folder"):
        (tmp_path / "missing").read_text()
    assert error.value.filename == str(tmp_path / "missing")
    assert error.value.__cause__ is None


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_came_first_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as partial:
        (partial / "mine").touch()
        a_folder(tmp_path / "folder")
    assert sorted(everything(tmp_path)) == ["folder", "folder/a", "folder/inner", "folder/inner/b"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    a_folder(tmp_path / "folder")
    with new_folder(tmp_path / "folder", replace=True) as partial:
        (partial / "new").touch()
    assert sorted(everything(tmp_path)) == ["folder", "folder/new"]


def test_a_scratch_folder_goes_with_its_block(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "file") as scratch:
        (scratch / "large").write_text("content")
        assert scratch.parent == tmp_path and scratch.name.startswith(".file.")
    assert list(tmp_path.iterdir()) == []


def test_whole_files_and_folders_are_removed(tmp_path: Path) -> None:
    a_folder(tmp_path / "folder")
    write_text(tmp_path / "file", "content")
    for name in ("folder", "file", "neither"):
        remove_whole(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_umask_decides_the_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        for name in ("a", "b"):
            with new_file(tmp_path / name) as partial:
                if name == "b":  # as some libraries do
                    partial.unlink()
                    partial.touch(0o600)
        with new_folder(tmp_path / "folder") as partial:
            (partial / "a").touch(0o600)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"a": 0o640, "b": 0o640, "folder": 0o750}
    assert (tmp_path / "folder" / "a").stat().st_mode & 0o777 == 0o640


# --- kills and other writers ------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_danube.files import new_file, new_folder
target, moment, folder = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "folder"
replace = os.replace
def die(*names):
    if moment in ("between the renames", "after the renames"):
        replace(*names)
    if moment == "after the renames" and names[0].suffix != ".partial":
        return
    os.kill(os.getpid(), signal.SIGKILL)
if moment != "writing":
    os.replace = die
with new_folder(target, replace=True) if folder else new_file(target) as partial:
    (partial / "new" if folder else partial).write_text("new")
    if moment == "writing":
        die()
"""


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ("file", "writing"),
        ("file", "before the rename"),
        ("folder", "writing"),
        ("folder", "before the rename"),
        ("folder", "between the renames"),
        ("folder", "after the renames"),
    ],
)
def test_the_next_writer_clears_up_after_a_kill(kind: str, moment: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (a_folder if kind == "folder" else WRITERS["text"])(target)
    before = everything(tmp_path)
    if moment == "after the renames":
        before = {"target": None, "target/new": b"new"}
    command = [sys.executable, "-c", KILLED, str(target), moment, kind]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = everything(tmp_path)
    assert left != before
    assert all(name in before or name.startswith(".target.") for name in left)
    remove_leftovers(tmp_path)
    assert everything(tmp_path) == before


def test_any_writer_in_a_directory_clears_up_after_all_that_were_killed(tmp_path: Path) -> None:
    for name in (f".a.{DIGITS}.partial", f".a.{DIGITS}.replaced", f".b.{DIGITS}.partial", ".a.partial"):
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "a", "content")
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".a.partial"}


@pytest.mark.parametrize("folder", [False, True])
def test_what_another_writer_is_writing_is_no_leftover(folder: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    begin = new_folder if folder else new_file
    with begin(target) as first:
        with begin(target) as second:
            assert first != second and first.exists()
            (second / "a" if folder else second).write_text("second")
        remove_leftovers(tmp_path)
        (first / "a" if folder else first).write_text("first")
    found = (target / "a" if folder else target).read_text()
    assert found == ("second" if folder else "first")
    assert list(tmp_path.iterdir()) == [target]


def test_without_locks_only_old_files_are_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    old, new = tmp_path / f".a.{DIGITS}.partial", tmp_path / f".a.{DIGITS[::-1]}.partial"
    for leftover in (old, new):
        leftover.touch()
    os.utime(old, (1e9, 1e9))
    write_text(tmp_path / "a", "content")
    assert {path.name for path in tmp_path.iterdir()} == {"a", new.name}


# --- one place --------------------------------------------------------------------------------------------------------


def test_only_one_module_flushes_and_renames() -> None:
    """A writer of its own has a guarantee of its own."""
    found = []
    for file in [*(ROOT / "lightning_danube").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        if file == ROOT / "lightning_danube" / "files.py":
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            match node:
                case (
                    ast.Attribute(value=ast.Name(id="os"), attr="fsync" | "fdatasync" | "replace" | "rename")
                    | ast.Call(func=ast.Attribute(attr="rename"), args=[ast.Name() | ast.BinOp()])
                    | ast.Attribute(value=ast.Name(id="tempfile"), attr="mkstemp" | "mkdtemp" | "NamedTemporaryFile")
                ):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "use lightning_danube/files.py:\n" + "\n".join(found)


# --- exports, leftovers, odd file systems -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GGUF", "Hugging Face", "adapter"])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_exports_have_the_permissions_of_the_umask(name: str, umask: int, tmp_path: Path) -> None:
    """A second export as well, which replaces the first."""
    old = os.umask(umask)
    try:
        for _ in range(2):
            WRITERS[name](tmp_path / "export")
    finally:
        os.umask(old)
    found = [tmp_path / "export", *(tmp_path / "export").rglob("*")]
    assert len(found) == {"GGUF": 1, "Hugging Face": 4, "adapter": 4}[name]
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_a_folder_may_be_one_that_cannot_be_flushed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(tmp_path / "file")
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            sync(tmp_path)
    else:
        sync(tmp_path)


def test_what_was_set_aside_goes_where_its_replacement_is_there(tmp_path: Path) -> None:
    a_folder(tmp_path / "folder")
    before = everything(tmp_path)
    aside = tmp_path / f".folder.{DIGITS}.replaced"
    aside.mkdir()
    (aside / "old").touch()
    remove_leftovers(tmp_path)
    assert everything(tmp_path) == before


def test_files_that_are_named_like_leftovers_stay(tmp_path: Path) -> None:
    others = [f"x.a.b.{DIGITS}.partial", f".a.b.{DIGITS}.partial2", f".{DIGITS}.partial", f".a.{DIGITS[1:]}.partial"]
    for name in (*others, f".a.b.{DIGITS}.partial"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_a_folder_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed within the removal leaves nothing half of which is gone."""
    a_folder(tmp_path / "folder")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_whole(tmp_path / "folder")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".folder.") and left.name.endswith(".partial")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.delenv("LIGHTNING_DANUBE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/home/me/.cache/lightning-danube")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/lightning-danube")
    monkeypatch.setenv("LIGHTNING_DANUBE_CACHE", "/mine")
    assert default_cache_dir() == Path("/mine")


# --- lines ------------------------------------------------------------------------------------------------------------


def test_lines_are_added_whole_or_not_at_all(small_disk: Path) -> None:
    file = small_disk / "new" / "lines"
    append_line(file, "one")
    append_line(file, "half a pair: \ud800")
    before = file.read_bytes()
    assert before == b"one\nhalf a pair: ?\n"
    with pytest.raises(OSError, match="not written: no space left") as error:
        append_line(file, "x" * 2**17)
    assert error.value.filename == str(file) and file.read_bytes() == before
    append_line(file, "three")
    assert file.read_bytes() == before + b"three\n"


def test_a_line_begins_behind_what_a_power_cut_has_left(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one\ntw")
    append_line(tmp_path / "lines", "three")
    assert (tmp_path / "lines").read_text() == "one\ntw\nthree\n"


# --- locks ------------------------------------------------------------------------------------------------------------

HOLDER = """
import os, sys
from pathlib import Path
from lightning_danube.files import locked
with locked(Path(sys.argv[1]), "a thing", shared=sys.argv[2] == "shared") as handle:
    if sys.argv[2] == "forks":
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.write(writing, b"x")
            os.close(1)
            sys.stdin.read()
            os._exit(0)
        os.read(reading, 1)
    print("holds", flush=True)
    sys.stdin.read(1)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Any]:
    """Starts a process that holds the lock file `.a.lock` until it is killed, or until its input is written to."""
    started = []

    def start(how: str = "alone") -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", HOLDER, str(tmp_path / ".a.lock"), how]
        started.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes))
        output = started[-1].stdout
        assert output is not None and output.readline() == "holds\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_and_told_by_whom(hold: Any, tmp_path: Path) -> None:
    holder = hold()
    with pytest.raises(InUse) as error, locked(tmp_path / ".a.lock", "runs/a"):
        pass
    assert str(error.value) == (
        f"runs/a is in use by process {holder.pid} on {socket.gethostname()}: wait until it ends, or stop it"
    )


@pytest.mark.parametrize("how", ["alone", "forks"])
def test_a_lock_ends_with_its_process(hold: Any, how: str, tmp_path: Path) -> None:
    """Also where a child of it lives on, and its file is there. Nothing is left in the end."""
    holder = hold(how)
    holder.kill()
    holder.wait()
    assert (tmp_path / ".a.lock").exists()
    with locked(tmp_path / ".a.lock", "runs/a"):
        assert (tmp_path / ".a.lock").read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    assert not list(tmp_path.iterdir())


def test_a_process_may_wait_for_a_lock(hold: Any, tmp_path: Path) -> None:
    holder, told = hold(), []

    def tell(line: str) -> None:
        told.append(line)
        threading.Timer(2.5 * SECONDS_BETWEEN_LOOKS, end).start()  # this process looks again, and says nothing

    def end() -> None:
        holder.stdin.write("x")
        holder.stdin.flush()

    with locked(tmp_path / ".a.lock", "the cache", wait=tell):
        assert holder.wait() == 0
    assert told == [f"the cache is in use by process {holder.pid} on {socket.gethostname()}: waiting until it ends"]


def test_shared_locks_exclude_only_the_others(hold: Any, tmp_path: Path) -> None:
    hold("shared")
    with locked(tmp_path / ".a.lock", "it", shared=True):
        pass
    assert (tmp_path / ".a.lock").exists()  # the other process still has it
    with pytest.raises(InUse), locked(tmp_path / ".a.lock", "it"):
        pass
    with locked(tmp_path / ".b.lock", "it", shared=True), pytest.raises(InUse), locked(tmp_path / ".b.lock", "it"):
        pass
    assert not (tmp_path / ".b.lock").exists()


def test_a_program_that_was_started_keeps_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path / ".a.lock", "a run") as handle:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[handle])
        # As after kill -9: nobody removes the file.
        kept = tmp_path / "kept"
        os.link(tmp_path / ".a.lock", kept)
    os.link(kept, tmp_path / ".a.lock")
    with pytest.raises(InUse), locked(tmp_path / ".a.lock", "a run"):
        pass
    child.communicate()
    with locked(tmp_path / ".a.lock", "a run"):
        pass


def test_without_locks_the_process_that_is_named_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    file, host = tmp_path / ".a.lock", socket.gethostname()
    for text, free in ((f"{host} {os.getppid()}\n", False), (f"{host} 99999999\n", True), ("torn", True), ("", True)):
        file.write_text(text)
        if free:
            with locked(file, "a run"):
                assert file.exists()
        else:
            with pytest.raises(InUse, match=f"process {os.getppid()} on"), locked(file, "a run"):
                pass
        assert file.exists() != free


def test_without_locks_only_another_process_of_this_host_holds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number may be that of this process after a restart of the machine, or that of a process of another machine."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    file, host = tmp_path / ".a.lock", socket.gethostname()
    for holder in (f"{host} {os.getpid()}\n", f"not-{host} {os.getppid()}\n"):
        file.write_text(holder)
        with locked(file, "a run"):
            assert file.read_text() == f"{host} {os.getpid()}\n"

    def not_allowed(process: int, number: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "kill", not_allowed)  # a process of another user
    file.write_text(f"{host} {os.getppid()}\n")
    with pytest.raises(InUse), locked(file, "a run"):
        pass


def test_a_lock_file_that_its_holder_removes_meanwhile_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder removes its file between this process's open and its lock. A third process has made the file anew."""
    file, flock, first = tmp_path / ".a.lock", fcntl.flock, [True]

    def removed_before(handle: int, how: int) -> None:
        if first.pop() if first else False:
            file.rename(tmp_path / "removed")
            file.touch()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with locked(file, "a run") as handle:
        assert os.path.samestat(os.fstat(handle), os.stat(file))


def test_a_refused_lock_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="typing error"), locked(tmp_path / "new" / ".a.lock", "an export"):
        raise ValueError("typing error")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError("4096 requested and 100 written"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.ENOSPC, "No space left on device", "other"), False),
        (ConnectionResetError(errno.ECONNRESET, "reset"), False),
        (ValueError("no disk"), False),
    ],
)
def test_a_full_disk_names_the_file(error: Exception, named: bool, tmp_path: Path) -> None:
    with pytest.raises(type(error) if not named else OSError) as raised, naming(tmp_path / "file"):
        raise error
    if named:
        assert isinstance(raised.value, OSError)
        assert (raised.value.filename, raised.value.errno) == (str(tmp_path / "file"), errno.ENOSPC)
        assert user_message(raised.value) == f"{tmp_path / 'file'}: not written: no space left on device"
    else:
        assert raised.value is error


# --- files of JSON that others may have damaged -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON (Expecting value)"),
        (b'{"a": ', "not JSON (Expecting value)"),
        (b"[" * 100_000, "not JSON (nested too deep)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON (a whole number of more than 4,300 digits)"),
        (b'{"a": "\xff"}', "not JSON (not UTF-8)"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_damaged_json_is_one_line_that_names_the_file(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{file}: {why}')}$"):
        read_json(file)
    if content:
        file.write_bytes(b'{"a": 1}\n\n' + content + b"\n")
        with pytest.raises(ValueError, match=rf"^{re.escape(f'{file}, line 3: {why}')}$"):
            read_json_lines(file)


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory") as error:
            read_json(path)
        assert error.value.filename == str(path)


def test_a_line_that_a_kill_broke_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]
    assert parse_json('{"a": [1e400]}', "here") == {"a": [float("inf")]}


def test_a_damaged_file_of_the_cache_is_named_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "unit.npz"
    for content in (b"", b"garbage", b"PK\x03\x04garbage"):
        file.write_bytes(content)
        with (
            pytest.raises(
                ValueError, match=rf"^{re.escape(str(file))} is damaged \([^\n]*\): remove it, and it is made again$"
            ),
            naming_cached(file),
            np.load(file),
        ):
            pass
    with pytest.raises(FileNotFoundError), naming_cached(file), np.load(tmp_path / "nothing.npz"):
        pass


def test_a_sealed_file_is_read_only_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    values = {"files": [["a.jsonl", "ü"], []], "began": 1.5, "none": None, "1": 2}
    write_sealed(file, values)
    assert read_sealed(file) == values
    right = file.read_bytes()
    for place in range(len(right.rstrip())):
        file.write_bytes(right[:place] + bytes([right[place] ^ 2]) + right[place + 1 :])
        with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} is damaged \([^\n]*\): begin again$"):
            read_sealed(file, "begin again")
    write_json(file, values)
    with pytest.raises(
        ValueError, match=r"its content changed since it was written\): remove it, and it is made again"
    ):
        read_sealed(file)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.ENFILE])
def test_a_machine_without_room_does_not_make_a_file_of_the_cache_a_damaged_one(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as error, naming_cached(tmp_path / "unit.npz"):
        raise OSError(number, "no file is named")
    assert error.value.filename == str(tmp_path / "unit.npz")
    with pytest.raises(MemoryError), naming_cached(tmp_path / "unit.npz"):
        raise MemoryError


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    for name in ("LIGHTNING_DANUBE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"this user has no home directory.*: set LIGHTNING_DANUBE_CACHE"):
        default_cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache_dir() == Path("/cache/lightning-danube")


def test_an_error_in_a_scratch_folder_names_what_is_made(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as raised, scratch_folder(tmp_path / "model.gguf") as scratch:
        raise OSError(errno.ENOSPC, "full", str(scratch / "whole.gguf"))
    assert raised.value.filename == str(tmp_path / "model.gguf") and list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="full") as raised, scratch_folder(tmp_path / "model.gguf"):
        raise OSError(errno.ENOSPC, "full", "elsewhere")
    assert raised.value.filename == "elsewhere"


def test_the_causes_of_an_error_come_once_each_and_without_those_that_are_hidden() -> None:
    first, handled, cause, hidden = ValueError("0"), KeyError("1"), OSError("2"), TypeError("3")
    first.__context__, handled.__cause__, handled.__context__ = handled, cause, hidden
    assert list(causes(first)) == [first, handled, cause]
    cause.__context__ = hidden
    assert list(causes(first)) == [first, handled, cause, hidden]
    cause.__suppress_context__ = True  # raise … from None
    assert list(causes(first)) == [first, handled, cause]
    cause.__cause__ = first
    assert list(causes(first)) == [first, handled, cause]
