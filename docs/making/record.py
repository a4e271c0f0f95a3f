"""Keeps a run of the quickstart as the source of every number and picture that pages give of it.

    make quickstart 2>&1 | tee quickstart.log
    python docs/making/record.py runs/quickstart/version_0 quickstart.log --note 'beside other work'
    python docs/making/fill.py && python docs/making/picture.py

results/quickstart then holds the printed output, the curves of the held-out loss and of the mix, and the run's
`summary.json`, `config.yaml` and `history.jsonl`. lightning_danube.reports reads the folder as it reads a run. Type the
command on the machine that trained, because `machine.txt` names the machine of the command.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import described  # noqa: E402

from lightning_danube.files import read_json_lines, write_text  # noqa: E402
from lightning_danube.reports.runs import read_run  # noqa: E402

FOLDER = ROOT / "benchmarks" / "results" / "quickstart"


def printed(log: str) -> str:
    """Returns what `fit` printed, from its first line to its last, without the installation before it.

    Raises:
        ValueError: the log does not hold a whole run.
    """
    found = re.search(r"^precision .*?^ +\S*tensorboard --logdir \S+$", log, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("the log does not hold a whole run, from the line `precision` to the line of TensorBoard")
    return found[0] + "\n"


def machine_of(run: Path) -> str:
    """Returns this machine and its versions as one line, with the day and the commit of the run's last session."""
    session = read_json_lines(run / "history.jsonl")[-1]
    _, _, rest = described("torch", "lightning").split(", ", 2)
    return f"{session['time'][:10]}, commit {session['commit'][:7]}, {rest}"


def keep(run: Path, log: Path, note: str = "") -> None:
    """Writes the folder of the record anew.

    Args:
        note: what else a reader must know of the measurement, such as other work on the machine.
    """
    output = printed(log.read_text(encoding="utf-8"))
    curves = read_run(run).curves
    shown = [tag for tag in curves if tag.startswith(("held_out/", "mix/", "tokens_seen/"))]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "config.yaml", "history.jsonl"):
        shutil.copyfile(run / name, FOLDER / name)
    write_text(FOLDER / "output.txt", output)
    write_text(FOLDER / "metrics.csv", curves[shown].dropna(how="all").round(5).to_csv())
    write_text(FOLDER / "machine.txt", ", ".join(filter(None, [machine_of(run), note])) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("log", type=Path, help="what `make quickstart` printed")
    parser.add_argument("--note", default="", help="such as 'beside other work'")
    arguments = parser.parse_args()
    keep(arguments.run, arguments.log, arguments.note)


if __name__ == "__main__":
    main()
