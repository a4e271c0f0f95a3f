"""What finding duplicates takes: CPU time a document and memory, over made-up hashes and sketches.

python benchmarks/duplicates.py
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import numpy as np

from lightning_danube.text.duplicates import drop_exact, drop_near

HASHES, TEXTS, SKETCHES = 10_000_000, 20_000_000, 40_000


def peak_mebibytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


def main() -> None:
    draw = np.random.default_rng(0)
    texts = draw.integers(0, 1 << 64, TEXTS, dtype=np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        keep, before, began = np.ones(HASHES, dtype=bool), peak_mebibytes(), time.process_time()
        parts = (texts[draw.integers(0, TEXTS, 50_000)] for _ in range(HASHES // 50_000))
        dropped, seconds = drop_exact(keep, parts, Path(folder)), time.process_time() - began
        print(f"exact: {HASHES:,} documents, {dropped:,} copies, {seconds / HASHES * 1e6:.2f} µs of CPU a document,")
        print(f"{peak_mebibytes() - before:,} MiB above the start")
        sketches = draw.integers(0, 1 << 32, (SKETCHES, 128), dtype=np.uint32)
        changed = draw.choice(SKETCHES, SKETCHES // 5, replace=False)
        sketches[changed] = sketches[changed * 7 % SKETCHES]
        sketches[changed, draw.integers(0, 128, len(changed))] += 1
        keep, began = np.ones(SKETCHES, dtype=bool), time.process_time()
        dropped = drop_near(keep, lambda: np.array_split(sketches, 20), Path(folder))
        seconds = time.process_time() - began
        print(
            f"near: {SKETCHES:,} documents, {dropped:,} near-duplicates, {seconds / SKETCHES * 1e6:.1f} µs of CPU each"
        )


if __name__ == "__main__":
    main()
