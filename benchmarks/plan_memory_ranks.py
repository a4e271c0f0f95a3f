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
from lightning_danube.model.parallel import parallelize
from lightning_danube.planning.memory import Layout, TrainingMemory
from lightning_danube.training.optim import AdamW

CASES = [
    # name, layout, precision, activation checkpointing
    ("DDP", Layout(2), "32-true", False),
    ("FSDP2", Layout(2, sharded=True), "32-true", False),
    ("FSDP2", Layout(2, sharded=True), "bf16-mixed", False),
    ("FSDP2", Layout(2, sharded=True), "bf16-mixed", True),
    ("tensor parallel", Layout(1, 2, sharded=True), "32-true", False),
    ("tensor parallel", Layout(1, 2, sharded=True), "bf16-mixed", True),
]
VOCABULARY, CONTEXT, ROWS = 8192, 512, 2


class Loss(nn.Module):
    """As a task computes it, for DDP to wrap."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.decoder.hidden_states(ids[:, :-1])
        total, count = next_token_loss(hidden, self.decoder.lm_head.weight, ids[:, 1:])
        return total / count


def train(config: DecoderConfig, layout: Layout, precision: str, recompute: bool) -> None:
    torch.manual_seed(0)
    decoder = Decoder(config)
    decoder.activation_checkpointing = recompute
    loss_of: nn.Module = Loss(decoder)
    if layout.sharded:
        mesh = init_device_mesh("cpu", (layout.replicas, layout.tensor_parallel), mesh_dim_names=("data", "tensor"))
        parallelize(decoder, mesh["data"], mesh["tensor"])
    else:
        loss_of = DistributedDataParallel(loss_of)
    optimizer = AdamW().build(decoder, lr=1e-3)
    ids = torch.randint(0, config.vocab_size, (ROWS, CONTEXT + 1))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = loss_of(ids)
        optimizer.zero_grad()  # after the forward pass, as the Trainer does it
        loss.backward()
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
    config = shape_of(("deep",)).with_data(VOCABULARY, CONTEXT)
    rows = []
    for name, layout, precision, recompute in CASES:
        measured = peak(config, layout, precision, recompute) / MiB
        memory = TrainingMemory(config, ROWS, CONTEXT, precision, recompute=recompute, layout=layout).peak()
        rows.append(
            f"| {name} on 2 | {precision} | {'yes' if recompute else 'no'} | {memory.total / MiB:,.1f} | "
            f"{measured:,.1f} | {100 * (memory.total / MiB / measured - 1):+.1f} % | {memory.moment} |"
        )
        dist.barrier()
    if number == 0:
        header = "| layout | precision | recompute | planned MiB | tensors | plan to tensors | peak in |"
        write_result(
            "plan-memory-ranks", "\n".join([described("torch"), "", header, "|---|---|---|---|---|---|---|", *rows])
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
