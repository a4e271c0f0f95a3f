"""Whether `plan`'s memory is what training takes: planned bytes beside those of processes that train.

    python benchmarks/plan_memory.py [--cases 1 4]

Each case is a separate process, which trains two steps of a random decoder by the task and the Trainer of `fit`,
after a tiny one has loaded all libraries. "process" is the growth of its resident memory at its peak; glibc is told to
give freed blocks back, so that it is what is alive. "tensors" is the same by torch's own count of its allocations, in a
second training: what lies between is memory of the kernels (packed matrices), which no plan can know.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import described, write_result

from lightning_danube.model import DecoderShape
from lightning_danube.planning.memory import TrainingMemory
from lightning_danube.training.optim import AdamW, Muon

MiB = 2**20
SHAPES = {
    "deep": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6},
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8},
}
CASES: list[tuple[str, int, int, int, int, str, bool]] = [
    # shape (with " by Muon", or tied), vocabulary, context, rows, micro-batches, precision, activation checkpointing
    ("deep", 8192, 512, 2, 1, "32-true", False),
    ("deep", 8192, 512, 2, 2, "32-true", True),
    ("deep", 8192, 512, 2, 2, "bf16-mixed", False),
    ("deep", 8192, 512, 2, 1, "bf16-mixed", True),
    ("deep", 8192, 512, 4, 1, "bf16-true", False),
    ("deep", 8192, 512, 4, 2, "bf16-true", True),
    ("wide", 32000, 256, 2, 1, "32-true", False),
    ("wide", 32000, 256, 2, 1, "bf16-mixed", False),
    ("wide", 32000, 256, 2, 2, "bf16-true", True),
    # Few words and many tokens: the backward pass needs most.
    ("deep", 512, 1024, 2, 2, "bf16-mixed", False),
    ("deep", 512, 1024, 2, 2, "32-true", True),
    ("deep", 512, 1024, 4, 2, "bf16-true", True),
    # Few tokens: the optimizer's step needs most.
    ("deep, Muon", 512, 64, 1, 1, "32-true", False),
    ("tied", 8192, 512, 2, 1, "32-true", False),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(1, len(CASES) + 1), help="numbers of them, from 1"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(tuple(json.loads(arguments.measure)))))
        return
    rows = []
    for case in (CASES[number - 1] for number in arguments.cases):
        shape, vocabulary, context, micro_rows, micro_batches, precision, recompute = case
        peak = planned(case).peak()
        found = json.loads(
            subprocess.run(
                [sys.executable, __file__, "--measure", json.dumps(case)], check=True, capture_output=True, text=True
            ).stdout.splitlines()[-1]
        )
        process, tensors = found["process"] / MiB, found["tensors"] / MiB
        plan = peak.total / MiB
        rows.append(
            f"| {shape}, {vocabulary:,} | {micro_batches} × {micro_rows} × {context} | {precision} | "
            f"{'yes' if recompute else 'no'} | {plan:,.1f} | {tensors:,.1f} | {process:,.1f} | "
            f"{100 * (plan / tensors - 1):+.1f} % | {100 * (plan / process - 1):+.1f} % | {peak.moment} |"
        )
        print(rows[-1], flush=True)
    lines = [
        described("torch", "lightning"),
        "",
        "| shape, vocabulary | micro-batches × rows × context | precision | recompute | planned MiB | tensors | "
        "process | plan to tensors | plan to process | peak in |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    write_result("plan-memory", "\n".join(lines))


def shape_of(case: tuple[Any, ...]) -> DecoderShape:
    name = "deep" if case[0] == "tied" else case[0].partition(",")[0]
    return DecoderShape(**SHAPES[name], num_key_value_heads=2, tie_word_embeddings=case[0] == "tied")


def optimizer_of(case: tuple[Any, ...]) -> AdamW:
    return Muon() if case[0].endswith("Muon") else AdamW()


def planned(case: tuple[Any, ...]) -> TrainingMemory:
    _, vocabulary, context, rows, micro_batches, precision, recompute = case
    config = shape_of(case).with_data(vocabulary, context)
    optimizer = optimizer_of(case)
    return TrainingMemory(
        config,
        rows,
        context,
        precision,
        recompute,
        accumulate=micro_batches > 1,
        averages=optimizer.averages,
        orthogonalizes=optimizer.orthogonalizes,
    )


# --- in a separate process ------------------------------------------------------------------------------------------


def measured(case: tuple[Any, ...]) -> dict[str, int]:
    """Bytes of the process and of torch's tensors at their peaks."""
    from torch.profiler import ProfilerActivity, profile

    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: bigger blocks go back when they are freed
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    _, vocabulary, context, rows, micro_batches, precision, recompute = case
    train(DecoderShape(32, 64, 1, 2, 1), 64, 16, 2, 1, precision, recompute, optimizer_of(case))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    train(shape_of(case), vocabulary, context, rows, micro_batches, precision, recompute, optimizer_of(case))
    process = status("VmHWM") - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(shape_of(case), vocabulary, context, rows, micro_batches, precision, recompute, optimizer_of(case))
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = tensors = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        tensors = max(tensors, alive)
    return {"process": process, "tensors": tensors}


def train(
    shape: DecoderShape,
    vocabulary: int,
    context: int,
    rows: int,
    micro_batches: int,
    precision: Any,
    recompute: bool,
    optimizer: AdamW,
) -> None:
    """Two optimizer steps: in the second, moments and the gradients of the first are there."""
    from lightning.pytorch import LightningDataModule, Trainer
    from torch.utils.data import DataLoader

    from lightning_danube.pretraining.task import Pretraining
    from lightning_danube.training.optim import LearningRate

    torch.manual_seed(0)
    batch_tokens = rows * context * micro_batches
    task = Pretraining(
        LearningRate(1e-4, 1e-5, 0), decoder=shape, vocab_size=vocabulary, context_length=context,
        batch_tokens=batch_tokens, total_tokens=2 * batch_tokens, activation_checkpointing=recompute,
        optimizer=optimizer,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ids = torch.randint(0, vocabulary, (2 * micro_batches, rows, context + 1))
    batches = [{"input_ids": both[:, :-1], "labels": both[:, 1:], "step_labels": batch_tokens} for both in ids]

    class Rows(LightningDataModule):
        """What a task asks of its data, see training/contract.py."""

        def __init__(self) -> None:
            super().__init__()
            self.vocab_size, self.context_length = vocabulary, context
            self.batch_tokens, self.total_tokens, self.total_steps = batch_tokens, 2 * batch_tokens, 2

        def accumulation(self, replicas: int) -> int:
            return micro_batches

        def train_dataloader(self) -> Any:
            return DataLoader(batches, batch_size=None)

    trainer.fit(task, datamodule=Rows())


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
