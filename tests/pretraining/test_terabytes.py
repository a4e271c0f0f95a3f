"""A run over terabytes: it opens only what it reads. The shards are sparse files, whose tokens are all 0."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.shard_files import write_sparse_shards
from lightning_danube.pretraining.curriculum import Stage
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.text.corpora import Source
from lightning_danube.tokens import token_sequence
from tests.conftest import write_tiny
from tests.token_files import noting

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were opened, in order."""
    names: list[str] = []
    real = token_sequence._opened
    monkeypatch.setattr(token_sequence, "_opened", noting(real, lambda path: names.append(path.name)))
    return names


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    sizes: list[int] = []
    read = token_sequence.OpenFiles.read

    def counted(self: Any, path: Path, begin: int, end: int) -> Any:
        sizes.append(end - begin)
        return read(self, path, begin, end)

    monkeypatch.setattr(token_sequence.OpenFiles, "read", counted)
    return lambda: sum(sizes)


def data_of(directory: Path) -> CurriculumData:
    return CurriculumData(
        sources={"web": Source(str(directory))},
        stages=[Stage("all", 64_000, {"web": 1})],
        context_length=64,
        batch_tokens=640,
        micro_batch_size=5,
        validation_rows=4,
        tokenizer="danube-small",
    )


def test_a_rank_opens_the_files_of_its_rows_and_no_others(
    tmp_path: Path, opened: list[str], bytes_read: Callable[[], int]
) -> None:
    shards = write_sparse_shards(tmp_path / "web", {"train": 200, "validation": 20}, 1 << 32, 1 << 30)
    data = data_of(shards)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_streams["web"]) == 200 << 32 and not opened and not bytes_read()
    losses = data.unigram_losses()
    # All tokens are the same one, and each id of the vocabulary counts once more.
    assert losses["web"] == pytest.approx(np.log1p((data.vocab_size - 1) / ((200 << 32) + 1)), abs=1e-12)
    assert opened == ["validation-00000.arrow"] and bytes_read() == 4 * 64 * 2
    batch = next(iter(data.train_dataloader()))
    expected = {f"train-{key.row * 64 >> 32:05d}.arrow" for key in batch["keys"]}
    assert batch["input_ids"].shape == (5, 64)
    assert set(opened[1:]) == expected and len(opened) == 1 + len(expected)
    assert bytes_read() == 4 * 64 * 2 + 5 * 65 * 2


def test_shards_without_a_file_are_refused_before_the_run(tmp_path: Path, opened: list[str]) -> None:
    shards = write_sparse_shards(tmp_path / "web", {"train": 3, "validation": 1}, 1 << 20, 1 << 20)
    (shards / "train-00001.arrow").unlink()
    data = data_of(shards)
    with pytest.raises(ValueError, match=r"train-00001\.arrow is missing: delete"):
        data.prepare_data()
    data.setup("fit")  # a rank that does not check opens no file
    assert not opened
    assert data.prepare_data_per_node  # so Lightning lets one process of each node check


@pytest.mark.medium
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_over_12_terabytes_starts_in_less_than_a_gibibyte(tmp_path: Path) -> None:
    """Two steps of `fit` over 1,500 files of 8 GiB, with a checkpoint. Prints its seconds, asserts its memory.

    The libraries of a PyTorch for CUDA take about 400 MiB beside it.
    """
    run = write_tiny(tmp_path) / "tiny.yaml"
    text = run.read_text()
    for name in ("web", "wiki"):
        write_sparse_shards(tmp_path / name, {"train": 744, "validation": 6}, 1 << 32)
        text = text.replace(f"{tmp_path}/{name}.jsonl", f"{tmp_path}/{name}")
    run.write_text(text)
    watched = (
        "import re, sys, time; from lightning_danube.__main__ import main; began = time.monotonic();"
        "code = main(sys.argv[1:]); seconds = time.monotonic() - began;"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10;"
        "print(f'seconds {seconds:.1f} of the processor {time.process_time():.1f} MiB {peak}');"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched, "fit", "--config", str(run), "--trainer.max_steps", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"seconds \S+ of the processor \S+ MiB (\d+)", done.stdout)
    assert found is not None, done.stdout
    print(found[0])
    assert int(found[1]) < (1024 if torch.version.cuda is None else 1024 + 512)
