"""Whether `plan`'s memory of DDP, FSDP2 and tensor parallelism is what two gloo processes take.

    python benchmarks/plan_memory_ranks.py

Two steps of a random decoder on each of two forked processes, without the Trainer; bytes are torch's own count of its
allocations on rank zero, at their peak. See plan_memory.py for one process.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from machine import described, write_result
from plan_memory import MiB, shape_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from lightning_danube.model import Decoder, DecoderConfig, next_token_loss
from lightning_danube.model.parallel import Sharding, gradients_kept_apart, parallelize
from lightning_danube.planning.memory import Layout, TrainingMemory
from lightning_danube.training.optim import AdamW

CASES = [
    # name, layout, precision, activation checkpointing, vocabulary, micro-batches of a step
    ("DDP", Layout(2), "32-true", False, 8192, 1),
    ("DDP", Layout(2), "bf16-mixed", True, 512, 1),
    ("FSDP2", Layout(2, sharded=True), "32-true", False, 8192, 1),
    ("FSDP2", Layout(2, sharded=True), "bf16-mixed", False, 8192, 1),
    ("FSDP2", Layout(2, sharded=True), "bf16-mixed", True, 8192, 1),
    ("FSDP2", Layout(2, sharded=True), "bf16-mixed", True, 512, 1),
    ("FSDP2, gathered once", Layout(2, sharded=True, gather_again=False), "bf16-mixed", True, 512, 1),
    ("FSDP2", Layout(2, sharded=True), "bf16-mixed", True, 8192, 2),
    ("FSDP2, summed each time", Layout(2, sharded=True, reduce_once=False), "bf16-mixed", True, 8192, 2),
    ("tensor parallel", Layout(1, 2, sharded=True), "32-true", False, 8192, 1),
    ("tensor parallel", Layout(1, 2, sharded=True), "bf16-mixed", True, 8192, 1),
]
CONTEXT, ROWS = 512, 2


class Loss(nn.Module):
    """As a task computes it, for DDP to wrap."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.decoder.hidden_states(ids[:, :-1])
        total, count = next_token_loss(hidden, self.decoder.lm_head.weight, ids[:, 1:])
        return total / count


def train(config: DecoderConfig, layout: Layout, precision: str, recompute: bool, micro_batches: int) -> None:
    torch.manual_seed(0)
    decoder = Decoder(config)
    decoder.activation_checkpointing = recompute
    loss_of: nn.Module = Loss(decoder)
    if layout.sharded:
        mesh = init_device_mesh("cpu", (layout.replicas, layout.tensor_parallel), mesh_dim_names=("data", "tensor"))
        products = torch.bfloat16 if precision == "bf16-mixed" else None
        parallelize(decoder, mesh["data"], mesh["tensor"], Sharding(products, layout.gather_again))
    else:
        loss_of = DistributedDataParallel(loss_of, gradient_as_bucket_view=True)
    optimizer = AdamW().build(decoder, lr=1e-3)
    ids = torch.randint(0, config.vocab_size, (ROWS, CONTEXT + 1))
    for micro_batch in range(2 * micro_batches):
        last = (micro_batch + 1) % micro_batches == 0
        delayed = nullcontext() if last else gradients_kept_apart(decoder, in_full=layout.reduce_once)
        with delayed:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = loss_of(ids)
            if micro_batch % micro_batches == 0:
                optimizer.zero_grad()  # after the forward pass, as the Trainer does it
            loss.backward()
        if last:
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()


def peak(config: DecoderConfig, *case: Any) -> int:
    gc.collect()  # what the case before it has left must not be freed while this one is counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(config, *case)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def rank(number: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=number, world_size=2)
    torch.set_num_threads(1)
    rows = []
    for name, layout, precision, recompute, vocabulary, micro_batches in CASES:
        config = shape_of(("deep",)).with_data(vocabulary, CONTEXT)
        measured = peak(config, layout, precision, recompute, micro_batches) / MiB
        memory = TrainingMemory(
            config, ROWS, CONTEXT, precision, recompute=recompute, accumulate=micro_batches > 1, layout=layout
        ).peak()
        rows.append(
            f"| {name} on 2 | {vocabulary:,} | {micro_batches} | {precision} | {'yes' if recompute else 'no'} | "
            f"{memory.total / MiB:,.1f} | "
            f"{measured:,.1f} | {100 * (memory.total / MiB / measured - 1):+.1f} % | {memory.moment} |"
        )
        dist.barrier()
    if number == 0:
        header = (
            "| layout | vocabulary | micro-batches | precision | recompute | planned MiB | tensors | plan to tensors | "
            "peak in |"
        )
        write_result(
            "plan-memory-ranks",
            "\n".join([described("torch"), "", header, "|---|---|---|---|---|---|---|---|---|", *rows]),
        )
    dist.destroy_process_group()


def main() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for number in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                rank(number, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main())
