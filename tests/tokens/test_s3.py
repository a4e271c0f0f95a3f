"""A run whose shards lie behind a real S3 interface is the run beside the texts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.cli.configs import configured_data
from lightning_danube.pretraining.data import CurriculumData
from tests.tokens.foreign.written import FILES

pytestmark = pytest.mark.s3


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("bucket")
    yield store
    store.rm("bucket", recursive=True)  # the servers of a process share their buckets
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def fit(config: Path, name: str, *overrides: str) -> Path:
    assert main(["fit", "--config", str(config), "--name", name, *overrides]) == 0
    return config.parent / "runs" / name / "version_0"


def equal(first: Path, second: Path) -> bool:
    """Returns whether two runs have the same held-out losses and the same weights, bit by bit."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in (first, second)]
    last = "checkpoints/stage_3_finish_step_00000026.ckpt"
    weights = [DurableCheckpointIO().load_checkpoint(run / last)["state_dict"] for run in (first, second)]
    return summaries[0]["val_loss"] == summaries[1]["val_loss"] and all(
        torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items()
    )


def test_the_run_is_the_one_beside_the_texts(tiny: Path, bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny / "tiny.yaml"
    beside = fit(config, "beside")
    data = configured_data("prepare", [str(config)], [])
    assert isinstance(data, CurriculumData)
    text = config.read_text()
    for name, directory in data.shards_directories().items():
        bucket.put(str(directory), f"bucket/{directory.name}", recursive=True)
        path = data.sources[name].path
        assert text.count(path) == 1
        text = text.replace(path, f"s3://bucket/{directory.name}")
    away = tiny / "away.yaml"
    away.write_text(text.replace(str(data.cache_dir), str(tiny / "another-cache")))
    for name in data.sources:
        Path(data.sources[name].path).unlink()
    far = fit(away, "far", "--data.init_args.workers", "2")
    assert equal(beside, far)
    assert not list((tiny / "another-cache").rglob("*.arrow"))
    assert main(["prepare", "--config", str(away), "--verify"]) == 0
    assert "files hold what was written, in s3://bucket/web-" in capsys.readouterr().out

    # A file that is not there any more, and a bucket that is not.
    (gone, *_) = bucket.glob("bucket/*/train-00000.arrow")
    bucket.rm(gone)
    away.write_text(away.read_text().replace("another-cache", "third-cache"))
    capsys.readouterr()
    assert main(["fit", "--config", str(away), "--name", "none"]) == 2
    assert f"error: s3://{gone} is missing: copy it there again" in capsys.readouterr().err
    away.write_text(away.read_text().replace("s3://bucket", "s3://elsewhere"))
    assert main(["fit", "--config", str(away), "--name", "none"]) == 2
    assert "holds no shards.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files", ["datatrove/*.ds", "megatron/wide.bin", "olmo/narrow.npy", "mosaic/ragged/index.json"]
)
def test_token_files_are_read_by_range_as_beside_the_run(files: str, tiny: Path, bucket: Any) -> None:
    """Also when the run is stopped and resumed, with rows that processes of a loader read."""
    bucket.put(f"{FILES}/", "bucket/files/", recursive=True)
    text = (tiny / "tiny.yaml").read_text().replace("held_out:", "max_epochs: 9\n    held_out:")
    config = tiny / "files.yaml"
    runs = []
    for name, place in (("beside", str(FILES)), ("far", "s3://bucket/files")):
        config.write_text(text.replace(str(tiny / "web.jsonl"), f"{place}/{files}"))
        if name == "far":
            assert fit(config, name, "--trainer.max_steps", "15")
            (last,) = (tiny / "runs" / name / "version_0" / "checkpoints").glob("*step_00000015.ckpt")
            assert fit(config, name, "--ckpt_path", str(last), "--data.init_args.workers", "2")
        else:
            assert fit(config, name)
        runs.append(max((tiny / "runs" / name).glob("version_*")))
    assert equal(*runs)
    assert list((tiny / "cache" / "token-ranges").iterdir())
