"""Compares `plan`'s memory with that of the whole process of a run on a CPU.

    python benchmarks/plan_process.py

`plan` counts tensors. A process also holds the libraries that it has imported, the files that it has mapped, and what
kernels and the allocator keep. "imports" is the peak of a process that only imports what `fit` imports. "process" is
the peak of one that trains the quickstart for a few steps, with 8 rows at once and with more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from machine import described, write_result
from paper_run import planned_of

ROWS = (8, 32, 64)
STEPS = 4
CONTEXT = 256


def main() -> None:
    imports = peak_of(["-c", "import lightning_danube.cli.trainer_verbs, lightning_danube.pretraining"])
    lines = [
        described("torch", "lightning"),
        "",
        "| rows at once | planned MiB | imports | process | process without plan and imports |",
        "|---|---|---|---|---|",
    ]
    for rows in ROWS:
        options = ["--config", "quickstart", "--trainer.accelerator", "cpu"]
        options += ["--data.init_args.batch_tokens", str(rows * CONTEXT)]
        options += ["--data.init_args.micro_batch_size", str(rows)]
        verb = [sys.executable, "-m", "lightning_danube"]
        said = subprocess.run([*verb, "plan", *options], check=True, capture_output=True, text=True).stdout
        plan = planned_of(said)
        assert plan is not None, said
        plan *= 1024
        with tempfile.TemporaryDirectory() as runs:
            steps = ["--trainer.max_steps", str(STEPS), "--runs", runs]
            process = peak_of(["-m", "lightning_danube", "fit", *options, *steps])
        lines.append(f"| {rows} | {plan:,.1f} | {imports:,.0f} | {process:,.0f} | {process - plan - imports:,.0f} |")
        print(lines[-1], flush=True)
    write_result("plan-process", "\n".join(lines))


def peak_of(arguments: Sequence[str]) -> float:
    """Returns the most resident MiB of a Python process."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    if code:
        raise SystemExit(f"{' '.join(arguments)} ended with {os.waitstatus_to_exitcode(code)}")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
