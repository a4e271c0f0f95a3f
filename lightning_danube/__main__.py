"""`lightning-danube <verb> …`, or `python -m lightning_danube …`: finds the verb before anything heavy is imported."""

from __future__ import annotations

from lightning_danube.outside.modules import leave_working_directory

if __name__ == "__main__":
    leave_working_directory()  # before any other import

import argparse
import importlib
import importlib.metadata
import io
import mmap
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from lightning_danube.cli.verbs import COMMANDS
from lightning_danube.files import ENOUGH_TO_REPORT, ENOUGH_TO_WORK, causes, has_room, is_out_of_memory, refusal_of_disk
from lightning_danube.signals import SIGNALS, Stopped, requeued
from lightning_danube.terminal import as_typed, clean_logs, name_meant, nearest_name, show, tell

TRAINER_VERBS = {
    "fit": "train",
    "validate": "loss on held-out text, the rows that training watches",
    "test": "loss on all held-out text",
    "predict": "loss of every held-out row, written to a file",
}
PACKAGE = Path(__file__).parent
PANIC = "PanicException"
"""What libraries in Rust raise where a file breaks them: no `Exception`, and its class cannot be imported."""
LINKED = ("callbacks", "configs")
"""Folders of the package. In a clone they are symbolic links to the folders of the same name beside it."""


def folders_of(package: Path) -> tuple[str, ...]:
    """Returns the folders with this project's code: a ValueError raised there is a user's mistake."""
    return tuple(os.path.realpath(folder) + os.sep for folder in (package, *(package / name for name in LINKED)))


_OURS = folders_of(PACKAGE)


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 only if the command succeeded, 2 for a user's mistake."""
    if args is None:
        clean_logs()
        # A locale may have no letter for what is printed, such as "×".
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                with suppress(OSError):  # a named pipe refuses
                    stream.reconfigure(errors="backslashreplace")
    with SIGNALS.listening(own_process=args is None):
        return _run(list(sys.argv[1:] if args is None else args))


def _run(args: list[str]) -> int:
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    reserve: mmap.mmap | None = None
    try:
        try:
            # Addresses without memory behind them, which are returned before an error is reported.
            reserve = mmap.mmap(-1, ENOUGH_TO_REPORT)
            return _dispatch(args)
        except Exception as error:
            return _report(error, debug, reserve)
        except BaseException as error:
            if type(error).__name__ != PANIC:
                raise
            return _report(error, debug, reserve)
    except KeyboardInterrupt:
        if not SIGNALS.answered:
            tell("stopped")
        return 128 + (SIGNALS.received or signal.SIGINT)
    except Stopped as stop:
        if stop.message:
            tell(stop.message)
        return requeued(int(stop.code or 0))
    finally:
        if reserve is not None:
            reserve.close()


def _report(error: BaseException, debug: bool, reserve: mmap.mmap | None) -> int:
    if reserve is not None:
        reserve.close()
    try:
        return _told(error, debug)
    except MemoryError:
        os.write(sys.stderr.fileno(), _NOT_EVEN_THAT)
        return 2


_NEEDS_LESS = "a smaller model, a smaller data.micro_batch_size or fewer processes needs less"
_NOT_EVEN_THAT = f"error: out of memory: {_NEEDS_LESS}\n".encode()
"""The line that is printed if no memory is left to build a message."""


def _told(error: BaseException, debug: bool) -> int:
    """Tells an error, and returns the exit code."""
    if not debug:
        # What failed may have taken all memory, and its variables would be kept until the end of this function.
        traceback.clear_frames(error.__traceback__)
    message = user_message(error)
    if debug or message is None:
        tell(traceback.format_exc().rstrip("\n"))
        return 1 if message is None else 2
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("on rank ")]
    tell(" ".join(["error:", message, *(f"({note})" for note in notes)]))
    return 2


def check_links() -> None:
    """Checks the symbolic links of a clone.

    Raises:
        ValueError: git wrote a text file instead of a symbolic link, as it does where it may not create links.
    """
    for name in LINKED:
        if not (PACKAGE / name).is_dir():
            raise ValueError(
                f"{PACKAGE / name} is not a folder: git made no symbolic link to {name}/. In the clone, run "
                "`git config core.symlinks true && git checkout -- lightning_danube`, or install the wheel"
            )


def check_text(args: Sequence[str]) -> None:
    """Checks that the arguments are text. The system gives bytes, and Python keeps those that it cannot decode.

    Raises:
        ValueError: an argument is not in the encoding of this locale.
    """
    for number, arg in enumerate(args, start=1):
        try:
            arg.encode()
        except UnicodeEncodeError:
            shown = arg.encode("ascii", "backslashreplace").decode()
            encoding = sys.getfilesystemencoding()
            way_out = "give it in UTF-8" if encoding == "utf-8" else "set the environment variable PYTHONUTF8 to 1"
            raise ValueError(f"argument {number} ({shown[:60]}) is not text in {encoding}: {way_out}") from None


def _dispatch(args: list[str]) -> int:
    check_links()
    check_text(args)
    if not args or args[0] in ("-h", "--help"):
        show(_overview())
        return 0 if args else 2
    verb = args[0]
    if verb == "--version":
        show(importlib.metadata.version("lightning-danube"))
        return 0
    if verb in TRAINER_VERBS and {"-h", "--help"} & set(args):
        from lightning_danube.cli.help import help_of

        show(help_of(verb, args[1:]))
        return 0
    if verb in TRAINER_VERBS:
        if {os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")} == {"0"}:  # one rank speaks for all
            _check_at_once(args[1:], verb)
        from lightning_danube.cli import trainer_verbs as cli

        return cli.main(args)
    if verb in COMMANDS:
        command = importlib.import_module(f"lightning_danube.cli.verbs.{verb}")
        parser = _Parser(prog=f"{as_typed()} {verb}", description=command.__doc__, allow_abbrev=False)
        command.add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        arguments, rest = parser.parse_known_args(args[1:])
        if hasattr(arguments, "overrides"):
            arguments.overrides = rest
            if arguments.config:
                _check_at_once([*(f"--config={config}" for config in arguments.config), *rest])
        elif rest:
            parser.refuse(rest)
        command.run(arguments)
        return 0
    raise ValueError(f"unknown command {verb!r}: {name_meant(verb, [*TRAINER_VERBS, *COMMANDS])}")


def _check_at_once(args: list[str], verb: str | None = None) -> None:
    """Checks what needs neither PyTorch nor Lightning.

    Args:
        args: the command line without the verb.
        verb: the verb, if the trainer runs it.
    """
    from lightning_danube.cli.command_line import check_command_line

    stated = check_command_line(args)
    if verb is None:
        return
    from lightning_danube.cli.configs import check_settings
    from lightning_danube.cli.named_files import check_files

    # A configuration that is only printed may name files of another machine.
    is_printed = any(arg.startswith("--print_config") for arg in args)
    if not is_printed and os.environ.get("SLURM_PROCID", "0") == "0":
        check_files(stated, verb)
    check_settings(stated, verb)


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def refuse(self, arguments: Sequence[str]) -> NoReturn:
        """Reports the unknown arguments, and the option that was probably meant by the first."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        near = nearest_name(arguments[0].partition("=")[0], known)
        self.error(f"unrecognized arguments: {' '.join(arguments)}" + (f": did you mean {near}?" if near else ""))


def _overview() -> str:
    verbs = {**TRAINER_VERBS, **COMMANDS}
    width = max(map(len, verbs))
    lines = [f"usage: {as_typed()} <command> --config NAME [--key value …]", ""]
    lines += [f"  {verb:<{width}}  {what}" for verb, what in verbs.items()]
    lines += [
        "",
        "  <command> --help         all options of a command",
        "  fit --config X --print_config   the whole configuration that would run",
        "  --debug                  show the traceback of an error",
        "",
        f"first steps: {as_typed()} fit --config quickstart",
    ]
    return "\n".join(lines)


def user_message(error: BaseException) -> str | None:
    """Returns one line for a user's mistake; None for a bug of the project, which needs its traceback.

    A ValueError that this project raises itself is a user's mistake by convention. So are an error of the argument
    parser and an error of the file system.
    """
    # Where a file is read, any error becomes "… is damaged". Without memory, the file is not the cause.
    if (short := next(filter(is_out_of_memory, causes(error)), None)) is not None:
        return _out_of_memory(" ".join(str(short).partition("\n")[0].split())[:160] or type(short).__name__)
    if type(error).__name__ == PANIC:
        reason = " ".join(str(error).split())[:160]
        return f"a file of a model or a tokenizer makes its library fail ({reason}): it is damaged, or made to do so"
    if hasattr(error, "user_message"):
        return str(error.user_message)
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename if error.__traceback__ else ""
    if isinstance(error, ValueError) and os.path.realpath(raised_in).startswith(_OURS):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        said = " ".join(str(error.strerror or error).split()) or type(error).__name__
        # A write or a read of an open file, and many libraries, do not say which file it is.
        return f"{_as_asked_for(str(error.filename))}: {said}" if error.filename is not None else f"{said}{_UNNAMED}"
    if (number := refusal_of_disk(error)) is not None:  # of a library in another language
        return f"{os.strerror(number)}{_UNNAMED}"
    # A library that handles a `MemoryError` of its own can fail later with any other error.
    if not has_room(ENOUGH_TO_WORK):
        return _out_of_memory(f"{type(error).__name__}: {' '.join(str(error).split())}"[:160])
    return None


def _out_of_memory(said: str) -> str:
    return f"out of memory ({said}): {_NEEDS_LESS}; `plan` shows what a pre-training run takes"


_UNNAMED = " (the system names no file; --debug shows where)"


def _as_asked_for(path: str) -> str:
    """Returns the path that the user named. A file or directory has a hidden name until it is complete."""
    return re.sub(r"\.([^/\\]+)\.[0-9a-f]{32}\.partial(?=$|[/\\])", r"\1", path)


if __name__ == "__main__":
    sys.exit(main())
