"""When a failed SLURM job goes back into the queue, by programs in place of SLURM's. tests/cluster has a real SLURM."""

import json
import os
from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.requeue import MOST_FAILURES, failed_node, requeue_after_failure

KILLED = """a line of a rank
srun: error: node2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=1.0
srun: error: node1: task 0: Exited with exit code 143
"""


class Job:
    """A job of two nodes in a partition of `nodes`, and the run that it trains."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.shown, self.nodes = (directory / name for name in ("asked", "shown", "nodes"))
        self.runs = directory / "runs" / "tiny"
        self.checkpoints = self.runs / "version_0" / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        programs = directory / "bin"
        programs.mkdir()
        for name, lines in {
            "scontrol": f"""case "$1 $2" in
                "show --oneliner") cat {self.shown};;
                "show hostnames") echo "$3" | tr , '\\n';;
                *) echo "$@" >> {self.asked};;
            esac""",
            "sinfo": f"cat {self.nodes}",
        }.items():
            (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        self.nodes.write_text("node1\nnode2\nnode3\nnode3\n")
        self.show()
        self.start(None)

    def show(self, state: str = "RUNNING", excluded: str = "(null)") -> None:
        self.shown.write_text(f"JobId=7 JobState={state} Partition=all ExcNodeList={excluded} NumNodes=2 NumCPUs=4\n")

    def save(self, step: int) -> str:
        path = self.checkpoints / f"step_{step:08d}.ckpt"
        path.touch()
        return str(path)

    def start(self, checkpoint: str | None) -> None:
        with (self.runs / "version_0" / "history.jsonl").open("a") as file:
            file.write(json.dumps({"step": 0, "checkpoint": checkpoint}) + "\n")

    def fails(self, errors: str = KILLED, code: int = 137) -> str:
        return requeue_after_failure(self.runs, code, errors)

    def requests(self) -> list[str]:
        return self.asked.read_text().splitlines() if self.asked.exists() else []


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def test_a_run_that_has_a_newer_checkpoint_goes_on_without_the_node(job: Job) -> None:
    saved = job.save(5)
    said = "SLURM job 7 requeued after failure 1 of at most 10; node2 has failed, and is left out from now on"
    assert job.fails() == said
    # SLURM refuses the second for a job that is not waiting.
    assert job.requests() == ["requeue 7", "update JobId=7 ExcNodeList=node2"]
    (line,) = (job.runs / "failures_7.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert {key: found[key] for key in ("code", "node", "checkpoint")} == {
        "code": 137,
        "node": "node2",
        "checkpoint": saved,
    }


def test_nodes_that_were_left_out_stay_out_as_long_as_enough_are_there(job: Job) -> None:
    job.save(5)
    job.nodes.write_text("node1\nnode2\nnode3\nnode4\n")
    job.show(excluded="node4")
    job.fails()
    assert job.requests()[-1] == "update JobId=7 ExcNodeList=node4,node2"
    job.save(10)
    job.show(excluded="node4,node2")
    assert job.fails(KILLED.replace("node2", "node3")).endswith(
        "; node3 has failed, and stays: the partition has no other node for it"
    )
    assert job.requests()[2:] == ["requeue 7"]


def test_a_node_that_slurm_does_not_leave_out_is_told(job: Job, tmp_path: Path) -> None:
    job.save(5)
    program = tmp_path / "bin" / "scontrol"
    program.write_text(program.read_text().replace("*) echo", "update*) echo no such list >&2; exit 1;;\n*) echo"))
    assert job.fails().endswith("; node2 has failed, and SLURM does not leave it out: no such list")


def test_without_progress_the_job_ends(job: Job) -> None:
    with pytest.raises(ValueError, match=r"SLURM job 7 is not requeued: its run has no checkpoint under .*tiny yet"):
        job.fails()
    job.start(job.save(5))
    with pytest.raises(ValueError, match=r"has made no progress since .*version_0/checkpoints/step_00000005.ckpt"):
        job.fails()
    job.save(6)
    assert "requeued after failure 3" in job.fails()
    # The next start fails before it has written its line of the history.
    with pytest.raises(ValueError, match=r"has made no progress since .*step_00000006.ckpt"):
        job.fails()
    assert job.requests().count("requeue 7") == 1


def test_the_number_of_failures_is_bounded(job: Job) -> None:
    for failure in range(1, MOST_FAILURES + 1):
        job.save(failure)
        assert f"after failure {failure} of at most 10" in job.fails()
    job.save(100)
    with pytest.raises(ValueError, match="is not requeued: it has failed 11 times"):
        job.fails()


def test_a_job_that_has_ended_or_waits_is_left_alone(job: Job) -> None:
    job.save(5)
    job.show("CANCELLED")
    with pytest.raises(ValueError, match="SLURM job 7 is left alone: SLURM has ended it, and says CANCELLED"):
        job.fails()
    assert job.requests() == [] and not (job.runs / "failures_7.jsonl").exists()


def test_ranks_that_slurm_could_not_start_need_no_progress_and_are_counted(job: Job) -> None:
    errors = "srun: error: Unable to create step for job 1: Invalid generic resource (gres) specification\n"
    job.start(job.save(5))
    for failure in range(1, MOST_FAILURES + 1):
        assert job.fails(errors, code=1) == f"SLURM job 7 requeued after failure {failure} of at most 10"
    with pytest.raises(ValueError, match="is not requeued: it has failed 11 times"):
        job.fails(errors, code=1)


def test_the_signal_of_the_time_limit_is_no_failure(job: Job) -> None:
    assert job.fails(code=138) == "SLURM job 7 requeued"
    assert not (job.runs / "failures_7.jsonl").exists()


def test_the_node_of_the_first_rank_that_has_failed() -> None:
    assert failed_node(KILLED) == "node2"
    assert failed_node(KILLED.replace("Killed", "Exited with exit code 1")) == "node2"
    # It has waited for a rank of another node, or has met a mistake.
    assert failed_node(KILLED.replace("Killed", "Exited with exit code 2")) is None
    assert failed_node("srun: error: node[1-2]: tasks 0-1: Exited with exit code 1\n") is None
    assert failed_node("a rank says srun: error: node9: task 1: Killed\n") is None


def test_the_verb_finds_the_run_of_a_configuration(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("name: tiny\nseed_everything: 3\n")
    (tmp_path / "errors").write_text(KILLED)
    job.save(5)
    command = ["requeue", "--code", "137", "--errors", "errors", "--config", "a.yaml", "--trainer.devices", "2"]
    assert main([*command, "--name", "other"]) == 2
    assert "has no checkpoint under runs/other yet" in capsys.readouterr().err
    assert main(command) == 0
    assert "SLURM job 7 requeued after failure 1 of at most 10; node2" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert main(command) == 2
    assert "requeue is for the batch script of a SLURM job, and SLURM_JOB_ID names none" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ['{"ti', "[" * 100_000, "[1]", "\x00", "9" * 5000])
def test_a_damaged_line_on_record_costs_no_place_in_the_queue(job: Job, damage: str) -> None:
    job.save(5)
    record, history = job.runs / "failures_7.jsonl", job.runs / "version_0" / "history.jsonl"
    for file in (record, history):
        with file.open("a") as lines:
            lines.write('{"checkpoint": "another"}\n' + damage)
    assert "requeued after failure 2 of at most 10" in job.fails()
    job.save(6)
    assert "requeued after failure 3 of at most 10" in job.fails()
    with pytest.raises(ValueError, match="its run has made no progress"):
        job.fails()


def test_the_errors_of_srun_are_a_regular_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe would never end."""
    os.mkfifo(tmp_path / "pipe")
    config = tmp_path / "run.yaml"
    config.write_text(f"name: tiny\nruns: {tmp_path}\n")
    assert main(["requeue", "--config", str(config), "--code", "1", "--errors", str(tmp_path / "pipe")]) == 2
    assert f"{tmp_path}/pipe: not a regular file" in capsys.readouterr().err
