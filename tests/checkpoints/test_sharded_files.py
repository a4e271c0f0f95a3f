"""Directories of tensors: read in one piece, and nothing in them can run."""

import hashlib
import importlib
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from lightning_danube.__main__ import user_message
from lightning_danube.checkpoints.files import FILES, INDEX, REST, damage, prepare_directory, remove_checkpoint
from lightning_danube.checkpoints.sharded_files import _CLASSES_OF_AN_INDEX, load_whole, tensor_shapes
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.weights.huggingface import load_checkpoint

TINY = DecoderConfig(16, 24, 1, 2, 1, vocab_size=20)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What one rank would write of a decoder and one moment of one matrix."""
    path = tmp_path / "checkpoints" / "step_00000003.ckpt"
    torch.manual_seed(0)
    tensors = {f"weight/decoder.{name}": tensor for name, tensor in Decoder(TINY).state_dict().items()}
    tensors["optimizer/0/exp_avg/decoder.lm_head.weight"] = torch.full((20, 16), 2.0)
    write(path, tensors)
    return path


def write(path: Path, tensors: dict[str, Any]) -> None:
    save(tensors, storage_writer=FileSystemWriter(path), no_dist=True)
    groups = [{"lr": 0.5, "params": ["decoder.model.norm.weight", "decoder.lm_head.weight"]}]
    torch.save({"decoder_config": vars(TINY), "global_step": 3, "optimizer_groups": [groups]}, path / REST)
    (path / FILES).write_text(json.dumps({file.name: file.stat().st_size for file in path.iterdir()}))


def test_it_is_read_as_a_checkpoint_of_one_file(directory: Path) -> None:
    assert damage(directory) is None
    checkpoint = DurableCheckpointIO().load_checkpoint(directory)
    assert checkpoint["global_step"] == 3 and "optimizer_groups" not in checkpoint
    (optimizer,) = checkpoint["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 0.5, "params": [0, 1]}]
    assert list(optimizer["state"]) == [1] and optimizer["state"][1]["exp_avg"].eq(2).all()
    torch.manual_seed(0)
    for name, tensor in Decoder(TINY).state_dict().items():
        assert torch.equal(checkpoint["state_dict"][f"decoder.{name}"], tensor)
        assert torch.equal(load_checkpoint(directory).state_dict()[name], tensor)


def test_weights_alone_leave_the_moments_on_the_disk(directory: Path) -> None:
    assert "optimizer/0/exp_avg/decoder.lm_head.weight" in tensor_shapes(directory)
    assert all(name.startswith("weight/") for name in load_whole(directory, lambda name: name.startswith("weight/")))


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_what_asks_for_code_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    (directory / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"its index asks for (posix|nt)\.system: loading it could run code"):
        DurableCheckpointIO().load_checkpoint(directory)
    assert not Path("ran").exists()


def test_an_entry_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "step_1.ckpt", {"weight/a": torch.ones(2), "weight/b": 3})
    with pytest.raises(ValueError, match=r"asks for \S+\.BytesStorageMetadata: "):
        load_whole(tmp_path / "step_1.ckpt")


def test_damage_is_named_and_leftovers_go(directory: Path) -> None:
    part = next(directory.glob("*.distcp"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    assert damage(directory) == f"{part.name}: {len(whole) - 1:,} bytes, {len(whole):,} were saved"
    part.unlink()
    assert damage(directory) == f"{part.name} is missing"
    (directory / FILES).unlink()
    assert damage(directory) == f"no {FILES} in the directory: another program wrote it"
    leftover = directory.parent / f".step_00000004.ckpt.{'0' * 32}.partial"
    leftover.mkdir()
    (leftover / "part").touch()
    prepare_directory(directory.parent)
    assert not leftover.exists()
    remove_checkpoint(directory)
    assert list(directory.parent.iterdir()) == []


def hash_all(directory: Path) -> None:
    """Lists the hashes, which a checkpoint of an older version lacks."""
    (directory / FILES).unlink()
    hashes = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in directory.iterdir()
    }
    (directory / FILES).write_text(json.dumps(hashes))


def test_every_flipped_bit_is_noticed(directory: Path) -> None:
    hash_all(directory)
    assert damage(directory) is None
    chance = random.Random(0)
    for file in list(directory.iterdir()):
        whole = file.read_bytes()
        for place in chance.sample(range(len(whole)), 40):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
            assert damage(directory) is not None, (file.name, place)
        file.write_bytes(whole)
    assert damage(directory) is None


@pytest.mark.parametrize(
    "listed",
    [
        b"garbage",
        b"",
        b"[]",
        b"3",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b"9" * 5000,
        b'{".metadata": 1e400}',
        b'{".metadata": "x"}',
        b'{".metadata": {"bytes": 3}}',
        b'{"../x": 3}',
    ],
)
def test_a_damaged_list_of_files_is_damage(directory: Path, listed: bytes) -> None:
    (directory / FILES).write_bytes(listed)
    said = damage(directory)
    assert said is not None and (FILES in said or "is missing" in said) and "\n" not in said


def test_what_the_list_leaves_out_is_damage(directory: Path) -> None:
    """A flipped bit can make two equal names of `__0_0.distcp` and `__1_0.distcp`; the first hash is then lost."""
    hash_all(directory)
    listed = json.loads((directory / FILES).read_text())
    for name in list(listed):
        (directory / FILES).write_text(json.dumps({key: value for key, value in listed.items() if key != name}))
        assert damage(directory) == f"{name} is not in {FILES}"


def test_a_file_that_is_a_pipe_is_damage(directory: Path) -> None:
    hash_all(directory)
    (directory / REST).unlink()
    os.mkfifo(directory / REST)
    assert damage(directory) == "not a regular file"


def test_errors_of_torch_on_damaged_bytes_are_one_line(directory: Path) -> None:
    """An older version listed no hashes, so what its damage leads to must end in one line, too. Torch's own exception
    for it is not an `Exception`."""
    chance = random.Random(0)
    refused = 0
    for file in (directory / INDEX, directory / REST, next(directory.glob("*.distcp"))):
        whole = file.read_bytes()
        for place in [*range(0, 80, 8), *chance.sample(range(len(whole)), 30)]:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
            try:
                DurableCheckpointIO().load_checkpoint(directory)
            except ValueError as error:
                refused += 1
                assert str(directory) in str(error) and "\n" not in str(error)
        file.write_bytes(whole)
    assert refused > 20


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, names in sorted(_CLASSES_OF_AN_INDEX.items()) for name in sorted(names)]
    + [("torch.serialization", "_get_layout")],
)
def test_pytorch_still_has_what_an_index_is_made_of(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_one_file_replaces_a_checkpoint_of_all_ranks(directory: Path) -> None:
    DurableCheckpointIO().save_checkpoint({"a": torch.ones(1)}, directory)
    assert directory.is_file() and damage(directory) is None


def test_memory_that_runs_out_may_be_damage(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr("torch.load", refuse)
    with pytest.raises(
        ValueError, match=r"_00000003.ckpt: out of memory, or .* damaged \(RuntimeError: Default"
    ) as told:
        load_whole(directory)
    assert user_message(told.value) == str(told.value)
