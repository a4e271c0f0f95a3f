"""Nothing is left of a test that was killed."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.cluster.reaper import marked
from tests.cluster.slurm import ROOT, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")

PROGRAM = """
import os, pathlib, subprocess, sys, time
from tests.cluster.reaper import reaper

watch = reaper(sys.argv[1], pathlib.Path(sys.argv[2]))
name, value = sys.argv[1].split("=")
subprocess.Popen(["sleep", "600"], env={**os.environ, name: value}, start_new_session=True)
if sys.argv[3] == "ends":
    watch.communicate()
    sys.exit()
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_a_daemon_ends_with_the_process_of_its_test(tmp_path: Path, how: str) -> None:
    """Also if that process is killed, and says nothing to anybody."""
    mark, files = f"REAPER_TEST={uuid.uuid4().hex}", tmp_path / "files"
    files.mkdir()
    command = [sys.executable, "-S", "-c", PROGRAM, mark, str(files), how]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    ) as one:
        assert one.stdout is not None
        if how == "killed":
            assert one.stdout.readline() == b"started\n"
            assert len(list(marked(mark))) == 1
            one.send_signal(signal.SIGKILL)
        wait_until(lambda: not files.exists(), "the end of the reaper", 60)
    assert not list(marked(mark))
