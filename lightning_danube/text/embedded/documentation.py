"""A pre-training corpus without a network: the documentation in the installed Python packages.

The docstrings and READMEs of a fixed list of distributions (`docstrings.DISTRIBUTIONS`) and of the standard library are
collected into five sources, one for each source of the paper. They are English about programming. None of the text is
from the web, from Wikipedia, from papers, from a language model or from people who wrote instructions.

* `web`: the docstrings that `academic` does not take, and the READMEs of the distributions.
* `wiki`: the reference topics of the Python language (`pydoc_data`) and the docstrings of the standard library.
* `academic`: the docstrings of the packages and modules in `docstrings.ACADEMIC`: numerics, algebra, graphs, metrics.
* `synthetic`: passages about modules, as in a textbook. Templates make them from signatures and first sentences. In the
  paper, a language model wrote this part.
* `instruct`: questions and answers that templates make from the same material, as plain text.

The first three sources hold prose: `prose.py` removes markup, code, tables and formulas. They take docstrings of more
than one sentence, of which at least `docstrings.SHORTEST` characters are prose. The last two see only first sentences
and signatures. A hash of a module's name decides which of the two gets the module. No text is in two sources.

Packages are read, never imported. The same versions give the same bytes, for any number of processes.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_danube.files import new_folder
from lightning_danube.terminal import tell
from lightning_danube.text.embedded.docstrings import (
    FORMAT,
    CollectedDocument,
    Environment,
    Module,
    Reading,
    Seen,
    SourceFile,
    collected_documents,
    read_all,
    readmes,
    role_of,
)
from lightning_danube.text.embedded.made_text import facts_about_module, passages_about, pick, questions_about
from lightning_danube.text.worker_pool import WorkerPool

_PROCESSES_WORTH_STARTING = 16
_FILES_PER_CHUNK = 16

ROLES = ("web", "wiki", "academic", "synthetic", "instruct")


def collect_documentation(cache_dir: Path, *, processes: int | None = None, progress: bool = True) -> dict[str, Path]:
    """Collects the documentation of the running environment. Returns role → JSONL file of {"text", "origin"} rows.

    The documentation is collected once per combination of versions of Python and the distributions. The files and a
    `manifest.json` are kept in `cache_dir`.

    Args:
        cache_dir: folder for the files, made if missing.
        processes: number of processes that read files, by default one per core. They are spawned, so a script that
            calls this needs the usual `if __name__ == "__main__"`, unless it asks for one process.
        progress: whether to report progress on stderr.

    Raises:
        ValueError: a source would be empty, because the interpreter has no sources or no documentation.
    """
    return _collect(Environment.running(), cache_dir, processes=processes, progress=progress)


def is_collected(cache_dir: Path) -> bool:
    """Returns whether the documentation is collected already, so `collect_documentation` would return at once."""
    folder = cache_dir / f"documentation-{Environment.running().fingerprint()}"
    return _is_complete({role: folder / f"{role}.jsonl" for role in ROLES})


def _collect(environment: Environment, cache_dir: Path, *, processes: int | None, progress: bool) -> dict[str, Path]:
    fingerprint = environment.fingerprint()
    folder = cache_dir / f"documentation-{fingerprint}"
    files = {role: folder / f"{role}.jsonl" for role in ROLES}
    if _is_complete(files):
        return files

    start = time.monotonic()
    lively = progress and sys.stderr.isatty()
    if progress and not lively:
        tell("Collecting text from the installed packages (once for their versions) ...")
    sources = environment.sources()
    readings = read_sources(sources, processes, lively)
    documents, manifest = collected_sources(environment, readings)
    for role in ROLES:
        if not documents[role]:
            raise ValueError(
                f"no documentation was found for the source {role!r} under {', '.join(map(str, environment.packages))} "
                f"and {environment.stdlib}: install the dependencies there as source files, or use data of your own"
            )
    manifest = {"format": FORMAT, "fingerprint": fingerprint, "python": platform.python_version(), **manifest}
    _write(folder, files, documents, manifest)
    if progress:
        counts = ", ".join(f"{role} {len(documents[role]):,}" for role in ROLES)
        tell(f"Collected documents: {counts}, in {time.monotonic() - start:.0f} s.")
    return files


def read_sources(sources: Sequence[SourceFile], processes: int | None, lively: bool) -> list[Reading]:
    """Reads all files. Returns the results in the order of `sources`.

    Raises:
        ValueError: another program ended a process.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes}: give at least 1, or None for one per core")
    # Neighbours are alike (large files of one package), so each chunk takes files from the whole list.
    n_chunks = max(1, -(-len(sources) // _FILES_PER_CHUNK))
    chunks = [sources[number::n_chunks] for number in range(n_chunks)]
    processes = min(processes or min(os.cpu_count() or 1, _PROCESSES_WORTH_STARTING), n_chunks)
    readings: list[Reading] = [""] * len(sources)
    with tqdm(total=len(sources), desc="Collecting text", unit=" files", disable=not lively, leave=False) as bar:

        def keep(results: Iterable[list[Reading]]) -> None:
            for number, result in enumerate(results):
                readings[number::n_chunks] = result
                bar.update(len(result))

        if processes == 1:
            keep(map(read_all, chunks))
            return readings
        try:
            # Syntax trees have no cycles, and the search for cycles would take a fifth of the time.
            with WorkerPool(processes, gc.disable) as pool:
                keep(pool.map(read_all, chunks))
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that collects text was ended from outside (is memory short?): run the command again"
            ) from error
    return readings


def collected_sources(
    environment: Environment, readings: Sequence[Reading]
) -> tuple[dict[str, list[CollectedDocument]], dict[str, Any]]:
    """Returns the documents of every role, and their part of the manifest."""
    modules = [reading for reading in readings if isinstance(reading, Module)]
    skipped = Counter(reading for reading in readings if isinstance(reading, str))
    documents: dict[str, list[CollectedDocument]] = {role: [] for role in ROLES}

    # A repeated text stays in the source that is read first: "wiki", then "academic", then "web". Within a role, topics
    # come before docstrings.
    seen = Seen()
    for role in ("wiki", "academic", "web"):
        if role == "web":
            documents[role] += [document for document in readmes(environment) if not seen.repeats(document.text)]
        for module in sorted((m for m in modules if role_of(m) == role), key=lambda m: not m.topics):
            documents[role] += collected_documents(module, seen)

    used: set[bytes] = set()
    for module in modules:
        facts = facts_about_module(module, used)
        if facts:
            role = pick(("synthetic", "instruct"), module.name)
            documents[role] += passages_about(facts) if role == "synthetic" else questions_about(facts)

    counts = {
        role: {
            "documents": len(documents[role]),
            "characters": sum(len(document.text) for document in documents[role]),
            "packages": len({document.package for document in documents[role]}),
        }
        for role in ROLES
    }
    manifest = {
        "sources": counts,
        "files": {"found": len(readings), "read": len(modules), "skipped": dict(sorted(skipped.items()))},
        "repetitions_dropped": {"exact": seen.exact, "near": seen.near},
        "distributions": [
            f"{distribution.name}=={distribution.version}" for distribution in environment.distributions()
        ],
    }
    return documents, manifest


def _write(
    folder: Path, files: dict[str, Path], documents: dict[str, list[CollectedDocument]], manifest: dict[str, Any]
) -> None:
    # A folder that was complete may have lost a file.
    with new_folder(folder, replace=folder.is_dir() and not _is_complete(files)) as partial:
        for role, file in files.items():
            with open(partial / file.name, "w", encoding="utf-8", newline="\n") as stream:
                for document in documents[role]:
                    row = {"text": document.text, "origin": f"{document.package}:{document.origin}"}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        with open(partial / "manifest.json", "w", encoding="utf-8", newline="\n") as stream:
            stream.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _is_complete(files: dict[str, Path]) -> bool:
    return all(file.is_file() for file in files.values())
