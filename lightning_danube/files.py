"""The only writer of whole files and folders, and the locks. Reads JSON. The cache directory, and what means a path.

Everything written here has one guarantee:

- A file or a folder appears complete under its name, or not at all, also after `kill -9` and after a power cut. The
  content is written under a hidden name in the same directory and flushed to the disk (fsync). Then the hidden name
  becomes the final name, and the directory is flushed.
- A failed write raises the error, removes its hidden file, and leaves what was there before.
- A killed process leaves `.<name>.<32 hexadecimal digits>.partial`. The next writer in the same directory removes this
  leftover. A writer at work holds a lock on its hidden file, so no other process takes that file for a leftover.
- A folder cannot be replaced in one step. The old folder becomes `.<name>.<digits>.replaced` until the new folder has
  the name. If the process is killed in between, the next writer in the same directory puts the old folder back.
- The user's umask decides the permissions, also where a library makes files that only their owner can read.

Files inside a new folder are written plainly: `new_folder` flushes all of them before the folder gets its name.

Work that two processes must not do at the same time holds a lock file: see `locked`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import resource
import shutil
import socket
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_LOOKS = 0.2
"""How often a process that waits for a lock looks whether it is free."""

SECONDS_UNTIL_ABANDONED = 24 * 3600
"""Where the file system has no locks, a hidden file that was not changed for this time is a leftover."""


_SEAL = "sha256"

SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Error numbers that mean the system lacks memory, maps or descriptors. The file itself may be intact."""


def write_bytes(path: Path, content: bytes) -> None:
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Writes an object of JSON with a hash of its content, for `read_sealed`."""
    write_json(path, {**values, _SEAL: _seal(values)})


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file; when this returns, the line is on the disk.

    A line is added as a whole or not at all. After a power cut within the write, the next line begins on a new line.

    Raises:
        OSError: the line cannot be written. Names the file.
    """
    make_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    with naming(path), open(handle, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        is_torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        content = ("\n" * is_torn + line + "\n").encode("utf-8", "replace")
        if file.write(content) < len(content):  # the disk is full
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one object of JSON, which others may have damaged.

    Raises:
        OSError: there is no such file, or it is not a regular file, such as a pipe, which could never end.
        ValueError: it is not JSON, or not an object; the message is one line that names the file.
    """
    content = parse_json(read_regular(path), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file to which objects of JSON were appended, one on each line.

    Empty lines are left out, and so is a last line without an end, which a killed process leaves.

    Raises:
        OSError: there is no such file, or it is not a regular file.
        ValueError: a line is not JSON, or not an object; names file and line.
    """
    rows = []
    for number, line in enumerate(read_regular(path).split(b"\n")[:-1], start=1):
        if line.strip():
            rows.append(parse_json(line, f"{path}, line {number}"))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{path}, line {number}: holds a {type(rows[-1]).__name__}, not an object")
    return rows


def read_sealed(path: Path, remedy: str = "remove it, and it is made again") -> dict[str, Any]:
    """Reads what `write_sealed` wrote: a file of the cache in which a wrong digit would not be noticed otherwise.

    Raises:
        OSError: there is no such file, or it is not a regular file.
        ValueError: the content changed since it was written; names the file and ends with the remedy.
    """
    with naming_cached(path, remedy):
        values = read_json(path)
        if values.pop(_SEAL, None) != _seal(values):
            raise ValueError("its content changed since it was written")
        return values


@contextmanager
def naming_cached(path: Path, remedy: str = "remove it, and it is made again") -> Iterator[None]:
    """Turns whatever a library raises on a damaged file of the cache into one line.

    Args:
        remedy: what the user can do; ends the message.

    Raises:
        ValueError: an exception left the block; names the file, which can be made again.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno in SHORTAGES:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged ({said}): {remedy}") from error


def parse_json(text: str | bytes, source: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: it is not JSON; the message is one line that begins with `source`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON ({why_not_json(error)})") from error


class RepeatedKey(ValueError):
    """A key appears twice in an object of JSON. Python's reader would keep the last value, other readers the first."""


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(f"the key {next(key for key in keys if keys.count(key) > 1)[:80]!r} appears twice")
    return values


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_with_each_key_once)
"""Reads JSON that people wrote as data. Raises `RepeatedKey`."""


def why_not_json(error: Exception) -> str:
    """Says why a reader of JSON refused a text. The reasons have five types."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RepeatedKey):
        return str(error)
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return f"a whole number of more than {sys.get_int_max_str_digits():,} digits"


def read_regular(path: Path) -> bytes:
    """Reads a file as a whole, unless it is a pipe or a device, whose end may never come.

    Raises:
        OSError: the file cannot be read; names it.
    """
    check_regular(path)
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Raises OSError, which names the path, if it is not a regular file."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], schema: Any = None) -> None:
    """
    Args:
        schema: of pyarrow; found from the values if not given.
    """
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_pylist(list(rows), schema=schema)
    with new_file(path) as partial:
        pyarrow.parquet.write_table(table, partial)


@contextmanager
def new_file(target: Path, *, clear: bool = True) -> Iterator[Path]:
    """The hidden path of an empty file to write into. At the end of the block the file is `target`, and replaces a
    file of that name.

    Args:
        clear: remove leftovers of killed writers first, which lists the directory. False for a directory of many files
            that is removed as a whole.

    Raises:
        OSError: the file cannot be written. Its filename may be the hidden path.
    """
    make_folder(target.parent)
    if clear:
        remove_leftovers(target.parent)
    with naming(target), _claimed(target, is_folder=False) as partial:
        mode = partial.stat().st_mode
        yield partial
        if partial.stat().st_mode != mode:
            partial.chmod(mode & 0o777)
        sync(partial)
        os.replace(partial, target)
        sync(target.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the block by which a disk refuses a file, and which names no file, names this one. A full disk is
    such an error: the system does not say for which file."""
    try:
        yield
    except Exception as error:
        number = refusal_of_disk(error)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        reason = os.strerror(number)
        raise OSError(number, f"not written: {reason[0].lower()}{reason[1:]}", str(path)) from error


def refusal_of_disk(error: BaseException) -> int | None:
    """Returns the errno of an error by which a disk refuses a file, else None. Libraries report one in types and words
    of their own: Rust's and Arrow's numbers, and NumPy's count of what it could write."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\b(?:os error|errno) (\d+)", str(error), re.IGNORECASE)):
        number = int(found[1])
    if number is None and isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error)):
        number = errno.ENOSPC
    return number if number in _REFUSALS else None


_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the system gave no memory or no thread to Python or to a library.

    Libraries report this in types of their own. Then the file that they read may be intact.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if isinstance(error, SystemError):  # CPython reports some failed allocations without an error of their own
        limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        return limited or not has_room(ENOUGH_TO_WORK)
    # A ValueError is a message of this project, which may quote a library.
    return not isinstance(error, ValueError) and re.search(_NO_MEMORY, str(error)) is not None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, then what caused it or was handled when it was raised, and so on.

    Each error comes once: a library can raise an error from one of its own consequences.
    """
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and not any(one is earlier for earlier in seen):
        seen.append(one)
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def has_room(size: int) -> bool:
    """Returns whether the system gives this process so many bytes. Gets and returns them, and writes none."""
    try:
        mmap.mmap(-1, size).close()
    except OSError:
        return False
    return True


ENOUGH_TO_REPORT = 8 << 20
"""Bytes with which the interpreter can free what failed and print a line. With less it crashes at times."""
ENOUGH_TO_WORK = 64 << 20
"""If fewer bytes are left, an error that looks like a bug is taken for the consequence of a failed allocation."""

_NO_MEMORY = re.compile(
    r"can't allocate memory|[Cc]annot allocate memory|std::bad_alloc"  # torch, C, C++
    r"|\bos error 12\b|^out of memory$"  # Rust
    r"|failed to map segment from shared object(?!: Operation not permitted)"  # the loader of libraries
    r"|can't start new thread|ThreadPoolBuildError"  # Python, Rust: a thread needs memory for its stack
)


@contextmanager
def new_folder(target: Path, *, replace: bool = False, clear: bool = True) -> Iterator[Path]:
    """The hidden path of an empty folder to write into. At the end of the block the folder is `target`.

    Args:
        replace: replace what has the name. Otherwise a folder that appears meanwhile stays, and the new one is
            discarded: for content that every process makes alike.
        clear: see `new_file`.

    Raises:
        OSError: the folder cannot be written; names `target` and the reason.
    """
    with _hidden_folder(target, clear) as partial:
        try:
            yield partial
            finish_folder(partial, target, replace=replace)
        except Exception as error:
            told = _about_target(error, partial, target)
            if told is error:
                raise
            raise told from error


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """The hidden path of a folder beside `target`, for large files that are needed while `target` is made. The folder
    is removed at the end of the block, or after a kill by the next writer of `target`. An error of the disk that names
    a file of the folder names `target`, which the user knows."""
    with _hidden_folder(target) as partial:
        try:
            yield partial
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith(str(partial)):
                raise
            raise OSError(error.errno, error.strerror, str(target)) from error


def finish_folder(partial: Path, target: Path, *, replace: bool = False) -> None:
    """Flushes a folder that was written under another name in the same directory, and names it `target`.

    Args:
        replace: see `new_folder`.
    """
    mode = partial.stat().st_mode
    for path in partial.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode & 0o666:
            path.chmod(mode & 0o666)
        sync(path)
    sync(partial)
    if replace and os.path.lexists(target):
        _replace_folder(partial, target)
    else:
        try:
            os.replace(partial, target)
        except OSError as error:
            if replace or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Another process was faster, and made the same content.
            shutil.rmtree(partial)
    sync(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left in a folder. Puts back folders that were just set aside."""
    for name in os.listdir(folder):
        if match := re.fullmatch(r"\.(.+)\.[0-9a-f]{32}\.(?:partial|replaced)", name):
            _remove_leftover(folder / name, folder / match[1])


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, if they are missing; all of them survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Waits until the disk has a file's content or a folder's entries. Some file systems cannot flush a folder; there
    the call does nothing."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def remove_whole(path: Path) -> None:
    """Removes a file or a folder, if it is there. A folder loses its name before the first of its files is removed."""
    if path.is_dir():
        hidden = _hidden_name(path, "partial")
        os.replace(path, hidden)
        path = hidden
    _remove(path)


class InUse(ValueError):
    """Another process does the same work, so this process does not begin."""


@contextmanager
def locked(
    file: Path, subject: str, *, wait: Callable[[str], object] | None = None, shared: bool = False
) -> Iterator[int]:
    """Holds a lock for the time of the block, so that only one process does some work. Yields the lock's descriptor.

    The lock is a file that names the host and the process. The system frees the lock when the process ends, also after
    `kill -9`. A program that this process starts keeps the lock for as long as it has the descriptor (`pass_fds`); a
    fork does not. A file system without locks tells apart only the processes of one host.

    Args:
        file: the lock file, such as `.<name>.lock` beside what is written.
        subject: what is locked, for the message: "runs/world/version_0".
        wait: called once with the message; then waits until the lock is free. None: raise `InUse` instead.
        shared: holders of a shared lock do not exclude each other.

    Raises:
        InUse: another process holds the lock. Names the process.
        OSError: the lock file cannot be written.
    """
    made = not file.parent.is_dir()
    make_folder(file.parent)
    told = False
    while (handle := _lock_now(file, shared)) is None:
        message = f"{subject} is in use by {_holder(file)}"
        if wait is None:
            raise InUse(f"{message}: wait until it ends, or stop it")
        if not told:
            wait(f"{message}: waiting until it ends")
            told = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    try:
        yield handle
    finally:
        # Removed while it is locked: another process may wait for this file, and then looks for it by name again.
        with suppress(OSError):
            if shared:  # the last holder removes it
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
        _held.discard(handle)
        os.close(handle)
        if made:
            with suppress(OSError):  # it holds other files now
                file.parent.rmdir()


def default_cache_dir() -> Path:
    """Returns $LIGHTNING_DANUBE_CACHE, else lightning-danube in the user's cache directory.

    Raises:
        ValueError: the user has no home directory.
    """
    if explicit := os.environ.get("LIGHTNING_DANUBE_CACHE"):
        return Path(explicit)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "lightning-danube"
    try:
        return Path.home() / ".cache" / "lightning-danube"
    except RuntimeError as error:
        raise ValueError(
            "this user has no home directory, where the cache would be: set LIGHTNING_DANUBE_CACHE to a directory"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _hidden_folder(target: Path, clear: bool = True) -> Iterator[Path]:
    make_folder(target.parent)
    if clear:
        remove_leftovers(target.parent)
    with _claimed(target, is_folder=True) as partial:
        yield partial


def _replace_folder(partial: Path, target: Path) -> None:
    replaced = _hidden_name(target, "replaced")
    # The lock goes with the old folder: without it, another writer would put the folder back.
    with _locked(target):
        os.replace(target, replaced)
        try:
            os.replace(partial, target)
        except BaseException:
            os.replace(replaced, target)
            raise
        with suppress(OSError):  # the next writer removes it
            _remove(replaced)


def _hidden_name(target: Path, kind: str) -> Path:
    """A sibling of the target, not a name in $TMPDIR: only within one file system is a rename all or nothing."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.{kind}")


@contextmanager
def _claimed(target: Path, *, is_folder: bool) -> Iterator[Path]:
    """Makes the hidden file or folder of a new target and locks it. At the end, removes it if it is still there."""
    partial, handle = _made_and_locked(target, is_folder)
    try:
        yield partial
    finally:
        os.close(handle)
        # The error that the user sees is the one that ended the block.
        with suppress(OSError):
            _remove(partial)


def _made_and_locked(target: Path, is_folder: bool) -> tuple[Path, int]:
    while True:
        partial = _hidden_name(target, "partial")
        if is_folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
        with suppress(FileNotFoundError):
            handle = os.open(partial, os.O_RDONLY)
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if partial.exists():
                return partial, handle
            # Between the two calls, another process took it for a leftover.
            os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Locks a file or folder for the time of the block, and says whether no other process is writing it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # removed meanwhile, or somebody else's
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:
            free = time.time() - os.fstat(handle).st_mtime > SECONDS_UNTIL_ABANDONED
        yield free
    finally:
        os.close(handle)


_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _lock_now(file: Path, shared: bool) -> int | None:
    """Returns the descriptor of the locked file, or None if another process holds the lock."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # the file system has no locks
            if not shared and _is_alive(*_host_and_process(file)):
                os.close(handle)
                return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                break
        # Its holder removed it between the two calls.
        os.close(handle)
    # A full disk does not matter: the lock holds without the name of its holder.
    with suppress(OSError):
        os.truncate(handle, 0)
        os.pwrite(handle, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
    _held.add(handle)
    return handle


def _host_and_process(file: Path) -> tuple[str, int]:
    """Returns what a lock file says of its holder: ("", 0) if it says nothing."""
    try:
        host, process = file.read_text().split()
        return host, int(process)
    except (OSError, ValueError):
        return "", 0


def _holder(file: Path) -> str:
    host, process = _host_and_process(file)
    return f"process {process} on {host}" if process else f"another process (lock file {file})"


def _is_alive(host: str, process: int) -> bool:
    if host != socket.gethostname() or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def _close_held() -> None:
    """Closes the locks in a forked child: a loader that outlives a killed run must not keep the run's lock."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)


def _remove_leftover(leftover: Path, target: Path) -> None:
    with _locked(leftover) as is_abandoned:
        if not is_abandoned:
            return
        if leftover.suffix == ".replaced" and not target.exists():
            os.replace(leftover, target)
        else:
            _remove(leftover)


def _about_target(error: Exception, partial: Path, target: Path) -> Exception:
    """An error about the hidden folder names the target instead. Libraries report a disk that refuses in types of
    their own."""
    is_refusal = isinstance(error, OSError) or "(os error " in str(error)
    named = getattr(error, "filename", None)
    if not is_refusal or (isinstance(named, str | bytes) and not Path(os.fsdecode(named)).is_relative_to(partial)):
        return error
    reason = getattr(error, "strerror", None) or str(error)
    number = getattr(error, "errno", None) or errno.EIO
    return OSError(number, f"not written: {reason[0].lower()}{reason[1:]}", str(target))


def looks_like_path(name: str) -> bool:
    """Returns whether a name is meant as a path of this machine, not as a hub id such as "owner/name".

    A path starts with ".", "/", "~" or "runs/", ends with "/", has more than one "/", or lies in an existing directory.
    """
    without_revision = name.partition("@")[0]
    parent = without_revision.rpartition("/")[0]
    return (
        name.startswith((".", "/", "~", "runs/"))  # no owner on the hub is called runs
        or name.endswith("/")
        or without_revision.count("/") > 1
        or (parent != "" and Path(parent).is_dir())
    )
