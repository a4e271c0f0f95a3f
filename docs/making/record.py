"""Keeps a run of the quickstart in benchmarks/results/quickstart, from which the pages are filled.

    make quickstart 2>&1 | tee output.txt
    python docs/making/record.py runs/quickstart/version_0 output.txt

Run both on idle cores. `make fill` writes the tables and outputs of the pages anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lightning_danube.reports.runs import read_run  # noqa: E402
from lightning_danube.training.history import machine  # noqa: E402

KEPT = ROOT / "benchmarks" / "results" / "quickstart"
CURVES = ("held_out/", "mix/", "tokens_seen/")
"""First parts of the names of the curves that are kept: the picture shows them."""
FLAGS = {"avx512_bf16": "AVX-512 with bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Flag of an x86 processor → what the pages call it, the widest first."""


def instructions() -> str:
    """Returns the widest vectors of this processor, empty if it is no x86 processor on Linux."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return ""
    return next((f", {title}" for flag, title in FLAGS.items() if flag in flags), "")


def record(run: Path, output: Path) -> None:
    recorded = read_run(run)
    KEPT.mkdir(exist_ok=True)
    for name in ("config.yaml", "history.jsonl", "summary.json"):
        shutil.copyfile(run / name, KEPT / name)
    curves = recorded.curves[[tag for tag in recorded.curves if tag.startswith(CURVES)]].dropna(how="all")
    curves.to_csv(KEPT / "metrics.csv", float_format="%.6g")
    (KEPT / "output.txt").write_text(output.read_text(encoding="utf-8"), encoding="utf-8")
    session = json.loads((run / "history.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    versions = ", ".join(f"{name} {session['versions'][name]}" for name in ("python", "torch", "lightning"))
    where = f"{session['time'][:10]}, commit {session['commit'][:7]}, {machine()}{instructions()}, {versions}"
    (KEPT / "machine.txt").write_text(f"{where}\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("output", type=Path, help="file with what the run printed")
    arguments = parser.parse_args()
    record(arguments.run, arguments.output)
