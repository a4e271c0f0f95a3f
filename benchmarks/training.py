"""Tokens/s of training beside transformers' Trainer, LitGPT and a plain PyTorch loop.

    python benchmarks/training.py [--rounds 2] [--threads 1] [--precision bf16 fp32] [--compiled]
    python benchmarks/training.py --overhead
    python benchmarks/training.py --grouped-queries
    python benchmarks/training.py --device cuda --shape 500m

First form: a Llama of one shape from random weights; forward, backward, clipping by the norm and AdamW on batches of
one size. bf16 is mixed: float32 weights, autocast. Contestants are

* danube: `python -m lightning_danube fit` with the trainer and callbacks of pretrain/laptop, on a text file of random
  words;
* danube, plain loop: the same decoder and optimizer without Lightning, data and callbacks;
* transformers: its Trainer with defaults (they are sdpa and fused AdamW) and this project's allocator settings;
* transformers as installed: the same with the allocator's defaults, which is what its user has; CPU only;
* LitGPT: its GPT with its own cross-entropy in chunks in a plain loop with fused AdamW, the allocator set likewise.

With --compiled there are also danube with `model.compile_blocks`, our decoder in a plain loop compiled as a whole with
its loss, and `torch.compile` of LitGPT's model, as its `pretrain` does it. In float32 all CPU contestants but
`transformers as installed` multiply in "medium" precision.

Each contestant is a process of its own in each round, and rounds begin with another one. A step lasts from the end of
one to the end of the next, with all that the loop around it does; two steps come first. CPU seconds are the process's:
on a shared machine they say more than the clock does. "To first step" is from the start of the process, with imports,
compilation (nothing cached) and reading data. FLOPs are `DecoderConfig.flops_per_token`; the ceiling is a product of
two 2048 x 2048 matrices, measured before each contestant on the CPU, and 989e12 on a GPU (H100, H200; dense).

Second form: what the loops cost by themselves: a decoder of next to no work, milliseconds of CPU a step.

Third form: a step of four layers of Danube3-500M's width with 16, 8 (the paper's), 4 and 1 key-value heads in bf16, one
row of 2,048 tokens: at equal parameters, the feed-forward so much wider, and at equal shape. In one process, in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback
from machine import ROOT, described, write_result

from lightning_danube.device import exact_products_by_onednn, fastest_type, keep_freed_memory
from lightning_danube.model import PRESETS, Decoder, DecoderConfig, next_token_loss
from lightning_danube.terminal import markdown_table
from lightning_danube.training.optim import AdamW


@dataclasses.dataclass(frozen=True)
class Work:
    """A decoder and the rows of a step."""

    config: DecoderConfig
    rows: int
    context: int

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    @property
    def flops(self) -> float:
        """Of a step."""
        return float(self.tokens * self.config.flops_per_token(self.context))


SHAPES = {
    "small": Work(DecoderConfig(384, 1024, 8, 6, 2, vocab_size=32000), 8, 512),
    "quickstart": Work(DecoderConfig(256, 768, 6, 8, 4, vocab_size=32000), 8, 512),
    # Vocabulary of the tokenizer that `fit` takes: without work in the layers, the head is all the work there is.
    "tiny": Work(DecoderConfig(8, 8, 1, 2, 1, vocab_size=32000), 1, 16),
    "500m": Work(dataclasses.replace(PRESETS["danube3-500m"], max_position_embeddings=8192), 4, 8192),
    "4b": Work(dataclasses.replace(PRESETS["danube3-4b"], max_position_embeddings=8192), 1, 8192),
}
PEAK = 989e12
WARM_UP = 2
MARK = "measured: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=["bf16", "fp32"],
        help="both by default, or fp32 where the CPU has no fast bf16",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a contestant in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="contestants; all if not given")
    parser.add_argument("--compiled", action="store_true", help="compiled contestants, too")
    parser.add_argument("--overhead", action="store_true", help="the second form")
    parser.add_argument("--grouped-queries", action="store_true", help="the third form")
    parser.add_argument("--contestant", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        run_contestant(arguments)
        return
    if arguments.grouped_queries:
        grouped_queries(arguments)
        return
    if arguments.arms and "danube" not in arguments.arms:
        parser.error("--arms needs danube, which the others are compared with")
    arms = arguments.arms or [name for name in ARMS if arguments.compiled or "compiled" not in name]
    if arguments.device == "cuda":
        arms = [name for name in arms if "as installed" not in name]
    if arguments.overhead:
        arguments.shape, arguments.steps, arguments.precision = "tiny", 60, ["fp32"]
        arms = ["danube", "danube, plain loop", "transformers", "transformers, plain loop"]
    elif arguments.arms is None:
        arms.remove("transformers, plain loop")
    packages = ["torch", "lightning", "transformers", *(["litgpt"] if any("LitGPT" in name for name in arms) else [])]
    lines = [
        described(*packages),
        f"shape {arguments.shape} on {arguments.device}, {arguments.threads} thread(s), {arguments.rounds} rounds of "
        f"{arguments.steps} steps, medians; load at the start {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
    ]
    slow_in_16_bits = arguments.device == "cpu" and fastest_type(training=True) == torch.float32
    for precision in arguments.precision or (["fp32"] if slow_in_16_bits else ["bf16", "fp32"]):
        lines += ["", f"{precision}:", "", *compare(arms, precision, arguments)]
    kind = "cuda" if arguments.device == "cuda" else torch.backends.cpu.get_cpu_capability().lower()
    name = "training-overhead" if arguments.overhead else f"training-{arguments.shape}"
    write_result(f"{name}-{kind}", "\n".join(lines))


def compare(arms: list[str], precision: str, arguments: argparse.Namespace) -> list[str]:
    """The table of one precision."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for number in range(arguments.rounds):
        start = number % len(arms)
        for name in arms[start:] + arms[:start]:
            result = {"ceiling": ceiling(arguments.device, precision), **measured(name, precision, arguments)}
            results[name].append(result)
            steps = statistics.median(result["cpu"])
            print(
                f"{precision}, round {number}, {name}: {steps:.4f} CPU s a step, loss {result['loss']:.3f}", flush=True
            )
    return overhead_table(results) if arguments.overhead else speed_table(results, arguments)


def measured(name: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a contestant in a separate process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--contestant", name, "--precision", precision]
    for option in ("shape", "device", "steps", "threads"):
        command += [f"--{option}", str(getattr(arguments, option))]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(arguments.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
            "LIGHTNING_DANUBE_CACHE": f"{scratch}/cache",
            "TMPDIR": scratch,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]),
            "STARTED": repr(time.time()),
        }
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            result: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return result
    raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def ceiling(device: str, precision: str) -> float:
    """FLOP/s of a large product: of a CPU second here, a GPU's stated peak."""
    if device == "cuda":
        return PEAK
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    seconds = []
    with exact_products_by_onednn():
        for _ in range(6):
            began = time.process_time()
            a @ b
            seconds.append(time.process_time() - began)
    return 2 * 2048**3 / min(seconds)


def speed_table(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> list[str]:
    work = SHAPES[arguments.shape]
    clock = "wall" if arguments.device == "cuda" else "cpu"
    unit = "s" if clock == "wall" else "CPU s"
    seconds = {name: [statistics.median(r[clock]) for r in rounds] for name, rounds in results.items()}
    rows = []
    for name, rounds in results.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds["danube"], strict=True))
        share = statistics.median(work.flops / own / r["ceiling"] for own, r in zip(seconds[name], rounds, strict=True))
        rows.append(
            [
                name,
                f"{work.tokens / statistics.median(seconds[name]):,.0f}",
                f"{work.tokens / max(seconds[name]):,.0f} to {work.tokens / min(seconds[name]):,.0f}",
                f"{work.tokens / statistics.median(statistics.median(r['wall']) for r in rounds):,.0f}",
                f"{ratio:.2f}",
                f"{100 * share:.0f} %",
                f"{statistics.median(r['peak'] for r in rounds) / 2**20:,.0f}",
                f"{statistics.median(r['first_cpu'] for r in rounds):.0f}",
                f"{statistics.median(r['first_wall'] for r in rounds):.0f}",
            ]
        )
    peaks = [r["ceiling"] for rounds in results.values() for r in rounds]
    head = ["", f"tokens/{unit}", "least to most", "tokens/s by the clock", "danube ×", "of the ceiling", "peak MiB"]
    return [
        f"ceiling {statistics.median(peaks) / 1e9:,.0f} GFLOP/s ({min(peaks) / 1e9:,.0f} to {max(peaks) / 1e9:,.0f})",
        "",
        markdown_table([*head, "CPU s to first step", "s to first step"], rows),
    ]


def overhead_table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    milliseconds = {
        name: 1e3 * statistics.median(statistics.median(r["cpu"]) for r in rounds) for name, rounds in results.items()
    }
    rows = [
        [name, f"{milliseconds[name]:.2f}", f"{milliseconds[f'{name}, plain loop']:.2f}",
         f"{milliseconds[name] - milliseconds[f'{name}, plain loop']:.2f}"]
        for name in ("danube", "transformers")
    ]  # fmt: skip
    return [markdown_table(["", "CPU ms a step", "of them a plain loop", "the rest"], rows)]


def grouped_queries(arguments: argparse.Namespace) -> None:
    """CPU seconds of a step by the number of key-value heads."""
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    shape = dataclasses.replace(PRESETS["danube3-500m"], num_hidden_layers=4)
    assert shape.head_dim is not None
    configs = {("multi-head", 16): dataclasses.replace(shape, num_key_value_heads=16)}
    for equal in ("parameters", "shape"):
        for kv_heads in (8, 4, 1):
            # Two matrices a layer lose hidden x head_dim for each head that goes; three gain hidden for each channel.
            wider = 2 * shape.head_dim * (16 - kv_heads) // 3 if equal == "parameters" else 0
            configs[f"equal {equal}", kv_heads] = dataclasses.replace(
                shape, num_key_value_heads=kv_heads, intermediate_size=shape.intermediate_size + wider
            )
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in configs}
    names = list(configs)
    for number in range(arguments.rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(statistics.median(seconds_of_steps(configs[name], arguments.steps)))
            print(f"round {number}, {name[0]}, {name[1]} heads: {seconds[name][-1]:.3f} CPU s a step", flush=True)
    baseline = seconds["multi-head", 16]
    rows = [
        [kind, str(kv_heads), f"{configs[kind, kv_heads].parameters:,}", f"{2048 / statistics.median(own):,.0f}",
         f"{statistics.median(theirs / ours for theirs, ours in zip(baseline, own, strict=True)):.2f}"]
        for (kind, kv_heads), own in seconds.items()
    ]  # fmt: skip
    lines = [
        described("torch"),
        f"{arguments.threads} thread(s), {arguments.rounds} rounds of {arguments.steps} steps, medians; load at the "
        f"start {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "",
        markdown_table(["", "key-value heads", "parameters", "tokens/CPU s", "multi-head ×"], rows),
    ]
    write_result("training-grouped-queries", "\n".join(lines))


def seconds_of_steps(config: DecoderConfig, steps: int) -> list[float]:
    decoder = Decoder(config)
    optimizer = AdamW().build(decoder, 3e-4)
    seconds = []
    for (inputs, labels), _ in zip(batches(Work(config, 1, 2048), "cpu"), range(steps + 1), strict=False):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            total, count = next_token_loss(decoder.hidden_states(inputs), decoder.lm_head.weight, labels)
        update(total / count, decoder, optimizer)
        seconds.append(time.process_time() - began)
    return seconds[1:]


# --- a contestant's own process ---------------------------------------------------------------------------------------


class Clock:
    """Time from the end of a step to the end of the next; says what it has measured and ends the process."""

    def __init__(self, steps: int, device: str) -> None:
        self.steps, self.device = steps, device
        self.first: tuple[float, float] | None = None
        self.ends: list[tuple[float, float]] = []

    def step_done(self, loss: Callable[[], float]) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append((time.process_time(), time.monotonic()))
        if self.first is None:
            self.first = (time.process_time(), time.time() - float(os.environ["STARTED"]))
        if len(self.ends) == WARM_UP + self.steps:
            self._report(loss())

    def _report(self, loss: float) -> None:
        assert self.first is not None
        intervals = list(zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:], strict=False))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        result = {
            "cpu": [after[0] - before[0] for before, after in intervals],
            "wall": [after[1] - before[1] for before, after in intervals],
            "first_cpu": self.first[0],
            "first_wall": self.first[1],
            "peak": peak,
            "loss": loss,
        }
        print(f"\n{MARK}{json.dumps(result)}", flush=True)
        os._exit(0)


class StepClock(Callback):
    """The clock as the last of a trainer's callbacks."""

    def __init__(self, steps: int, device: str) -> None:
        self.clock = Clock(steps, device)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.step_done(lambda: float(outputs["loss"]))


def run_contestant(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    work, (precision,) = SHAPES[arguments.shape], arguments.precision
    as_installed = "as installed" in arguments.contestant
    with ExitStack() as settings:
        if not as_installed and arguments.device == "cpu":
            keep_freed_memory()
            settings.enter_context(exact_products_by_onednn())
        if arguments.device == "cuda":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            settings.enter_context(sdpa_kernel(order, set_priority=True))
        ARMS[arguments.contestant](work, precision, Clock(arguments.steps, arguments.device), arguments)


def batches(work: Work, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(0, work.config.vocab_size, (work.rows, work.context + 1), generator=generator).to(device)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def update(loss: torch.Tensor, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step from its loss on."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def plain_loop(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    work: Work,
    precision: str,
    clock: Clock,
) -> None:
    for inputs, labels in batches(work, clock.device):
        with torch.autocast(clock.device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(inputs, labels)
        update(loss, module, optimizer)
        clock.step_done(loss.item)


def run_danube(work: Work, precision: str, clock: Clock, arguments: argparse.Namespace) -> None:
    """`fit` with pretrain/laptop, which has 32,000 pieces, too; only sources, shape and precision are others."""
    from lightning_danube.__main__ import main as command

    config = yaml.safe_load((ROOT / "configs" / "pretrain" / "laptop.yaml").read_text(encoding="utf-8"))
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    needed = (WARM_UP + arguments.steps + 2) * work.tokens
    texts = Path("texts.jsonl")
    with texts.open("w", encoding="utf-8") as file:
        for _ in range(max(200, needed // 500)):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=300))}) + "\n")
    data, model, trainer = config["data"]["init_args"], config["model"]["init_args"], config["trainer"]
    data |= {"context_length": work.context, "batch_tokens": work.tokens, "micro_batch_size": work.rows}
    data |= {"sources": {"words": {"path": str(texts.resolve())}}, "max_epochs": 100.0}
    data |= {"stages": [{"name": "all", "tokens": max(needed, 200_000), "mix": {"words": 1}}]}
    fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    model |= {
        "compile_blocks": "compiled" in arguments.contestant,
        "learning_rate": {"peak": 1e-3, "final": 0.0, "warmup": 0},
    }
    model |= {"decoder": {field: getattr(work.config, field) for field in fields}}
    trainer |= {"precision": "bf16-mixed" if precision == "bf16" else "32-true"}
    trainer |= {"accelerator": "gpu" if clock.device == "cuda" else "cpu", "devices": 1}
    trainer["callbacks"].append(
        {"class_path": "training.StepClock", "init_args": {"steps": arguments.steps, "device": clock.device}}
    )
    Path("config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    raise SystemExit(command(["fit", "--config", "config.yaml"]))


def run_plain(work: Work, precision: str, clock: Clock, arguments: argparse.Namespace) -> None:
    decoder = Decoder(work.config).to(clock.device)

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total, count = next_token_loss(decoder.hidden_states(inputs), decoder.lm_head.weight, labels)
        return total / count

    def loss_inside(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(decoder(inputs).flatten(0, 1), labels.flatten())

    whole = (
        torch.compile(loss_inside) if arguments.contestant == "danube, plain loop, compiled with its loss" else loss_of
    )
    plain_loop(decoder, AdamW().build(decoder, 3e-4), whole, work, precision, clock)


def transformers_model(work: Work) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = work.config
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            max_position_embeddings=work.context,
            tie_word_embeddings=c.tie_word_embeddings,
            use_cache=False,
        )
    )


def run_transformers(work: Work, precision: str, clock: Clock, arguments: argparse.Namespace) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Timed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step_done(lambda: float("nan"))

    rows = arguments.steps + WARM_UP + 1
    samples = [
        {"input_ids": row, "labels": row}
        for (ids, _), _ in zip(batches(work, "cpu"), range(rows), strict=False)
        for row in ids
    ]
    options = TrainingArguments(
        output_dir="transformers",
        per_device_train_batch_size=work.rows,
        max_steps=rows,
        bf16=precision == "bf16",
        use_cpu=clock.device == "cpu",
        report_to=[],
    )
    Trainer(transformers_model(work), options, train_dataset=samples, callbacks=[Timed()]).train()  # type: ignore[arg-type]


def run_transformers_plain(work: Work, precision: str, clock: Clock, arguments: argparse.Namespace) -> None:
    model = transformers_model(work).to(clock.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    plain_loop(model, optimizer, lambda x, _: model(input_ids=x, labels=x).loss, work, precision, clock)


def litgpt_model(work: Work) -> Any:
    from litgpt.config import Config
    from litgpt.model import GPT

    c = work.config
    return GPT(
        Config(
            block_size=work.context,
            padded_vocab_size=c.vocab_size,
            vocab_size=c.vocab_size,
            n_layer=c.num_hidden_layers,
            n_head=c.num_attention_heads,
            n_query_groups=c.num_key_value_heads,
            n_embd=c.hidden_size,
            head_size=c.head_dim,
            intermediate_size=c.intermediate_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )


def run_litgpt(work: Work, precision: str, clock: Clock, arguments: argparse.Namespace) -> None:
    from litgpt.utils import chunked_cross_entropy

    model = litgpt_model(work).to(clock.device)
    forward = torch.compile(model) if "compiled" in arguments.contestant else model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = chunked_cross_entropy(forward(inputs), labels)
        return loss

    plain_loop(model, optimizer, loss_of, work, precision, clock)


ARMS: dict[str, Callable[[Work, str, Clock, argparse.Namespace], None]] = {
    "danube": run_danube,
    "danube, plain loop": run_plain,
    "danube, compiled": run_danube,
    "danube, plain loop, compiled with its loss": run_plain,
    "transformers": run_transformers,
    "transformers as installed": run_transformers,
    "transformers, plain loop": run_transformers_plain,
    "LitGPT": run_litgpt,
    "LitGPT, compiled": run_litgpt,
}


if __name__ == "__main__":
    main()
