"""Tokens/s of generation beside transformers and llama.cpp, and what grouped queries save.

    python benchmarks/generation.py [--weights smollm2] [--compiled] [--rounds 5] [--threads 2]
    python benchmarks/generation.py --device cuda --shape danube3-500m --compiled --dtypes bfloat16
    python benchmarks/generation.py --grouped-queries

First form: a prompt of random ids, greedy, --rows times at once, with the same weights in every program; random ones of
`--shape` unless `--weights` names others. Contestants are

* danube: what `generate` runs: TokenStream on packed linear layers;
* unpacked: the same without packing, as while training;
* transformers: `generate` with its defaults, tokens taken by a streamer;
* llama.cpp, on the CPU and for one row: a GGUF file of the same type, `Llama.generate` with its greedy sampler, keys
  and values in 16 bits as by default (with float32 weights: in float32);
* with --compiled, danube compiled: `generate --compile`; and on a GPU transformers compiled: its `generate` with a
  static cache, which it compiles by itself.

All live in one process with the same number of threads. In each round every contestant runs once, one after the other,
each round begins with another one, and the first round is not counted. Prefill is the time to the first token, decode
that from the first to the last; ratios are medians of the rounds' ratios. CPU seconds are those of the process. With
--threads 1 on a CPU all times are CPU seconds, which a busy machine disturbs less.

The memory's share is how much a second is read while decoding (each token the weights, and the cache as it is half way
between the first and the last new token) beside what is read while summing one large tensor (the best of ten times).
Kernels that read weights can be a little faster than that.

Second form: decoders of the size and shape of Danube3-500M with 16, 8 (the paper's), 4 and 1 key-value heads, the
feed-forward layers so much wider that all have the same number of parameters, in bfloat16 with random weights. Decoding
is timed with a cache that holds so many tokens; what they are changes no time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import described, write_result
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from lightning_danube.generation.compiled_steps import CompiledStep
from lightning_danube.generation.packing import pack_for_generation
from lightning_danube.generation.token_stream import TokenStream
from lightning_danube.model import PRESETS, Decoder, DecoderConfig, KVCache
from lightning_danube.weights.gguf.files import save_gguf
from lightning_danube.weights.llama_cpp import import_llama_cpp

SHAPES = {"smollm2": DecoderConfig(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True), **PRESETS}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_HEADS = (16, 8, 4, 1)

Times = list[float]
"""When generation began, and when each token was there."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="as for generate; random ones of --shape if not given")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compiled", action="store_true", help="with compiled contestants")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--rows", type=int, default=1, help="prompts at once")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--grouped-queries", action="store_true", help="the second form")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        if arguments.grouped_queries:
            grouped_queries(arguments)
        else:
            contest(arguments)


def contest(arguments: argparse.Namespace) -> None:
    packages = ["torch", "transformers"]
    rows, notes = [], []
    for name in arguments.dtypes:
        with tempfile.TemporaryDirectory() as directory:
            contestants, config, missing = open_contestants(arguments, DTYPES[name], Path(directory))
            if missing:
                notes.append(missing)
            elif "llama.cpp" in contestants:
                packages.append("llama-cpp-python")
                notes.append(f"llama.cpp uses {instructions(import_llama_cpp())}")
            speed = bytes_a_second(arguments.device)
            notes.append(f"memory is read at {speed / 1e9:,.1f} GB/s")
            for length in arguments.prompt_tokens:
                prompt = torch.randint(3, 30000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
                each_step = bytes_a_step(
                    config, DTYPES[name].itemsize, arguments.rows, length + arguments.new_tokens // 2
                )
                limit = arguments.rows * speed / each_step
                rows += rows_of(name, length, measured(contestants, prompt, arguments), limit)
        del contestants
        gc.collect()
    lines = [
        described(*dict.fromkeys(packages)),
        f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}",
        *([torch.cuda.get_device_name()] if arguments.device == "cuda" else []),
        f"{arguments.threads} threads, {arguments.rows} row(s), {arguments.new_tokens} new tokens, {arguments.rounds} "
        f"rounds, medians (least to most); weights: {arguments.weights or f'random, {arguments.shape}'}",
        *dict.fromkeys(notes),
        "",
        "| weights | prompt | | prefill, tokens/s | × transformers | decode, tokens/s | × transformers "
        "| of the memory | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    name = "generation" if arguments.device == "cpu" else "generation-cuda"
    if arguments.device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        name += "-avx2"
    name = f"{name}-{arguments.shape}" + (f"-rows-{arguments.rows}" if arguments.rows > 1 else "")
    write_result(name, "\n".join(lines))


def instructions(llama_cpp: Any) -> str:
    """The processor's instructions that llama.cpp was compiled for."""
    flags = llama_cpp.llama_print_system_info().decode().split("|")
    return ", ".join(flag.split("=")[0].split(":")[-1].strip() for flag in flags if flag.strip().endswith("= 1"))


def bytes_a_second(device: str) -> float:
    """At which one large tensor is read."""
    large = torch.ones(2**28, device=device)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        large.sum().item()
        times.append(time.perf_counter() - began)
    return large.nbytes / min(times)


def bytes_a_step(config: DecoderConfig, bytes_a_number: int, rows: int, tokens: int) -> int:
    """That a decoding step reads after so many tokens a row: all weights, but of an embedding that is not the head as
    well one row for each, and the caches."""
    unread = 0 if config.tie_word_embeddings else (config.vocab_size - rows) * config.hidden_size
    cache = rows * config.cache_bytes(tokens, bytes_per_value=bytes_a_number)
    return (config.parameters - unread) * bytes_a_number + cache


def open_contestants(
    arguments: argparse.Namespace, dtype: torch.dtype, directory: Path
) -> tuple[dict[str, Callable[[list[int], int], Times]], DecoderConfig, str]:
    """Name → what generates so many tokens after a prompt; the model's shape; and a line about who is not there."""
    unpacked = decoder_of(arguments, dtype)
    packed = copy.deepcopy(unpacked)
    is_packed = pack_for_generation(packed, rows=arguments.rows)
    context = max(arguments.prompt_tokens) + arguments.new_tokens
    config = LlamaConfig.from_dict(unpacked.config.to_hf(None, None, None))
    with torch.device(arguments.device):
        theirs: Any = LlamaForCausalLM(config).to(dtype).eval()
    theirs.load_state_dict(unpacked.state_dict())
    rows = arguments.rows
    contestants = {"danube": lambda prompt, n: ours(packed, [prompt] * rows, n)}
    if is_packed and arguments.device == "cpu":
        contestants["unpacked"] = lambda prompt, n: ours(unpacked, [prompt] * rows, n)
    contestants["transformers"] = lambda prompt, n: transformers(theirs, [prompt] * rows, n)
    if arguments.compiled:
        step = CompiledStep(packed)
        contestants["danube compiled"] = lambda prompt, n: ours(packed, [prompt] * rows, n, step)
        if arguments.device == "cuda":
            contestants["transformers compiled"] = lambda prompt, n: transformers(theirs, [prompt] * rows, n, "static")
    if arguments.device != "cpu" or rows > 1:
        return contestants, unpacked.config, ""
    try:
        llama_cpp = import_llama_cpp()
    except ValueError as error:
        return contestants, unpacked.config, f"llama.cpp is left out: {error}"
    file = directory / "model.gguf"
    save_gguf(unpacked, file, dtype=dtype)
    kind = 0 if dtype == torch.float32 else 1  # GGML_TYPE_F32 and F16
    llama = llama_cpp.Llama(
        str(file),
        n_ctx=context,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )
    contestants["llama.cpp"] = lambda prompt, n: llamas(llama, prompt, n)
    return contestants, unpacked.config, ""


def decoder_of(arguments: argparse.Namespace, dtype: torch.dtype) -> Decoder:
    if arguments.weights is not None:
        from lightning_danube.weights.loading import load_decoder

        return load_decoder(arguments.weights, dtype=dtype, device=arguments.device).eval()
    torch.manual_seed(0)
    with torch.device("meta"):
        decoder = Decoder(SHAPES[arguments.shape]).to(dtype)
    decoder = decoder.to_empty(device=arguments.device).eval()
    decoder.init_weights()
    return decoder


def now() -> float:
    """Seconds. With one thread those of the process: other processes then disturb little."""
    return (
        time.process_time() if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter()
    )


def ours(decoder: Decoder, prompts: list[list[int]], new_tokens: int, compiled: CompiledStep | None = None) -> Times:
    times = [now()]
    for ids in TokenStream(decoder, prompts, new_tokens, compiled=compiled):
        ids.tolist()
        times.append(now())
    return times


class Clock(BaseStreamer):
    def __init__(self) -> None:
        self.times: Times = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(now())

    def end(self) -> None:
        pass


def transformers(model: Any, prompts: list[list[int]], new_tokens: int, cache: str | None = None) -> Times:
    clock = Clock()
    began = now()
    ids = torch.tensor(prompts, device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        cache_implementation=cache,
    )
    return [began, *clock.times[1:]]  # the first thing it is handed is the prompt


def llamas(llama: Any, prompt: list[int], new_tokens: int) -> Times:
    llama.reset()
    times = [now()]
    for _ in llama.generate(prompt, temp=0.0):
        times.append(now())
        if len(times) > new_tokens:
            break
    return times


def measured(
    contestants: Mapping[str, Callable[[list[int], int], Times]], prompt: list[int], arguments: argparse.Namespace
) -> dict[str, list[tuple[float, float, float]]]:
    """Name → for each round tokens/s of prefill and decode, and CPU seconds."""
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}
    for number in range(arguments.rounds + 1):
        for name in in_turn(list(contestants), number):
            cpu = time.process_time()
            times = contestants[name](prompt, arguments.new_tokens)
            cpu = time.process_time() - cpu
            assert len(times) == arguments.new_tokens + 1, (name, len(times))
            rows = arguments.rows
            prefill, decode = (
                len(prompt) / (times[1] - times[0]) * rows,
                (len(times) - 2) / (times[-1] - times[1]) * rows,
            )
            if number:
                results[name].append((prefill, decode, cpu))
            print(f"round {number}, {name}: {prefill:,.0f} and {decode:.1f} tokens/s, {cpu:.1f} CPU s", flush=True)
    return results


def in_turn(names: list[str], number: int) -> Iterator[str]:
    return iter(names[number % len(names) :] + names[: number % len(names)])


def rows_of(
    dtype: str, prompt_tokens: int, results: Mapping[str, list[tuple[float, float, float]]], limit: float
) -> list[str]:
    """
    Args:
        limit: tokens/s of decoding at which as much is read as in a sum.
    """
    rows = []
    for name, rounds in results.items():
        cells = []
        for place in range(2):
            values = [values[place] for values in rounds]
            pairs = zip(rounds, results["transformers"], strict=True)
            ratio = statistics.median(mine[place] / theirs[place] for mine, theirs in pairs)
            cells += [with_ends(values), f"{ratio:.2f}"]
        share, cpu = (statistics.median(values[place] for values in rounds) for place in (1, 2))
        cells.append(f"{share / limit:.0%}")
        rows.append(f"| {dtype} | {prompt_tokens:,} | {name} | {' | '.join(cells)} | {cpu:.2f} |")
    return rows


def grouped_queries(arguments: argparse.Namespace) -> None:
    """Cache bytes and speed by the number of key-value heads at equal parameters."""
    shape = PRESETS["danube3-500m"]
    assert shape.head_dim is not None
    configs = {}
    for kv_heads in KV_HEADS:
        # Two matrices a layer lose hidden x head_dim for each head that goes; three gain hidden for each channel.
        freed, rest = divmod(2 * shape.head_dim * (shape.num_key_value_heads - kv_heads), 3)
        assert rest == 0
        configs[kv_heads] = dataclasses.replace(
            shape, num_key_value_heads=kv_heads, intermediate_size=shape.intermediate_size + freed
        )
    assert {config.parameters for config in configs.values()} == {shape.parameters}

    decoders = {}
    for kv_heads, config in configs.items():
        with torch.device("meta"):
            decoder = Decoder(config)
        decoders[kv_heads] = decoder.bfloat16().to_empty(device="cpu").eval()
        decoders[kv_heads].init_weights()
        pack_for_generation(decoders[kv_heads])
    table, rows = [], []
    for context in arguments.contexts:
        results: dict[int, list[tuple[float, float]]] = {kv_heads: [] for kv_heads in configs}
        for number in range(arguments.rounds + 1):
            for name in in_turn([str(kv_heads) for kv_heads in configs], number):
                speeds = prefill_and_decode(decoders[int(name)], context, arguments.new_tokens)
                if number:
                    results[int(name)].append(speeds)
                print(f"context {context}, round {number}, {name} heads: {speeds[0]:,.0f}, {speeds[1]:.1f}", flush=True)
        for kv_heads, rounds in results.items():
            prefill, decode = (statistics.median(values) for values in zip(*rounds, strict=True))
            pairs = list(zip(rounds, results[KV_HEADS[0]], strict=True))
            ratios = [statistics.median(mine[place] / multi[place] for mine, multi in pairs) for place in range(2)]
            size = KVCache.for_decoder(decoders[kv_heads], 1, context).nbytes
            table.append(
                f"| {context:,} | {kv_heads} | {size / 2**20:,.0f} | {with_ends(one[0] for one in rounds)} | "
                f"{ratios[0]:.2f} | {with_ends(one[1] for one in rounds)} | {ratios[1]:.2f} |"
            )
            rows.append(
                {
                    "context": context,
                    "key_value_heads": kv_heads,
                    "intermediate_size": configs[kv_heads].intermediate_size,
                    "parameters": configs[kv_heads].parameters,
                    "cache_bytes": size,
                    "prefill_tokens_per_second": prefill,
                    "prefill_ratio": ratios[0],
                    "decode_tokens_per_second": decode,
                    "decode_ratio": ratios[1],
                    **{
                        f"{part}_tokens_per_second_{end}": least_or_most(values)
                        for part, values in zip(("prefill", "decode"), zip(*rounds, strict=True), strict=True)
                        for end, least_or_most in (("low", min), ("high", max))
                    },
                    "rounds": arguments.rounds,
                    "threads": arguments.threads,
                }
            )
    widths = ", ".join(f"{kv_heads}: {config.intermediate_size}" for kv_heads, config in configs.items())
    lines = [
        described("torch"),
        f"{arguments.threads} threads, bfloat16, batch 1, {arguments.rounds} rounds, medians; "
        f"{shape.parameters:,} parameters, {shape.num_attention_heads} query heads of {shape.head_dim}, "
        f"{shape.num_hidden_layers} layers; feed-forward width by key-value heads: {widths}",
        "",
        f"| context | key-value heads | cache, MiB | prefill, tokens/s | × {KV_HEADS[0]} heads | decode, tokens/s | "
        f"× {KV_HEADS[0]} heads |",
        "|---|---|---|---|---|---|---|",
        *table,
    ]
    write_result("grouped-queries", "\n".join(lines), rows)


def with_ends(values: Iterable[float]) -> str:
    """Returns the median of the rounds, and the lowest and highest round."""
    values = list(values)
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def prefill_and_decode(decoder: Decoder, context: int, new_tokens: int) -> tuple[float, float]:
    """Tokens/s of reading a context, and of the last `new_tokens` steps of one that gets so long."""
    cache = KVCache.for_decoder(decoder, 1, context)
    ids = torch.randint(0, decoder.config.vocab_size, (1, context))
    began = time.perf_counter()
    decoder.lm_head(decoder.hidden_states(ids, cache=cache)[:, -1])
    read = time.perf_counter()
    cache.truncate(context - new_tokens)
    for step in range(new_tokens):
        decoder.lm_head(decoder.hidden_states(ids[:, step : step + 1], cache=cache)[:, -1]).argmax(-1).tolist()
    return context / (read - began), new_tokens / (time.perf_counter() - read)


if __name__ == "__main__":
    main()
