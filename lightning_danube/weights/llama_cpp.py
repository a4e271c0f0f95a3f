"""llama.cpp, through the ctypes interface of the package llama-cpp-python, an optional extra.

The project uses llama.cpp's quantization instead of its own, so that it measures and exports exactly what other
programs run from GGUF files. Only this file imports the package.

Shapes: B texts, T tokens, V vocabulary, D columns of a matrix.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.extras import install_command
from lightning_danube.files import new_file
from lightning_danube.terminal import nearest_name
from lightning_danube.weights.gguf.header import read_gguf_header

if TYPE_CHECKING:
    from torch import Tensor

# Short names that llama.cpp's own program accepts for its medium mixtures.
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
UNQUANTIZED = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GGUFContent:
    """The content of a GGUF file, measured from its tensors, because the name of its type says little about it.

    `fallbacks`: type → number of tensors that have it because their rows do not fit the type intended for them.
    """

    file_bytes: int
    tensor_bytes: int
    weights: int
    tensors: Mapping[str, int]
    fallbacks: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.weights

    def describe(self) -> str:
        lines = [
            f"{self.file_bytes:,} bytes, {self.weights:,} weights at {self.bits_per_weight:.2f} bits: "
            f"{_counted(self.tensors)}"
        ]
        if self.fallbacks:
            lines.append(
                f"{sum(self.fallbacks.values())} of {sum(self.tensors.values())} tensors have rows that the type "
                f"cannot hold, and fell back to {_counted(self.fallbacks)}"
            )
        return "\n".join(lines)


@cache
def _constants_of_gguf() -> ModuleType:
    """Returns the constants of the package gguf.

    Runs only the file that defines them. The package itself imports huggingface_hub, which takes a second.
    """
    package = importlib.util.find_spec("gguf")
    place = None if package is None or package.origin is None else Path(package.origin).with_name("constants.py")
    spec = None if place is None else importlib.util.spec_from_file_location("constants_of_gguf", place)
    if spec is None or spec.loader is None or not os.path.isfile(str(place)):
        import gguf

        return gguf
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def file_types() -> dict[str, int]:
    """Returns name → number of llama.cpp's types of whole files."""
    types = {
        kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(kind)
        for kind in _constants_of_gguf().LlamaFileType
        if kind.name != "GUESSED"
    }
    return types | {alias: types[name] for alias, name in ALIASES.items()}


def check_file_type(name: str) -> str:
    """Returns the canonical name of a file type; upper and lower case are equal."""
    types = file_types()
    if name.upper() in types:
        return name.upper()
    near = nearest_name(name.upper(), types)
    hint = f"did you mean {near}? " if near else ""
    raise ValueError(f"--type {name}: {hint}there are {', '.join(types)}")


def import_llama_cpp() -> ModuleType:
    """Imports the package llama-cpp-python.

    Raises:
        ValueError: it is not installed; the message has the command that installs it.
    """
    try:
        import llama_cpp
    except ModuleNotFoundError:
        command = install_command("llama-cpp")
        raise ValueError(
            f"llama.cpp is not installed; type (it is compiled: some minutes, with a C++ compiler): {command}"
        ) from None
    return llama_cpp


def quantize(
    source: str | Path,
    target: str | Path,
    type: str,
    imatrix: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    embeddings: bool = True,
) -> GGUFContent:
    """Makes llama.cpp convert a GGUF file to another type.

    The target is written under a temporary name and renamed when complete. An existing target is replaced.

    Args:
        source: a file with F32, F16 or BF16 tensors.
        type: one of `file_types()`.
        imatrix: name of a tensor in the file → importance of each of its D columns; types of 1 to 3 bits need it.
        embeddings: whether embedding and head are quantized, too, as llama.cpp does by default; otherwise they are F16.

    Raises:
        ValueError: llama.cpp refuses; the message has its reason.
    """
    llama_cpp = import_llama_cpp()
    target = Path(target).absolute()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_types()[check_file_type(type)]
    if not embeddings:
        parameters.token_embedding_type = parameters.output_tensor_type = llama_cpp.GGML_TYPE_F16
    if imatrix is not None:
        # Rows are passed by address. `columns` keeps them alive until the call returns.
        columns = {name: np.ascontiguousarray(values, np.float32) for name, values in imatrix.items()}
        # The last entry, all null, ends the list.
        entries = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()
        for entry, (name, values) in zip(entries, columns.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        parameters.imatrix = entries
    with new_file(target) as partial:
        with _captured_log(llama_cpp) as log:
            failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(parameters))
        if failed:
            raise _refusal(target, type, "".join(log))
        try:
            content = measure(partial, "".join(log))
        except ValueError as error:
            # llama.cpp's stream may not report a failed write.
            raise OSError(errno.EIO, f"not written by llama.cpp as a whole ({error})", str(target)) from error
    return content


def planned_bytes(source: str | Path, type: str) -> int:
    """Returns the bytes of all tensors if a file had another type, by llama.cpp's own plan, without quantizing.

    Args:
        source: a file with F32, F16 or BF16 tensors; only their shapes count.
        type: one of `file_types()`.

    Raises:
        ValueError: llama.cpp refuses; the message has its reason.
    """
    llama_cpp = import_llama_cpp()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_types()[check_file_type(type)]
    parameters.dry_run = True
    with _captured_log(llama_cpp) as log:
        failed = llama_cpp.llama_model_quantize(os.fsencode(source), b"", ctypes.byref(parameters))
    planned = re.search(r"quant size\s+=\s+([\d.]+) MiB", "".join(log))
    if failed or planned is None:
        raise _refusal(Path(source), type, "".join(log))
    return round(float(planned[1]) * 2**20)


class LlamaCpp:
    """A GGUF file, run by llama.cpp with its own defaults.

    Args:
        path: the file.
        context_length: the maximum number of tokens in the context.
        cache: type of the cached keys and values, such as "q8_0"; None for the default, F16.
        threads: number of CPU threads.
        all_logits: whether logits are kept for all positions. If not, the model can only be timed.

    Raises:
        ValueError: llama.cpp cannot run the file.
    """

    def __init__(
        self, path: str | Path, context_length: int, *, cache: str | None, threads: int, all_logits: bool = True
    ) -> None:
        llama_cpp = import_llama_cpp()
        kind = None if cache is None else getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
        try:
            self.llama = llama_cpp.Llama(
                str(path),
                n_ctx=context_length,
                n_batch=min(context_length, 512),
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=all_logits,
                # llama.cpp's programs also use flash attention where possible; a quantized cache of values needs it.
                flash_attn=True,
                type_k=kind,
                type_v=kind,
                n_gpu_layers=-1 if llama_cpp.llama_supports_gpu_offload() else 0,
                verbose=False,
            )
        except ValueError as error:
            if cache is None:
                raise ValueError(f"llama.cpp does not run it: {error}") from None
            raise ValueError(
                f"llama.cpp makes no cache of type {cache} for this model: its blocks hold 32 channels, and each head "
                "has to be whole blocks"
            ) from None

    def logits(self, ids_BT: Tensor, first: int) -> Tensor:
        """Returns logits, (B, T - first, V), for the positions from `first` on."""
        import torch

        rows = []
        for ids_T in ids_BT.tolist():
            self.llama.reset()
            self.llama.eval(ids_T)
            rows.append(torch.from_numpy(self.llama.scores[first : len(ids_T)].copy()))
        return torch.stack(rows)

    def read(self, ids: Sequence[int], *, anew: bool) -> None:
        """Reads tokens after the tokens read before, or as the start of a new text if `anew`."""
        if anew:
            self.llama.reset()
        self.llama.eval(ids)

    def close(self) -> None:
        self.llama.close()


def measure(path: str | Path, log: str = "") -> GGUFContent:
    """Returns the content of a GGUF file. Fallbacks are known only from llama.cpp's log."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    header = read_gguf_header(path)
    tensor_bytes = weights = end = 0
    types: Counter[str] = Counter()
    for tensor in header.tensors.values():
        kind = GGMLQuantizationType(tensor.type)
        elements = int(np.prod(tensor.shape, dtype=np.int64))
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = elements // block * block_bytes
        types[kind.name] += 1
        tensor_bytes, weights, end = tensor_bytes + size, weights + elements, max(end, tensor.offset + size)
    if end > header.file_size:
        raise ValueError(f"{path}: truncated: its tensors end beyond its {header.file_size:,} bytes")
    fallbacks = Counter(match[1].upper() for match in re.finditer(r"falling back to\s+(\w+)", log))
    return GGUFContent(header.file_size, tensor_bytes, weights, types, fallbacks)


@contextmanager
def _captured_log(llama_cpp: ModuleType) -> Iterator[list[str]]:
    """Collects llama.cpp's output to the terminal: a line for each tensor, and the reason of a failure."""
    log: list[str] = []

    def collect(level: int, text: bytes, _: Any) -> None:
        log.append(text.decode("utf-8", "replace"))

    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield log
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


def _refusal(target: Path, type: str, log: str) -> Exception:
    if "iostream error" in log or "No space" in log:
        return OSError(errno.EIO, "not written by llama.cpp: is the disk full?", str(target))
    reasons = re.findall(r"failed to quantize: (.+)", log) or ["no reason given"]
    reason = reasons[-1].strip().rstrip("!")
    if "matri" in reason:
        reason += " (importance matrix), and none was given: take a type of more bits"
    return ValueError(f"llama.cpp does not quantize to {type}: {reason}")


def _counted(tensors: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(tensors.items(), key=lambda item: (-item[1], item[0])))
