"""What FP8 products change in a short training run, beside bfloat16 and float32; by torchao's emulation, on a CPU.

    make test-kernels ARGS=--collect-only    installs torchao into .venv/kernels
    PYTHONPATH=.venv/kernels python benchmarks/float8.py

The emulation rounds to 8 bits as a GPU does and multiplies the rounded values in bfloat16. It says nothing of speed.
The text is Python's own reference, which comes with every Python. All arms of a seed have the same weights and batches.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pydoc_data.topics import topics

import torch
from machine import described, write_result
from torch import Tensor

from lightning_danube.intervals import student
from lightning_danube.model import Decoder, DecoderConfig, next_token_loss
from lightning_danube.pretraining.float8 import multiply_in_float8
from lightning_danube.terminal import markdown_table
from lightning_danube.tokens.tokenizer import DANUBE_SMALL
from lightning_danube.weights.tokenizers import document_tokenizer

ARMS = ("float32", "bfloat16", "float8")
ROWS, CONTEXT, PEAK, WARMUP = 8, 128, 1e-3, 20
SHAPE = DecoderConfig(128, 384, 4, 4, 2, vocab_size=4096, max_position_embeddings=CONTEXT)


@contextmanager
def autocast() -> Iterator[None]:
    """bfloat16 for the layers that stay, and for torchao's, which read CUDA's autocast type on a CPU, too."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def text() -> tuple[Tensor, Tensor]:
    """Returns rows of training and held-out tokens, (N, CONTEXT + 1)."""
    documents = document_tokenizer(DANUBE_SMALL).encode_documents([topic for _, topic in sorted(topics.items())])
    ids = [int(token) for document in documents for token in document]
    rows_NT = torch.tensor(ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)]).view(-1, CONTEXT + 1)
    held_out_N = torch.arange(len(rows_NT)) % 10 == 9
    return rows_NT[~held_out_N], rows_NT[held_out_N]


def loss_of(decoder: Decoder, rows_BT: Tensor) -> Tensor:
    hidden_BTD = decoder.hidden_states(rows_BT[:, :-1])
    total, count = next_token_loss(hidden_BTD, decoder.lm_head.weight, rows_BT[:, 1:])
    return total / count


def train(arm: str, seed: int, steps: int) -> tuple[float, float]:
    """Returns nats/token: the training loss of the last tenth of the steps, and the held-out loss."""
    torch.manual_seed(seed)
    decoder = Decoder(SHAPE).train()
    if arm == "float8":
        multiply_in_float8(decoder, emulate=True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    rows_NT, held_out_NT = text()
    order = torch.randint(len(rows_NT), (steps, ROWS), generator=torch.Generator().manual_seed(seed))
    losses, precision = [], nullcontext if arm == "float32" else autocast
    for step in range(steps):
        decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / WARMUP, 0.1 + 0.9 * decay)
        # Entered in each step: autocast keeps its copies of the weights until it is left.
        with precision():
            loss = loss_of(decoder, rows_NT[order[step]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    with torch.no_grad(), precision():
        held_out = statistics.fmean(float(loss_of(decoder, some)) for some in held_out_NT.split(ROWS))
    return statistics.fmean(losses[-max(1, steps // 10) :]), held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    found = {}
    for seed in range(arguments.seeds):
        for arm in ARMS:
            found[arm, seed] = train(arm, seed, arguments.steps)
            print(arm, seed, *found[arm, seed], flush=True)
    rows = []
    for arm in ARMS:
        training, held_out = zip(*(found[arm, seed] for seed in range(arguments.seeds)), strict=True)
        differences = [found[arm, seed][1] - found["bfloat16", seed][1] for seed in range(arguments.seeds)]
        beside = "" if arm == "bfloat16" else f"{statistics.fmean(differences):+.4f} ({spread(differences)})"
        rows.append([arm, f"{statistics.fmean(training):.4f}", f"{statistics.fmean(held_out):.4f}", beside])
    header = ["products of the blocks", "training loss, last tenth", "held-out loss", "held-out less bfloat16's"]
    where = described("torch", "torchao")
    what = (
        f"{arguments.steps} steps of {ROWS} × {CONTEXT} tokens, {arguments.seeds} seeds, {SHAPE.parameters:,} "
        f"parameters ({SHAPE.num_hidden_layers} layers × {SHAPE.hidden_size}), nats/token; 95 % intervals "
        "over the seeds' differences; FP8 by emulation"
    )
    write_result("float8", f"# FP8 products in a short run\n\n{where}\n\n{what}\n\n{markdown_table(header, rows)}")


def spread(differences: list[float]) -> str:
    estimate = student(differences)
    return f"{estimate.low:+.4f} to {estimate.high:+.4f}"


if __name__ == "__main__":
    main()
