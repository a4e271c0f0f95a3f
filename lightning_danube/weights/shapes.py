"""The shape of a model by its name, without reading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_danube.tokens.hub import download
from lightning_danube.weights.names import SMOLLM2, locate

if TYPE_CHECKING:
    from lightning_danube.model.config import DecoderConfig


def shape_of(weights: str) -> DecoderConfig:
    """Returns the config of the model that a name stands for. Of a model on the hub, only config.json is downloaded.

    Args:
        weights: a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or "smollm2".

    Raises:
        ValueError: nothing has this name, or it is not a model.
    """
    from lightning_danube.checkpoints.files import read_plain
    from lightning_danube.checkpoints.sharded import read_rest
    from lightning_danube.weights.gguf.files import config_of
    from lightning_danube.weights.gguf.header import read_gguf_header
    from lightning_danube.weights.huggingface import read_hf_config, saved_config

    if weights != SMOLLM2 and not Path(weights).expanduser().exists():
        return read_hf_config(download("--weights", weights, ("config.json",), known=(SMOLLM2,)))
    located = locate(weights)
    if located.kind == "hf":
        return read_hf_config(located.path)
    if located.kind == "gguf":
        return config_of(read_gguf_header(located.path))
    content = read_rest(located.path) if located.path.is_dir() else read_plain(located.path, mmap=True)
    return saved_config(content, located.path)
