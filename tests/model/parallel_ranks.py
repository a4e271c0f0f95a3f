"""Trains a tiny decoder on so many gloo processes and compares it with one: `python -m tests.model.parallel_ranks 2 1`.

Arguments: data-parallel replicas, devices of each. Forked, so that the imports are paid for once.
"""

import dataclasses
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_danube.model import Decoder, DecoderConfig, next_token_loss, token_losses
from lightning_danube.model.parallel import parallelize
from lightning_danube.training.optim import AdamW, Muon
from tests.ranks import on_ranks

CONFIG = DecoderConfig(32, 48, 2, 4, 2, vocab_size=40, head_dim=8)
STEPS, ROWS, CONTEXT = 3, 4, 12


# Weights of their own kinds: biases, which are divided, and gains of heads, which are not and see only some heads.
VARIANTS: tuple[dict[str, Any], ...] = ({"qkv_bias": True}, {"qk_norm": True}, {"sliding_window": 5})
COMPILED: tuple[dict[str, Any], ...] = ({}, {"tie_word_embeddings": True}, {"qk_norm": True})


def decoder_of(recompute: bool, **changes: Any) -> Decoder:
    torch.manual_seed(1)
    decoder = Decoder(dataclasses.replace(CONFIG, **changes)).double()
    for name, parameter in decoder.named_parameters():
        if name.endswith((".bias", "_norm.weight")):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    decoder.activation_checkpointing = recompute
    return decoder.train()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, CONFIG.vocab_size, (ROWS, CONTEXT + 1), generator=generator) for _ in range(STEPS)]


def train(decoder: Decoder, replicas: int, replica: int) -> list[tuple[float, float]]:
    """Loss over all replicas and norm of the gradient, of each step."""
    optimizer = AdamW().build(decoder, lr=1e-2)
    noted = []
    for ids in batches():
        mine = ids.chunk(replicas)[replica]
        labels = mine[:, 1:].clone()
        labels[:, 0] = -100
        total, count = next_token_loss(decoder.hidden_states(mine[:, :-1]), decoder.lm_head.weight, labels)
        loss = total / count
        loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 0.5)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if replicas > 1:
            dist.all_reduce(loss)  # devices of one replica have the same
            loss /= dist.get_world_size()
        noted.append((float(loss), float(norm)))
    return noted


def full(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def compare(replicas: int, devices: int, recompute: bool, compiled: bool = False, **changes: Any) -> None:
    alone = decoder_of(recompute, **changes)
    expected = train(alone, 1, 0)
    decoder = decoder_of(recompute, **changes)
    if compiled:
        decoder.compile_blocks()
    mesh = init_device_mesh("cpu", (replicas, devices), mesh_dim_names=("data_parallel", "tensor_parallel"))
    parallelize(decoder, mesh["data_parallel"], mesh["tensor_parallel"])
    weight: Any = dict(decoder.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    assert weight.to_local().numel() * replicas * devices == weight.numel()
    try:
        Muon().build(decoder, lr=1e-2)
    except ValueError as error:
        assert "Muon needs whole matrices" in str(error)
    else:
        raise AssertionError("Muon took sharded matrices")
    found = train(decoder, replicas, mesh["data_parallel"].get_local_rank())
    # Sums of float64 in another order.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-12, atol=0)
    named = dict(decoder.state_dict())
    assert named.keys() == alone.state_dict().keys()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(full(named[name]), tensor, rtol=1e-9, atol=1e-12)
    # What only looks: logits, nats of each token, as predict and samples ask for them.
    ids = batches()[0]
    with torch.no_grad():
        hidden = decoder.hidden_states(ids[:, :-1])
        nats = token_losses(hidden, decoder.lm_head.weight, ids[:, 1:])
        theirs = token_losses(alone.hidden_states(ids[:, :-1]), alone.lm_head.weight, ids[:, 1:])
        torch.testing.assert_close(nats, theirs, rtol=1e-9, atol=0)
        torch.testing.assert_close(decoder(ids), alone(ids), rtol=1e-9, atol=1e-12)


def compare_all(replicas: int, devices: int) -> None:
    for tied in (False, True):
        for recompute in (False, True):
            compare(replicas, devices, recompute, tie_word_embeddings=tied)
    for changes in VARIANTS:
        compare(replicas, devices, recompute=False, **changes)
    for compiled_changes in COMPILED:
        # A run has one decoder. From a second one the compiler would take sizes for variables, down to its limit of
        # recursion.
        torch._dynamo.reset()
        compare(replicas, devices, recompute=bool(compiled_changes), compiled=True, **compiled_changes)


if __name__ == "__main__":
    rows, columns = map(int, sys.argv[1:])
    on_ranks(lambda rank: compare_all(rows, columns), ranks=rows * columns)
