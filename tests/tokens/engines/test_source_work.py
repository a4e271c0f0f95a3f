"""How the files of a source are dealt to tasks. What the tasks make: test_datatrove_engine.py."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.text.reading import DamagedFile
from lightning_danube.tokens.engines.source_work import Cluster, SourceWork, dealt


@pytest.mark.parametrize(("files", "tasks"), [(1, 1), (7, 7), (7, 3), (10, 4), (1000, 7)])
def test_files_are_dealt_in_order_and_evenly(files: int, tasks: int) -> None:
    names = [f"{number:04d}" for number in range(files)]
    blocks = dealt(names, tasks)
    assert [name for block in blocks for name in block] == names
    sizes = list(map(len, blocks))
    assert len(blocks) == tasks and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_ray_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--executor ray needs ray, which is not installed; type: .*\[ray\]'"):
        Cluster("ray")


def test_the_refusal_of_a_task_is_raised_once(tmp_path: Path) -> None:
    job: Any = None  # a refusal needs none
    work = SourceWork(tmp_path, tmp_path, "books", "x", [["a"], ["b"], ["c"]], 0.0, job, {})
    work.raise_refusal()
    for task, error in ((2, ValueError("the second")), (1, DamagedFile("the first"))):
        with pytest.raises(type(error), match=str(error)), work.keeping_refusal(task):
            raise error
    with pytest.raises(DamagedFile, match="the first"):
        work.raise_refusal()
    work.raise_refusal()
    with pytest.raises(ValueError, match="out of reach"), work.keeping_refusal(0):
        raise ValueError("out of reach")
    with pytest.raises(ValueError, match="out of reach") as raised:
        work.raise_refusal()
    assert not isinstance(raised.value, DamagedFile)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 0}, "--tasks is 0: give 1 to 50,000"),
        ({"tasks": 50_001}, "--tasks is 50001: give 1 to 50,000"),
        ({"where": "slurm", "slurm": {"partition": "p"}}, "--executor slurm needs --slurm time=…"),
        (
            {"where": "slurm", "slurm": {"partition": "p", "time": "1:00", "array": "1-3"}},
            "--slurm array=1-3: prepare sets this option itself",
        ),
    ],
)
def test_options_of_a_cluster_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Cluster(**options)
