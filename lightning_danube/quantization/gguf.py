"""Levels that llama.cpp makes and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_danube.model import Decoder
from lightning_danube.quantization.importance import importance_matrix
from lightning_danube.quantization.levels import Level
from lightning_danube.quantization.measured import Content
from lightning_danube.weights.gguf.files import save_gguf
from lightning_danube.weights.gguf.tokenizer import gguf_tokenizer_fields
from lightning_danube.weights.llama_cpp import UNQUANTIZED, GGUFContent, LlamaCpp, import_llama_cpp, measure, quantize

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class RunningFile(LlamaCpp):
    """A GGUF file that llama.cpp runs to return logits, and the file's content."""

    def __init__(self, path: Path, content: GGUFContent, context_length: int, cache: str | None) -> None:
        super().__init__(path, context_length, cache=cache, threads=torch.get_num_threads())
        self.content = Content(content.tensor_bytes, content.weights, dict(content.fallbacks))


def quantized_file(
    decoder: Decoder,
    level: Level,
    directory: Path,
    *,
    tokenizer: Any,
    calibration_ids: Tensor,
    context_length: int,
) -> tuple[RunningFile, Path]:
    """Returns the level's model and its file in `directory`. The unquantized file stays there for later levels.

    Raises:
        ValueError: llama.cpp is not installed, or refuses the file.
    """
    import_llama_cpp()
    file = directory / f"{level.name.replace(':', '-')}.gguf"
    if level.type in UNQUANTIZED:
        fields = gguf_tokenizer_fields(tokenizer)
        save_gguf(decoder, file, dtype=DTYPES[level.type], tokenizer_fields=fields, overwrite=True)
        content = measure(file)
    else:
        whole = directory / "whole.gguf"
        if not whole.exists():
            dtype = decoder.model.embed_tokens.weight.dtype
            save_gguf(decoder, whole, dtype=dtype, tokenizer_fields=gguf_tokenizer_fields(tokenizer))
        matrix = kept_importance_matrix(decoder, calibration_ids, directory) if level.imatrix else None
        content = quantize(whole, file, level.type, matrix, embeddings=level.embeddings)
    return RunningFile(file, content, context_length, level.cache), file


def kept_importance_matrix(decoder: Decoder, ids: Tensor, directory: Path) -> dict[str, NDArray[np.float32]]:
    """Returns the importance matrix, which all levels share."""
    path = directory / "importance.npz"
    if not path.exists():
        # No atomic write is needed: the directory belongs to this process, which removes it at its end. Tensor names
        # have dots and no slashes, so they can be names in an archive.
        np.savez(path, **importance_matrix(decoder, ids))  # type: ignore[arg-type]
    with np.load(path) as kept:
        return {name: kept[name] for name in kept.files}
