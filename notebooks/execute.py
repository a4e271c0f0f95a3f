"""Executes notebooks in place, all or those that are named:

    python notebooks/execute.py [notebooks/lora.ipynb …]

One that can not be executed, for lack of a run that it reads, stays as it was and is named at the end, and the others
are executed all the same. Times of execution are not written down, so that equal results make equal files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def main(names: list[str]) -> int:
    left = []
    for path in [Path(name) for name in names] or sorted(Path(__file__).parent.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        # The kernel would warn that what it is sent is not encrypted; it does not leave this machine.
        quiet = ["--IPKernelApp.log_level=ERROR"]
        try:
            NotebookClient(
                notebook, timeout=600, record_timing=False, resources=resources, extra_arguments=quiet
            ).execute()
        except CellExecutionError as error:
            left.append(f"{path}: stays as it was: {error.ename}: {error.evalue}")
            continue
        nbformat.write(notebook, path)
        missing = {
            output.evalue
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if output.output_type == "error"
        }
        print("\n  ".join([f"{path}: executed", *sorted(missing)]), flush=True)
    print("".join(f"{line}\n" for line in left), end="", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
