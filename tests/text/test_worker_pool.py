"""A pool has the processes that it was asked for, each of which is prepared."""

import gc
import os

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
