import pytest
import torch

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.training.optim import AdamW, parameter_groups


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_and_embeddings_and_norms_do_not(tied: bool) -> None:
    decoder = Decoder(DecoderConfig(16, 32, 2, 2, 1, vocab_size=50, tie_word_embeddings=tied))
    decayed, others = parameter_groups(decoder, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    assert all("proj" in names[id(p)] or names[id(p)] == "lm_head.weight" for p in decayed["params"])
    assert all("norm" in names[id(p)] or "embed" in names[id(p)] for p in others["params"])
    counted = len(decayed["params"]) + len(others["params"])
    assert counted == len(names) == len({id(p) for p in [*decayed["params"], *others["params"]]})


def test_what_is_frozen_is_not_optimized() -> None:
    decoder = Decoder(DecoderConfig(16, 32, 2, 2, 1, vocab_size=50))
    decoder.model.embed_tokens.requires_grad_(False)
    optimizer = AdamW().build(decoder, lr=0.1)
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.95)
