"""`report`: writes one HTML page about a run, or about several runs side by side.

The page needs no network: pictures and styles are in the file. It takes runs of every task.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lightning_danube.checkpoints.runs import versions_of
from lightning_danube.terminal import name_meant, show


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="directory of a run, or of a name (then its newest version)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the page (report.html in the directory of the run; here for several runs)"
    )


def run(arguments: Namespace) -> None:
    directories = [_directory(text) for text in arguments.runs]

    from lightning_danube.extras import need

    need("notebooks", "report")
    from lightning_danube.files import write_text
    from lightning_danube.reports.run_page import page_of_runs
    from lightning_danube.reports.runs import read_run_of_any_task

    found = [read_run_of_any_task(directory) for directory in directories]
    output = Path(arguments.output or (directories[0] / "report.html" if len(found) == 1 else "report.html"))
    write_text(output, page_of_runs(found))
    show(f"written: {output}")


def _directory(text: str) -> Path:
    """Returns the directory of a run: the one that is named, or the newest version below it.

    Raises:
        ValueError: there is no run.
    """
    path = Path(text).expanduser()
    if path.is_file() and path.name == "config.yaml":
        path = path.parent
    if (path / "config.yaml").is_file():
        return path
    if not path.is_dir():
        near = [str(one) for one in sorted(path.parent.glob("*/"))]
        hint = f": {name_meant(text, near)}" if near else ""
        raise ValueError(f"there is no run {text}{hint}")
    versions = [one for one in versions_of(path) if (one / "config.yaml").is_file()]
    if not versions:
        raise ValueError(f"{text} is not a run: neither it nor a version_<n> in it has a config.yaml")
    return versions[0]
