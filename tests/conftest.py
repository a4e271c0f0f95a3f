"""What holds for every test: no network, no downloads, one thread."""

import os

# Before anything imports a Hugging Face library: they read these once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# This holds for the processes that tests start, too.
os.environ["OMP_NUM_THREADS"] = "1"

import ipaddress
import json
import signal
import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
# A shell starts its background jobs with SIGINT ignored, and so would be every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


CONDITIONS = ("no GPU", "no 16-bit products here", "network namespaces are not permitted")
"""What a machine of CI may lack. A test that is skipped for another reason fails there."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and "NO_SKIPS" in os.environ:
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(condition in reason for condition in CONDITIONS):
            report.outcome, report.longrepr = "failed", f"{reason}: a test may not be skipped here"
    return report


def is_local(host: Any) -> bool:
    """Whether a host, as socket calls take it, is this machine. A name other than its own counts as remote: looking
    it up would already ask the network."""
    if isinstance(host, bytes | bytearray):
        host = host.decode("ascii", "replace")
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse_remote(host: Any) -> None:
    # Not an OSError: clients take those for a bad line, try again, and go on without what they came for.
    if not is_local(host):
        raise RuntimeError(f"tests have no network: {host!r} is not this machine")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse each connection of this process that leaves the machine; subprocesses have only the offline variables."""
    connect, connect_ex, sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto
    getaddrinfo = socket.getaddrinfo

    def check(sock: socket.socket, address: Any) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            refuse_remote(address[0])

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(self, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(self, address)
        return connect_ex(self, address)

    def guarded_sendto(self: socket.socket, data: Any, *flags_and_address: Any) -> int:
        check(self, flags_and_address[-1])
        return sendto(self, data, *flags_and_address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_remote(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket.socket, "sendto", guarded_sendto)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture
def no_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Fails a test whose code warns as a user would see. pytest catches warnings: they are not in what is printed."""
    yield
    hidden = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # by Python itself
    assert not [str(one.message) for one in recwarn if not issubclass(one.category, hidden)]


WORDS = ("river", "stone", "light", "under", "seven", "green", "mountain", "walks", "slowly", "because", "the", "of")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A directory with two small sources and `tiny.yaml`, a run of 26 steps that takes about two seconds."""
    return write_tiny(tmp_path)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished tiny run, for tests that only read it."""
    from lightning_danube.__main__ import main

    directory = write_tiny(tmp_path_factory.mktemp("tiny_run"))
    assert main(["fit", "--config", str(directory / "tiny.yaml")]) == 0
    return directory / "runs" / "tiny" / "version_0"


@pytest.fixture(scope="session")
def mistral_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with Mistral's pieces, of which each word is one: a model to tune for short answers."""
    from lightning_danube.__main__ import main

    directory = write_tiny(tmp_path_factory.mktemp("mistral_run"))
    assert main(["fit", "--config", str(directory / "tiny.yaml"), "--data.init_args.tokenizer", "mistral"]) == 0
    return directory / "runs" / "tiny" / "version_0"


def write_tiny(tmp_path: Path) -> Path:
    for source, step in (("web", 3), ("wiki", 5)):
        with (tmp_path / f"{source}.jsonl").open("w") as file:
            for n in range(300):
                words = [WORDS[(n * step + k * k) % len(WORDS)] for k in range(30)]
                file.write(json.dumps({"text": f"{source} {n}: {' '.join(words)}."}) + "\n")
    (tmp_path / "tiny.yaml").write_text(TINY.replace("TMP", str(tmp_path)))
    return tmp_path


TINY = """
name: tiny
runs: TMP/runs
seed_everything: 3
data:
  class_path: lightning_danube.pretraining.CurriculumData
  init_args:
    tokenizer: danube-small
    context_length: 32
    batch_tokens: 256
    micro_batch_size: 8
    seed: ${seed_everything}
    held_out: 0.05
    validation_rows: 8
    cache_dir: TMP/cache
    processes: 1
    sources:
      web: {path: TMP/web.jsonl}
      wiki: {path: TMP/wiki.jsonl}
    stages:
      - {name: foundation, tokens: 3K, mix: {web: 90.6, wiki: 9.4}}
      - {name: refinement, tokens: 2K, mix: {web: 81.7, wiki: 18.3}}
      - {name: finish, tokens: 1.5K, mix: {web: 51.6, wiki: 48.4}}
model:
  class_path: lightning_danube.pretraining.Pretraining
  init_args:
    decoder:
      {num_hidden_layers: 2, hidden_size: 32, intermediate_size: 64, num_attention_heads: 4, num_key_value_heads: 2}
    learning_rate: {peak: 1.0e-2, final: 1.0e-3, warmup: 1K}
trainer:
  accelerator: cpu
  precision: 32-true
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning_danube.callbacks.Progress
    - class_path: lightning_danube.callbacks.PretrainingSummary
    - class_path: lightning_danube.callbacks.CurriculumStages
    - class_path: lightning_danube.callbacks.TokenLedger
    - class_path: lightning_danube.callbacks.Throughput
      init_args: {peak_flops: 1.0e12}
    - class_path: lightning_danube.callbacks.TextSamples
      init_args: {prompts: ["The river"], max_new_tokens: 8}
    - class_path: lightning_danube.callbacks.Checkpoints
      init_args: {every_n_steps: 5}
"""
