"""A logger that cannot stop a run, and what it adds to the values."""

import csv
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event

from lightning_danube.training.trackers import kept as module
from lightning_danube.training.trackers.kept import KeptLogger, count_tokens, kept


class Server(Logger):
    """A tracker that counts its requests, and is down from one of them on."""

    def __init__(self, down_from: int = 1000) -> None:
        super().__init__()
        self.asked: list[Any] = []
        self.down_from = down_from

    def _ask(self, *what: Any) -> Any:
        self.asked.append(what)
        if len(self.asked) > self.down_from:
            raise ConnectionError("no answer\nfrom http://tracker")

    name = version = "here"

    @property
    def experiment(self) -> Any:
        self._ask("experiment")
        return self

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._ask(step, dict(metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._ask("settings", params)

    def save(self) -> None:
        self._ask("save")


def test_the_values_of_a_step_are_one_request_with_its_tokens() -> None:
    server = Server()
    logger = kept(server)
    assert logger is server and isinstance(logger, Server) and isinstance(logger, KeptLogger)
    assert kept(logger) is logger
    count_tokens([logger], 64)
    logger.log_metrics({"loss": 3.0}, 1)
    logger.log_metrics({"rate": 0.1}, 1)
    assert server.asked == [], "the step may have more values"
    logger.log_metrics({"loss": 2.0}, 5)
    assert server.asked == [(1, {"loss": 3.0, "rate": 0.1, "tokens": 64.0})]
    logger.save()
    assert server.asked[1:] == [(5, {"loss": 2.0, "tokens": 320.0}), ("save",)]
    logger.log_metrics({"loss": 1.0}, 7)
    logger.finalize("success")
    logger.finalize("success")
    assert server.asked[3] == (7, {"loss": 1.0, "tokens": 448.0})
    assert all(what == ("save",) for what in server.asked[4:]), "no value is sent twice"
    logger.log_metrics({"alone": 1.0})
    assert server.asked[-1] == (None, {"alone": 1.0})


def test_what_trains_nothing_has_no_tokens() -> None:
    server = Server()
    kept(server).log_metrics({"loss": 3.0}, 0)
    server.save()
    assert server.asked[0] == (0, {"loss": 3.0})


def test_a_tracker_that_is_down_costs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    server: Any = kept(Server(down_from=2))
    assert server.experiment is server
    server.log_hyperparams({"a": 1})
    for step in range(4):
        server.log_metrics({"loss": 1.0}, step)
    server.experiment.anything("goes")
    server.save()
    server.finalize("failed")
    assert len(server.asked) == 3, "it is not asked again"
    assert capsys.readouterr().err == (
        "warning: Server logs nothing more in this session, and the run continues: no answer\n"
    )


def test_tensorboard_counts_tokens_and_has_a_curve_of_the_steps(tmp_path: Path) -> None:
    logger: Any = kept(TensorBoardLogger(tmp_path, name="run", version="version_0"))
    count_tokens([logger], 100)
    for step in (1, 2):
        logger.log_metrics({"loss": 3.0 - step}, step)
        logger.log_metrics({"rate": 0.1}, step)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in ("loss", "rate", "optimizer/step")}
    assert read["loss"] == [(100, 2.0), (200, 1.0)] and [step for step, _ in read["rate"]] == [100, 200]
    assert read["optimizer/step"] == [(100, 1.0), (200, 2.0)]


def test_a_table_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    logger: Any = kept(CSVLogger(tmp_path, name="run", version="version_0"))
    count_tokens([logger], 100)
    logger.log_metrics({"loss": 3.0}, 10)
    logger.log_metrics({"loss": 2.0}, 20)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert rows == [{"loss": "3.0", "step": "10", "tokens": "1000.0"}]


def test_a_full_disk_costs_tensorboard_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A thread of TensorBoard writes. Its traceback is not shown, and no call of a callback raises."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shown: list[Any] = []
    monkeypatch.setattr("threading.excepthook", shown.append)
    module._leave_errors_to_calls.cache_clear()
    logger: Any = kept(TensorBoardLogger(str(tmp_path)))
    writer = logger.experiment
    writer.add_text("before", "text")
    writer.flush()
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    for number in range(100):
        writer.add_text("after", "text", number)
        writer.file_writer.add_event(Event(step=number))
        logger.log_metrics({"loss": 3.0}, number)
        logger.save()
        if logger.failed:
            break
        time.sleep(0.05)
    logger.experiment.add_figure("nothing", None)  # nothing is tried any more
    logger.finalize("success")
    assert capfd.readouterr().err == (
        "warning: TensorBoardLogger logs nothing more in this session, and the run continues: "
        "[Errno 28] No space left on device\n"
    )
    assert shown == []
    thread = threading.Thread(target=full)  # any other thread
    thread.start()
    thread.join()
    assert len(shown) == 1
    module._leave_errors_to_calls.cache_clear()
