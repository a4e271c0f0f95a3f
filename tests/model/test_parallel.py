"""The decoder spread over devices is the decoder on one: losses, gradients, weights after AdamW, logits, in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_danube.model import DecoderConfig
from lightning_danube.model.parallel import check_tensor_parallel
from tests.model.parallel_ranks import compare, compare_in_parts, compare_partial_sums
from tests.ranks import on_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "devices"), [(2, 1), (1, 2), (2, 2)])
def test_many_processes_compute_what_one_does(replicas: int, devices: int) -> None:
    """Tied and untied, with and without activation checkpointing, with biases, norms of heads and a window; see
    parallel_ranks.py."""
    command = [sys.executable, "-m", "tests.model.parallel_ranks", str(replicas), str(devices)]
    done = subprocess.run(command, cwd=ROOT, timeout=900, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_devices_that_do_not_divide_a_decoder_are_refused() -> None:
    config = DecoderConfig.preset("danube3-4b")
    for devices in (1, 2, 4, 8):
        check_tensor_parallel(config, devices)
    with pytest.raises(
        ValueError, match="tensor_parallel_size 16 does not divide num_key_value_heads 8: 2, 4, 8 would"
    ):
        check_tensor_parallel(config, 16)
    with pytest.raises(ValueError, match="tensor_parallel_size 3 does not divide num_key_value_heads 8: 2 would"):
        check_tensor_parallel(config, 3)
    config = DecoderConfig(32, 48, 2, 4, 1, vocab_size=40, head_dim=8)
    with pytest.raises(ValueError, match="tensor_parallel_size 2 does not divide num_key_value_heads 1: use 1"):
        check_tensor_parallel(config, 2)


def test_a_vocabulary_or_a_feed_forward_that_does_not_divide_is_refused() -> None:
    for changes, message in (
        ({"vocab_size": 41}, "tensor_parallel_size 4 does not divide vocab_size 41: use 1"),
        ({"vocab_size": 42}, "tensor_parallel_size 4 does not divide vocab_size 42: 2 would work"),
        ({"intermediate_size": 50}, "tensor_parallel_size 4 does not divide intermediate_size 50: 2 would work"),
    ):
        shape = {"intermediate_size": 48, "vocab_size": 40, **changes}
        config = DecoderConfig(32, shape["intermediate_size"], 2, 4, 4, vocab_size=shape["vocab_size"], head_dim=8)
        with pytest.raises(ValueError, match=message):
            check_tensor_parallel(config, 4)


def test_two_devices_compute_what_one_does() -> None:
    """With norms of heads and a tied head; the slow test above has all the rest."""
    on_ranks(lambda rank: compare(1, 2, recompute=False, qk_norm=True, tie_word_embeddings=True))


def test_two_replicas_compute_what_one_does() -> None:
    on_ranks(lambda rank: compare(2, 1, recompute=True, qkv_bias=True))


def test_weights_are_gathered_in_bfloat16_and_gradients_summed_once_a_step_in_float32() -> None:
    on_ranks(lambda rank: compare_in_parts(1, 2, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("products", [None, torch.bfloat16])
@pytest.mark.parametrize(("groups", "shards"), [(1, 2), (2, 2), (4, 1)])
def test_groups_of_replicas_train_what_one_process_does(groups: int, shards: int, products: torch.dtype | None) -> None:
    def work(rank: int) -> None:
        compare_in_parts(groups, shards, products)
        compare_in_parts(groups, shards, products, gather_again=False)
        if groups > 1 and shards > 1:
            compare_partial_sums(products)

    on_ranks(work, groups * shards)
