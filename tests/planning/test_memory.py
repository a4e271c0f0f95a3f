"""What training takes, by arithmetic, against what autograd keeps; whole steps are in benchmarks/plan_memory.py."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.planning.memory import BYTES, Layout, TrainingMemory
from lightning_danube.training.optim import Muon

TINY = DecoderConfig(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    vocab_size=80,
)
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def kept_for_backward(config: DecoderConfig, precision: str, recompute: bool, rows: int, context: int) -> int:
    """Bytes that autograd holds after the forward pass, weights and token ids left out."""
    decoder = Decoder(config).to(DTYPES[precision])
    decoder.activation_checkpointing = recompute
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        decoder.hidden_states(torch.randint(0, config.vocab_size, (rows, context)))
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_what_is_kept_for_the_backward_pass_is_counted_to_the_byte(precision: str, recompute: bool) -> None:
    memory = TrainingMemory(TINY, rows=2, context=48, precision=precision, recompute=recompute)
    copies = 0 if recompute else memory.cast_bytes(TINY.num_hidden_layers)
    assert memory.kept_bytes() + copies == kept_for_backward(TINY, precision, recompute, 2, 48)


@pytest.mark.parametrize("changes", [{"qkv_bias": True}, {"qk_norm": True}, {"nope_interval": 2}])
@pytest.mark.parametrize("precision", DTYPES)
def test_what_variants_keep_is_counted(precision: str, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **changes)
    memory = TrainingMemory(config, rows=2, context=48, precision=precision)
    copies = memory.cast_bytes(TINY.num_hidden_layers)
    kept = kept_for_backward(config, precision, False, 2, 48)
    assert memory.kept_bytes() + copies == kept
    peak = memory.loss_phase()
    assert peak.weights == memory.weight_bytes * config.parameters


@pytest.mark.parametrize(("window", "masks"), [(48, 0), (47, 48 * 48), (None, 0)])
def test_a_window_shorter_than_the_context_costs_a_mask(window: int | None, masks: int) -> None:
    config = dataclasses.replace(TINY, sliding_window=window)
    assert TrainingMemory(config, rows=2, context=48).mask_bytes() == masks
    assert TrainingMemory(config, rows=2, context=48, document_masks=True).mask_bytes() == 2 * 48 * 48
    mask = Decoder(config).model.mask(None, torch.zeros(2, 48, dtype=torch.long))
    assert (0 if mask is None else mask.untyped_storage().nbytes()) == masks


@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_moments_follow_the_number_of_parameters(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    peak = TrainingMemory(config, 2, 48, "32-true").loss_phase()
    assert peak.weights == peak.gradients == peak.optimizer // 2 == 4 * config.parameters
    assert peak.total == sum(getattr(peak, part) for part in peak.PARTS)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True}])
def test_muon_keeps_what_is_counted(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **changes)
    decoder = Decoder(config)
    optimizer = Muon().build(decoder, lr=0.1)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert TrainingMemory(config, 2, 48, muon=True).loss_phase().optimizer == 4 * kept


def test_the_papers_4b_as_computed_by_hand() -> None:
    memory = TrainingMemory(DecoderConfig.preset("danube3-4b"), 2, 8192, "bf16-mixed", recompute=True, gpu=True)
    peak = memory.loss_phase()
    assert (peak.weights, peak.optimizer) == (4 * 3_961_839_360, 8 * 3_961_839_360)
    # 24 block inputs of 2 × 8192 × 3840 floats, the last norm's input and factors, cosines and sines, and the hidden
    # states in 32 and 16 bits.
    tokens, width = 2 * 8192, 3840
    norm, rotary = tokens * (4 * width + 4), 2 * 8192 * 120 * 4
    assert peak.activations == 24 * tokens * width * 4 + norm + rotary + tokens * width * 6
    # Of the head; a block's are made again with it. A block: 2 × 3840 × (32 + 8) × 120 + 3 × 3840 × 10240 weights.
    assert peak.casts == 2 * 122_880_000
    assert memory.cast_bytes(1) == 2 * 154_828_800


def test_sharding_divides_what_is_stored_and_ddp_doubles_gradients() -> None:
    alone = TrainingMemory(TINY, 2, 48).loss_phase()
    ddp = TrainingMemory(TINY, 2, 48, layout=Layout(4)).loss_phase()
    sharded = TrainingMemory(TINY, 2, 48, layout=Layout(4, sharded=True)).loss_phase()
    assert ddp.weights == alone.weights and ddp.communication == ddp.gradients == alone.gradients
    assert (sharded.weights, sharded.optimizer) == (-(-TINY.parameters // 4) * 4, -(-TINY.parameters // 4) * 8)
    assert sharded.activations == alone.activations


def test_tensor_parallelism_divides_matrices_and_what_is_between_them() -> None:
    one, two = (TrainingMemory(TINY, 2, 48, layout=Layout(1, n, sharded=True)) for n in (1, 2))
    gains = (2 * TINY.num_hidden_layers + 1) * TINY.hidden_size
    assert 2 * (two.parameters - gains) == one.parameters - gains
    assert one.block_bytes() / 2 < two.block_bytes() < one.block_bytes()
    assert two.loss_phase().logits < one.loss_phase().logits


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision is 'transformer-engine'; memory is known for 32-true, "):
        TrainingMemory(TINY, 1, 8, "transformer-engine")
    assert set(DTYPES) < set(BYTES)
