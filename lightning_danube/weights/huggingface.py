"""Decoders on disk: reads and writes Hugging Face directories, and reads this project's Lightning checkpoints.

A wrong file is refused in one line that names it. This module unpickles only tensors and plain data.
safetensors is imported inside the functions, so that importing the model stays cheap.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_danube.checkpoints.content import NOT_FINITE, all_finite, check_plain
from lightning_danube.checkpoints.files import read_plain
from lightning_danube.checkpoints.sharded import read_rest
from lightning_danube.checkpoints.sharded_files import WEIGHT, load_whole
from lightning_danube.device import check_memory
from lightning_danube.files import read_json
from lightning_danube.model.architecture import tensors_of
from lightning_danube.model.config import DecoderConfig
from lightning_danube.model.decoder import Decoder
from lightning_danube.outside.names import plain_name
from lightning_danube.terminal import counted, some
from lightning_danube.weights.export_places import EXPORTED_FILES, README, export_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# A safetensors file's names of the types that a parameter can have. Any other type is a quantized weight.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class SavesPretrained(Protocol):
    """The interface of a tokenizer that this module needs."""

    def save_pretrained(self, save_directory: str) -> Any: ...


def save_hf(
    decoder: Decoder,
    directory: str | Path,
    tokenizer: SavesPretrained | None = None,
    *,
    bos_id: int | None = 1,
    eos_id: int | None = 2,
    pad_id: int | None = 0,
    generation: Mapping[str, Any] | None = None,
    card: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a directory that AutoModelForCausalLM loads with equal logits, in the types of the parameters.

    `generation` goes into generation_config.json beside the ids, `card` into README.md. With `overwrite`, an earlier
    export is replaced; a directory that holds anything else is left alone.
    """
    tensors = plain_tensors(decoder)
    config = decoder.config.to_hf(bos_id, eos_id, pad_id)
    config["dtype"] = str(decoder.model.embed_tokens.weight.dtype).removeprefix("torch.")
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    with export_folder(directory, EXPORTED_FILES, overwrite) as partial:
        write_hf_json(partial / "config.json", config)
        known = {key: value for key, value in ids.items() if value is not None}
        write_hf_json(partial / "generation_config.json", known | dict(generation or {}))
        write_shards(partial, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        if card is not None:
            (partial / README).write_text(card, "utf-8")


def load_hf(
    directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Decoder:
    """Loads a decoder from a directory that save_hf or transformers wrote.

    Without `dtype`, the decoder has the type of the files; if they have several types, the type that holds them all.
    Only safetensors files are read: a .bin is a pickle, which can run any code. Tensors are read one by one, so two
    copies are never held. The decoder is in training mode, like any new module: Lightning leaves submodules in their
    mode, and would train a decoder in evaluation mode without its dropout.
    """
    source = Path(directory)
    config = read_hf_config(source)
    stored: dict[str, tuple[Path, torch.dtype]] = {}
    for file in weight_files(source):
        types = tensor_types(file)
        if twice := stored.keys() & types.keys():
            raise ValueError(
                f"{source}: {counted(len(twice), 'tensor is', 'tensors are')} in two of its files: {some(twice)}"
            )
        stored |= {name: (file, stored_as) for name, stored_as in types.items()}
    if dtype is None and stored:
        dtype = functools.reduce(torch.promote_types, {kind for _, kind in stored.values()})
    if dtype is not None and is_host(device):
        check_memory(str(source), config.parameters * dtype.itemsize)
    tensors = {name: read_tensor(file, name, dtype, device) for name, (file, _) in stored.items()}
    # transformers up to 4.31 also saved these tables.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        head = tensors.setdefault("lm_head.weight", embedding)
        if head is not embedding and not torch.equal(head, embedding):
            raise ValueError(
                f"{source}: config.json says tie_word_embeddings, yet lm_head.weight is not the embedding: "
                "one of the two is wrong"
            )
    return assemble(config, tensors, source).to(device)


def load_checkpoint(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Decoder:
    """Loads the decoder from a Lightning checkpoint of this project: `decoder_config`, a plain dict, and the `decoder.`
    part of `state_dict`. The decoder is in training mode, as after load_hf."""
    file = Path(path)
    checkpoint = read_checkpoint(file)
    config = saved_config(checkpoint, file)
    prefix = "decoder."
    stored = {tensor.dtype for name, tensor in checkpoint["state_dict"].items() if name.startswith(prefix)}
    if stored and is_host(device):
        check_memory(str(file), config.parameters * (dtype or max(stored, key=lambda one: one.itemsize)).itemsize)
    tensors = {
        # Each tensor is copied, as in read_tensor. The system can drop pages of the map, so only one copy is held.
        name.removeprefix(prefix): tensor.to(device=device, dtype=dtype, copy=True)
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    return assemble(config, tensors, file).to(device)


def saved_config(checkpoint: Mapping[str, Any], file: Path) -> DecoderConfig:
    """Returns the shape of the decoder in a checkpoint.

    Raises:
        ValueError: it says none, or an impossible one.
    """
    try:
        return DecoderConfig(**checkpoint["decoder_config"])
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: decoder_config: {error}") from None


def read_checkpoint(file: Path) -> Mapping[str, Any]:
    """Reads a checkpoint of this project. Its tensors are memory-mapped.

    If many ranks wrote the checkpoint as a directory, reads the weights into memory. Omits the optimizer's state.

    Raises:
        ValueError: it is damaged or no checkpoint of this project, or a weight is not a tensor of finite numbers.
    """
    if not file.exists():
        raise ValueError(f"{file}: no such file")
    if file.is_dir():
        weights = load_whole(file, lambda name: name.startswith(WEIGHT))
        checkpoint = {**read_rest(file), "state_dict": {n.removeprefix(WEIGHT): one for n, one in weights.items()}}
    else:
        # With mmap the optimizer's state, which has twice the size of the weights, is never read.
        checkpoint = read_plain(file, mmap=True)
    if not {"decoder_config", "state_dict"} <= checkpoint.keys():
        raise ValueError(f"{file}: not a checkpoint of this project: no decoder_config and state_dict in it")
    check_plain(checkpoint["state_dict"], file)
    return checkpoint


def is_host(device: torch.device | str | None) -> bool:
    """Returns whether a device is this machine's memory, which is also the default."""
    return device is None or torch.device(device).type == "cpu"


def assemble(config: DecoderConfig, tensors: dict[str, Tensor], source: Path) -> Decoder:
    """Returns a decoder made of existing tensors.

    Raises:
        ValueError: they have not exactly the expected names and shapes, or not only finite numbers.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    if missing := expected.keys() - tensors.keys():
        raise ValueError(f"{source}: {counted(len(missing), 'tensor is', 'tensors are')} missing: {some(missing)}")
    if surplus := tensors.keys() - expected.keys():
        raise ValueError(
            f"{source}: {counted(len(surplus), 'tensor has', 'tensors have')} no place in the model of its "
            f"config: {some(surplus)}"
        )
    wrong = [
        f"{name} {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise ValueError(
            f"{source}: {counted(len(wrong), 'tensor has', 'tensors have')} another shape than its config "
            f"says: {some(wrong)}"
        )
    if bad := [name for name, tensor in tensors.items() if not all_finite(tensor)]:
        raise ValueError(f"{source}: its weight {bad[0]} {NOT_FINITE}: take other weights")
    decoder.load_state_dict(tensors, assign=True)
    return decoder


def plain_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Returns the decoder's tensors by their names in LlamaForCausalLM, without a tied head, as in transformers."""
    expected = {tensor.name for tensor in tensors_of(decoder.config)}
    tensors = decoder.state_dict()
    if decoder.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if tensors.keys() != expected:
        raise ValueError(
            f"the decoder is not a plain one: {some(tensors.keys() ^ expected)}; merge its adapters, undo its "
            "quantization, then save"
        )
    return tensors


def write_shards(directory: Path, tensors: dict[str, Tensor], max_bytes: int) -> None:
    """Writes one file, or several and an index, in the order of the parameters.

    A tensor that exceeds the limit has its own file.
    """
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for file_name, shard in zip(names, shards, strict=True):
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        # transformers refuses a file that does not name the framework of its tensors.
        save_file(on_cpu, directory / file_name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_hf_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def read_hf_config(directory: Path) -> DecoderConfig:
    file = directory / "config.json"
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    if not file.is_file():
        raise ValueError(f"{directory}: no config.json in it")
    try:
        return DecoderConfig.from_hf(read_json(file))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(file)) else f"{file}: {message}") from None


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files that make up the model.

    A directory that was written twice may hold both a single file and an index. transformers then reads the single
    file, and so does this function.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        named = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not named or not all(isinstance(name, str) for name in named):
            raise ValueError(f"{directory / INDEX}: no weight_map from tensors to files of this directory")
        names = sorted({plain_name(name, f"{directory / INDEX}: a file of its weight_map") for name in named})
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(
                f"{directory}: {counted(len(missing), 'file of its index is', 'files of its index are')} "
                f"missing: {some(missing)}"
            )
        return [directory / name for name in names]
    if pickles := sorted(file.name for file in directory.glob("*.bin")):
        raise ValueError(
            f"{directory}: only pickled weights ({some(pickles)}), which can run anything when read; "
            "convert them to safetensors first"
        )
    raise ValueError(f"{directory}: no {SINGLE} and no {INDEX} in it")


def tensor_types(file: Path) -> dict[str, torch.dtype]:
    """Returns name → type of the tensors in a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            types = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated, or no safetensors file ({error})") from None
    if quantized := [f"{name} {kind}" for name, kind in types.items() if kind not in FLOATS]:
        raise ValueError(
            f"{file}: {counted(len(quantized), 'tensor is', 'tensors are')} quantized or no floats "
            f"({some(quantized)}); load the unquantized "
            "weights"
        )
    return {name: FLOATS[kind] for name, kind in types.items()}


def read_tensor(file: Path, name: str, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """Reads a copy of one tensor of a safetensors file, because the file may be replaced or truncated during use.

    The file is mapped again for each tensor (0.1 ms). With a single map, its pages would stay in memory beside the
    copies, and loading would need the memory of two models.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name).to(device=device, dtype=dtype, copy=True)


def write_hf_json(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON as transformers and PEFT do. The file is in a new folder, which is flushed as a whole."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
