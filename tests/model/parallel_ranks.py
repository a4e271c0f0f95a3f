"""Trains a tiny decoder on so many gloo processes and compares it with one: `python -m tests.model.parallel_ranks 2 1`.

Arguments: data-parallel replicas, devices of each. Forked, so that the imports are paid for once.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_danube.model import Decoder, DecoderConfig, next_token_loss, token_losses
from lightning_danube.model.parallel import Sharding, deal_over_replicas, gradients_kept_apart, parallelize
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


def batches(rows: int = ROWS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, CONFIG.vocab_size, (rows, CONTEXT + 1), generator=generator) for _ in range(STEPS)]


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


# --- FSDP2 with bfloat16 products, hybrid layouts, and several micro-batches a step -----------------------------------


def train_in_parts(
    decoder: Decoder, replicas: int, replica: int, parts: int, products: torch.dtype | None, in_full: bool = True
) -> Decoder:
    """Three steps of AdamW, each over several micro-batches, as the trainer runs them."""
    optimizer = AdamW().build(decoder, lr=1e-2)
    for ids in batches(rows=8):
        micro = list(ids.chunk(parts * replicas))[replica::replicas]
        for number, mine in enumerate(micro, start=1):
            delayed = gradients_kept_apart(decoder, in_full=in_full) if number < len(micro) else nullcontext()
            cast = nullcontext() if products is None else torch.autocast("cpu", products)
            with delayed, cast:
                hidden = decoder.hidden_states(mine[:, :-1])  # gathers the head as well
                total, count = next_token_loss(hidden, decoder.lm_head.weight, mine[:, 1:])
                (total / count / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoder


@contextmanager
def sent() -> Iterator[Counter[tuple[str, torch.dtype]]]:
    """Counts the collective operations of FSDP2 by what they do and the type of the numbers."""
    counts: Counter[tuple[str, torch.dtype]] = Counter()
    # Since PyTorch 2.13 FSDP2 calls the first two by new names.
    new = hasattr(dist, "all_gather_single")
    names = {
        "all_gather_single" if new else "all_gather_into_tensor": "gather",
        "reduce_scatter_single" if new else "reduce_scatter_tensor": "reduce",
        "all_reduce": "sum over groups",
    }
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            counts[names[name], tensor.dtype] += 1
            return originals[name](*args, **kwargs)

        return collective

    try:
        for name in names:
            setattr(dist, name, counting(name))
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def mesh_of(groups: int, shards: int) -> DeviceMesh:
    if groups == 1:
        return init_device_mesh("cpu", (shards,))
    return init_device_mesh("cpu", (groups, shards), mesh_dim_names=("groups", "shards"))


def compare_in_parts(groups: int, shards: int, products: torch.dtype | None, gather_again: bool = True) -> None:
    """Trains on groups x shards replicas and alone, from float32 weights; compares weights and what was sent.

    Two micro-batches a step on each replica: gradients are sent after the second only, in float32.
    """
    replicas, parts, layers = groups * shards, 2, CONFIG.num_hidden_layers
    decoder = decoder_of(False).float()
    mesh = mesh_of(groups, shards)
    deal_over_replicas(decoder, mesh, Sharding(products, gather_again))
    with sent() as counts:
        train_in_parts(decoder, replicas, dist.get_rank(), parts, products)
    expected: Counter[tuple[str, torch.dtype]] = Counter()
    if shards > 1:
        # Blocks are gathered for each pass, the root (embedding, last norm, head) once a micro-batch.
        expected["gather", products or torch.float32] = STEPS * parts * ((2 if gather_again else 1) * layers + 1)
        expected["reduce", torch.float32] = STEPS * (layers + 1)
    if groups > 1:
        expected["sum over groups", torch.float32] = STEPS * (layers + 1)
    assert counts == expected, counts
    assert {tensor.dtype for tensor in decoder.state_dict().values()} == {torch.float32}
    exact = train_in_parts(decoder_of(False).float(), 1, 0, parts * replicas, None)
    if products is None:
        assert distance(decoder, exact) < 1e-6  # sums of float32 in another order
    else:
        # As far from float32 as one process with autocast is: each rounds in other places.
        alone = train_in_parts(decoder_of(False).float(), 1, 0, parts * replicas, products)
        assert distance(decoder, exact) < 1.5 * distance(alone, exact)


def compare_partial_sums(products: torch.dtype | None) -> None:
    """2 groups of 2: each micro-batch is summed within its group, and over the groups only after the second."""
    whole, partial = (decoder_of(False).float() for _ in range(2))
    for decoder in (whole, partial):
        deal_over_replicas(decoder, mesh_of(2, 2), Sharding(products))
    train_in_parts(whole, 4, dist.get_rank(), 2, products)
    with sent() as counts:
        train_in_parts(partial, 4, dist.get_rank(), 2, products, in_full=False)
    assert counts["reduce", torch.float32] == 2 * counts["sum over groups", torch.float32]
    assert counts["sum over groups", torch.float32] == STEPS * (CONFIG.num_hidden_layers + 1)
    theirs = {name: full(tensor) for name, tensor in whole.state_dict().items()}
    for name, tensor in partial.state_dict().items():
        # Sums of float32 in another order; AdamW's first steps turn a tiny gradient into a whole step.
        torch.testing.assert_close(full(tensor), theirs[name], rtol=1e-4, atol=1e-5)


def distance(decoder: Decoder, other: Decoder) -> float:
    """Norm of the difference of all weights, relative to the norm of the weights."""
    pairs = [(full(tensor), other.state_dict()[name]) for name, tensor in decoder.state_dict().items()]
    difference, size = sum((a - b).square().sum() for a, b in pairs), sum(b.square().sum() for _, b in pairs)
    return float((difference / size) ** 0.5)


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
