"""How the files of a source are dealt to tasks. What the tasks make: test_datatrove_engine.py."""

import sys

import pytest

from lightning_danube.tokens.engines.source_work import Cluster, dealt


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
