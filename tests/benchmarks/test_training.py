"""The benchmark of training: its table by hand, and a contestant at a tiny shape."""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def training(benchmarks_on_path: None) -> Any:
    import training

    return training


def test_the_table_is_of_medians_and_their_ratios(training: Any) -> None:
    def rounds(*seconds: float) -> list[dict[str, Any]]:
        common = {"ceiling": 1e9, "peak": 2**30, "first_cpu": 5.0, "first_wall": 9.0}
        return [{"cpu": [s, s, 99.0], "wall": [2 * s, 2 * s, 2 * s], **common} for s in seconds]

    lines = training.speed_table(
        {"danube": rounds(0.5, 1.0, 0.25), "other": rounds(1.0, 1.5, 1.0)}, Namespace(shape="tiny", device="cpu")
    )
    ours, other = lines[-1].splitlines()[-2:]
    flops = training.SHAPES["tiny"].flops
    # 16 tokens a step. Ratios of the rounds: 2, 1.5, 4.
    assert ours == f"| danube | 32 | 16 to 64 | 16 | 1.00 | {100 * flops / 0.5 / 1e9:.0f} % | 1,024 | 5 | 9 |"
    assert other.startswith("| other | 16 | 11 to 16 | 8 | 2.00 |")


def test_flops_of_a_step(training: Any) -> None:
    # By hand; norms are counted as if they multiplied, as everywhere.
    layers = 8 * (2 * 384 * 384 + 2 * 384 * 128 + 3 * 384 * 1024 + 2 * 384) + 384
    a_token = 6 * (layers + 32000 * 384) + 12 * 8 * 384 * 512
    assert training.SHAPES["small"].flops == 4096 * a_token


@pytest.mark.slow
@pytest.mark.parametrize("contestant", ["danube", "danube, plain loop", "transformers", "transformers, plain loop"])
def test_a_contestant_measures_its_steps(contestant: str, tmp_path: Path) -> None:
    options = ["--contestant", contestant, "--shape", "tiny", "--precision", "bf16", "--steps", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)]),
        "LIGHTNING_DANUBE_CACHE": str(tmp_path / "cache"),
        "STARTED": "0",
    }
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "training.py"), *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("measured: "))
    result = json.loads(line.removeprefix("measured: "))
    assert len(result["cpu"]) == len(result["wall"]) == 2 and min(result["cpu"]) > 0
    assert result["peak"] > 2**20
    # Every contestant has the vocabulary of 32,000, and random weights. The Trainer does not tell its loss.
    assert contestant == "transformers" or abs(result["loss"] - math.log(32000)) < 0.3
