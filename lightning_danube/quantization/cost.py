"""Measures the speed and memory of one level in a separate process, so that the previous level does not affect them.

`measure_cost` starts this command, which prints one line of JSON:

    python -m lightning_danube.quantization.cost '{"level": …}'
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from lightning_danube.quantization.levels import FULL, Level, parse_level
from lightning_danube.quantization.measured import Cost
from lightning_danube.signals import run_child

PREFILL_TOKENS, DECODE_TOKENS = 256, 16
ROUNDS = 3
LIMIT_SECONDS = 1800


def measure_cost(level: Level, weights: str, file: Path | None, *, dtype: str, device: str, threads: int) -> Cost:
    """Returns the speed and memory of one level, measured in a separate process.

    Args:
        weights: the model, as in `--weights`.
        file: the quantized GGUF file, for levels that have one.
        dtype: type of the full model's parameters.
        device: device for levels that run in PyTorch rather than in llama.cpp.
        threads: number of CPU threads.

    Raises:
        ValueError: the measurement failed; the message has the last line that the process wrote.
    """
    request = {
        "level": level.name,
        "weights": weights,
        "file": None if file is None else str(file),
        "dtype": dtype,
        "device": device,
        "threads": threads,
    }
    command = [sys.executable, "-m", "lightning_danube.quantization.cost", json.dumps(request)]
    try:
        done = run_child(command, timeout=LIMIT_SECONDS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        raise ValueError(f"speed not measured: more than {LIMIT_SECONDS // 60} minutes") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"speed not measured: {last[:200]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main(request: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(request["threads"])
    level = FULL if request["level"] == FULL.name else parse_level(request["level"])
    run = _llama_cpp if level.method == "gguf" else _decoder
    print(json.dumps(asdict(run(level, request))))


def _llama_cpp(level: Level, request: dict[str, Any]) -> Cost:
    from lightning_danube.weights.gguf.header import read_gguf_header
    from lightning_danube.weights.llama_cpp import LlamaCpp, import_llama_cpp

    import_llama_cpp()
    vocabulary = read_gguf_header(request["file"]).fields["llama.vocab_size"]
    before = _reset_peak()
    model = LlamaCpp(
        request["file"],
        PREFILL_TOKENS + DECODE_TOKENS,
        cache=level.cache,
        threads=request["threads"],
        all_logits=False,
    )
    ids = _some_ids(vocabulary)

    def read(tokens: Sequence[int], anew: bool) -> None:
        model.read(tokens, anew=anew)

    prefill, decode = _timed(read, ids)
    return Cost(prefill, decode, _peak_since(before))


def _decoder(level: Level, request: dict[str, Any]) -> Cost:
    import torch

    from lightning_danube.model import Decoder, DecoderConfig, KVCache
    from lightning_danube.quantization.decoders import full_decoder, quantized_decoder
    from lightning_danube.weights.loading import load_decoder

    device = torch.device(request["device"])

    def build(decoder: Decoder) -> Decoder:
        return (full_decoder(decoder) if level == FULL else quantized_decoder(decoder, level)).decoder

    # Libraries and the kernels' buffers are loaded once. They are not part of a model's memory.
    tiny = Decoder(DecoderConfig(64, 64, 1, 2, 2, vocab_size=64)).to(device)
    build(tiny)(torch.ones(1, 4, dtype=torch.long, device=device))
    before = _reset_peak()
    decoder = load_decoder(request["weights"], dtype=request["dtype"], device=device)
    vocabulary = decoder.config.vocab_size
    model = build(decoder)
    del decoder
    gc.collect()
    # The memory that quantizing itself needed is released first, so it is not counted.
    _give_back_freed()
    _reset_peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    cache = KVCache.for_decoder(model, 1, PREFILL_TOKENS + DECODE_TOKENS)

    def read(tokens: Sequence[int], anew: bool) -> None:
        if anew:
            cache.length = 0
        ids_BT = torch.tensor([tokens], device=device)
        # As in generation, the head computes only the last token.
        model.lm_head(model.hidden_states(ids_BT, cache=cache)[:, -1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        prefill, decode = _timed(read, _some_ids(vocabulary))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_since(before)
    return Cost(prefill, decode, peak)


def _timed(read: Callable[[Sequence[int], bool], None], ids: list[int]) -> tuple[float, float]:
    """Returns tokens/s of prefill and of decoding: medians over the rounds after a warm-up round."""
    prefill, decode = [], []
    for _ in range(1 + ROUNDS):
        begin = time.perf_counter()
        read(ids[:PREFILL_TOKENS], True)
        prefill.append(PREFILL_TOKENS / (time.perf_counter() - begin))
        begin = time.perf_counter()
        for token in ids[PREFILL_TOKENS:]:
            read([token], False)
        decode.append(DECODE_TOKENS / (time.perf_counter() - begin))
    return round(median(prefill[1:]), 2), round(median(decode[1:]), 2)


def _some_ids(vocabulary: int) -> list[int]:
    return [(7919 * place) % vocabulary for place in range(1, 1 + PREFILL_TOKENS + DECODE_TOKENS)]


# --- memory of this process, on Linux ---------------------------------------------------------------------------------


def _reset_peak() -> int:
    """Resets the process's peak memory, and returns the memory that it holds now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status("VmRSS")


def _peak_since(before: int) -> int | None:
    if sys.platform != "linux" or not before:
        return None
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _give_back_freed() -> None:
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
