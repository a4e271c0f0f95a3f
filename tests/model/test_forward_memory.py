import dataclasses
import re

import torch
from torch.autograd.graph import saved_tensors_hooks

from lightning_danube.model import Decoder, DecoderConfig, KVCache
from lightning_danube.model.forward_memory import forward_memory

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101)


def test_the_line_has_the_sum_of_its_parts_in_the_models_type() -> None:
    config = DecoderConfig.preset("danube3-500m")
    with torch.device("meta"):
        decoder = Decoder(config).to(torch.bfloat16)
    line = forward_memory(decoder, 8192, head_rows=256, cached=True)
    total, *parts = (float(number) for number in re.findall(r"(\d+\.\d+)", line))
    assert line.startswith("at most 8,192 tokens a batch, about ") and abs(sum(parts) - total) < 0.07
    assert parts[0] == round(2 * config.parameters / 1e9, 2)
    # 16 layers of 8 key-value heads of 96 channels, keys and values of two bytes.
    assert parts[1] == round(8192 * 16 * 2 * 8 * 96 * 2 / 1e9, 2)
    assert "keys" not in forward_memory(decoder, 8192, head_rows=256, cached=False)


def test_tied_weights_count_once_and_the_cache_to_the_byte() -> None:
    decoder = Decoder(dataclasses.replace(CONFIG, tie_word_embeddings=True, vocab_size=100_000))
    assert "weights 0.03," in forward_memory(decoder, 8, head_rows=8, cached=True)
    assert decoder.config.cache_bytes(40, 4) == KVCache.for_decoder(decoder, 4, 10).nbytes


def test_a_pass_is_estimated_above_what_one_block_makes() -> None:
    """Everything that one block would keep for a backward pass exists at some moment of the forward pass."""
    decoder = Decoder(dataclasses.replace(CONFIG, num_hidden_layers=1))
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder.hidden_states(torch.zeros(4, 64, dtype=torch.long))
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    kept = sum(size for place, size in held.items() if place not in weights)
    estimate = CONFIG.forward_bytes(256, 0, 4)
    assert kept / 3 < estimate < 3 * kept
