"""A pool has the processes that it was asked for, each of which is prepared."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_danube.text.worker_pool import WorkerPool


def test_work_is_done_by_as_many_processes_as_asked_for() -> None:
    # A process takes a tenth of a second to start, so no call ends before all are submitted.
    with WorkerPool(2, gc.disable) as pool:
        calls = [pool.submit(os.getpid) for _ in range(2)]
        prepared = pool.submit(gc.isenabled)
        pids = {call.result() for call in calls}
        known = set(pool._processes)
        assert not prepared.result()
    assert len(known) == 2 and pids <= known and os.getpid() not in known


KILLED = """
import os, signal, time
from lightning_danube.text.worker_pool import WorkerPool

if __name__ == "__main__":
    pool = WorkerPool(1)
    pool.submit(time.sleep, 0.01).result()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_process_leaves_no_warning_of_semaphores(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("PYTHONWARNINGS", None)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    # The tracker of multiprocessing has ended, too: it holds the output open.
    assert (run.returncode, run.stdout) == (-signal.SIGKILL, "")
