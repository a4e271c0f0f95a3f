"""`prepare --engine datatrove --executor ray` on a real Ray: its workers make the shards that one machine makes."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.reaper import kill_marked, marked, reaper
from tests.cluster.slurm import ROOT, free_ports, wait_until

pytestmark = pytest.mark.ray

CONFIG = """
data:
  class_path: lightning_danube.pretraining.CurriculumData
  init_args:
    tokenizer: danube-small
    context_length: 32
    batch_tokens: 256
    held_out: 0.1
    deduplicate: {duplicates}
    sources: {{web: {{path: texts}}}}
    stages: [{{name: all, tokens: 1K, mix: {{web: 1}}}}]
"""
# Ray gives the agents of a node 15 s for their imports, which a busy machine needs longer for. So they go first.
FIRST = """
import contextlib, os
with contextlib.suppress(PermissionError):
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
"""
MARK = "RAY_TEST_CLUSTER"


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Returns the environment of programs that use the cluster. It is started in another directory than they are."""
    # Not in pytest's directory: the path of a Unix socket has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    (port,) = free_ports(1)
    mark = f"{MARK}={uuid.uuid4().hex}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    watch = reaper(mark, directory)
    try:
        options = ["--head", "--num-cpus=2", f"--port={port}", "--include-dashboard=false", f"--temp-dir={directory}"]
        options += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--include-log-monitor=false"]
        program = f"{FIRST}from ray.scripts.scripts import main; main()"
        started = subprocess.run(
            [sys.executable, "-c", program, "start", *options],
            cwd=directory, env={**environment, MARK: mark.partition("=")[2]}, capture_output=True, text=True,
        )  # fmt: skip
        assert started.returncode == 0, started.stderr
        for process in marked(mark):
            for thread in Path(f"/proc/{process}/task").iterdir():
                with suppress(ProcessLookupError):
                    os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}", "MARK": mark}
    finally:
        kill_marked(mark)
        watch.communicate()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Three files, so three tasks. The last one holds copies."""
    numbers = [[*range(file, 400, 3), *(range(50) if file == 2 else ())] for file in range(3)]
    texts = [[f"text {n}: the river passes the town {n * n} times" for n in file] for file in numbers]
    return written(tmp_path, texts, "exact")


def written(directory: Path, files: list[list[str]], duplicates: str) -> Path:
    """Writes texts and a configuration that names them by a relative path. Returns the configuration."""
    (directory / "texts").mkdir()
    for number, texts in enumerate(files):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / "texts" / f"{number}.jsonl").write_text(rows)
    (directory / "run.yaml").write_text(CONFIG.format(duplicates=duplicates))
    return directory / "run.yaml"


def prepare(config: Path, cache: str, environment: dict[str, str], *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "lightning_danube", "prepare", "--config", config.name, "--engine", "datatrove"]
    return subprocess.Popen(
        [*command, "--data.init_args.cache_dir", cache, *options],
        cwd=config.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def shards(config: Path, cache: str) -> dict[str, bytes]:
    (directory,) = (config.parent / cache / "shards").glob("web-*")
    found = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".arrow", ".npy")}
    assert len(found) == 8, found.keys()
    return found


def duplicates(config: Path, cache: str) -> int:
    (report,) = (config.parent / cache / "shards").glob("web-*/report.json")
    return sum(json.loads(report.read_text())["duplicates"].values())


def working(mark: str) -> list[int]:
    """Returns the workers that have a task."""
    found = []
    for process in marked(mark):
        with suppress(OSError):
            if b"run_for_rank" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


def test_a_worker_that_is_killed_costs_no_document(cluster: dict[str, str], config: Path) -> None:
    """Two workers at once. Ray starts another one for the task of the worker that was killed."""
    command = prepare(config, "ray", cluster, "--executor", "ray", "--processes", "2")
    workers = wait_until(lambda: working(cluster["MARK"]) or command.poll() is not None, "a worker with a task")
    assert workers is not True, command.communicate()[0]
    os.kill(workers[0], signal.SIGKILL)
    said = command.communicate()[0]
    assert command.returncode == 0 and "web: write: 3 took" in said, said
    assert duplicates(config, "ray") == 50
    here = prepare(config, "here", cluster, "--processes", "1")
    assert here.communicate() and here.returncode == 0
    assert shards(config, "ray") == shards(config, "here")


def test_near_duplicates_are_those_of_the_local_executor(cluster: dict[str, str], tmp_path: Path) -> None:
    """The stages between reading and writing exchange files, which workers in another directory have to find."""
    choose = random.Random(0)
    texts = [" ".join(str(choose.randrange(10**6)) for _ in range(40)) for _ in range(90)]
    # A copy shares 35 of 37 shingles with its text. So with a probability below 1e-6 no band of their sketches agrees.
    copies = [text.rsplit(" ", 1)[0] + " end" for text in texts[:20]]
    config = written(tmp_path, [texts[:30], texts[30:60], copies + texts[60:]], "near")
    command = prepare(config, "ray", cluster, "--executor", "ray", "--processes", "2")
    said = command.communicate()[0]
    assert command.returncode == 0 and "web: clusters: 1 took" in said, said
    assert duplicates(config, "ray") == 20
    here = prepare(config, "here", cluster, "--processes", "1")
    assert here.communicate() and here.returncode == 0
    assert shards(config, "ray") == shards(config, "here")


def test_a_damaged_row_is_one_line(cluster: dict[str, str], config: Path) -> None:
    with (config.parent / "texts" / "1.jsonl").open("a") as file:
        file.write("{\n")
    command = prepare(config, "ray", cluster, "--executor", "ray")
    said = command.communicate()[0]
    assert command.returncode == 2, said
    assert "error: texts/1.jsonl, row 134: " in said.splitlines()[-1]
    assert not list((config.parent / "ray" / "shards").glob("web-*"))
