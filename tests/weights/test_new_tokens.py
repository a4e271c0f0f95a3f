"""Embeddings of tokens that a trained model does not know yet."""

import dataclasses
from pathlib import Path

import pytest
import torch

from lightning_danube.model import DecoderConfig
from lightning_danube.weights.adapters import base_digest, merge_adapter, save_adapter
from lightning_danube.weights.huggingface import load_hf, save_hf
from lightning_danube.weights.lora import Lora
from lightning_danube.weights.new_tokens import grow_vocabulary, set_rows, train_rows, trained_ids, trained_rows
from tests.tiny_models import CONFIG, TIED, tiny_decoder

IDS = torch.tensor([[3, 270, 274, 5, 271]])
BOTH = pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])


@BOTH
@torch.no_grad()
def test_old_tokens_stay_and_new_ones_begin_with_the_mean_of_their_pieces(config: DecoderConfig) -> None:
    decoder, before = tiny_decoder(config), tiny_decoder(config)
    grow_vocabulary(decoder, 275)
    set_rows(decoder, {270: [1, 2, 6], 274: [9]})  # the first is a row that pads the vocabulary
    assert decoder.config == dataclasses.replace(config, vocab_size=275)
    assert (decoder.lm_head.weight is decoder.model.embed_tokens.weight) == config.tie_word_embeddings
    old = [token for token in range(272) if token != 270]
    for now, then in (
        (decoder.model.embed_tokens.weight, before.model.embed_tokens.weight),
        (decoder.lm_head.weight, before.lm_head.weight),
    ):
        assert torch.equal(now[old], then[old])
        assert torch.allclose(now[270], (then[1] + then[2] + then[6]) / 3)
        assert torch.equal(now[274], then[9]) and not now[272:274].any()
    # A token of one piece is read and predicted as that piece.
    assert torch.equal(decoder(torch.tensor([[274, 5]])), decoder(torch.tensor([[9, 5]])))
    logits = decoder(torch.tensor([[4]]))
    assert torch.allclose(logits[..., 274], logits[..., 9], atol=1e-5)  # float32: another place in the product


def test_a_vocabulary_with_room_does_not_grow() -> None:
    decoder = tiny_decoder()
    weight = decoder.lm_head.weight
    grow_vocabulary(decoder, 272)
    assert decoder.lm_head.weight is weight and decoder.config is CONFIG


@BOTH
def test_beside_an_adapter_only_the_new_rows_train_and_they_merge(config: DecoderConfig, tmp_path: Path) -> None:
    decoder = tiny_decoder(config)
    grow_vocabulary(decoder, 275)
    Lora(rank=2, dropout=0.0).apply(decoder)
    digest = base_digest(decoder)
    train_rows(decoder, [270, 274])
    decoder._apply(lambda tensor: tensor.clone())  # moving a module must not untie or replace the rows
    assert base_digest(decoder) == digest and trained_ids(decoder) == [270, 274]
    others = {name: p for name, p in decoder.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert {tuple(rows.shape) for rows in others.values()} == {(2, 64)}
    assert len(others) == (1 if config.tie_word_embeddings else 2) == len(trained_rows(decoder))

    before = decoder.model.embed_tokens.weight.detach().clone()
    decoder(IDS).logsumexp(-1).sum().backward()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.1)
    after = decoder.model.embed_tokens.weight.detach()
    changed = (after != before).any(1).nonzero().flatten().tolist()
    assert changed == [270, 274]

    want = decoder(IDS)
    merge_adapter(decoder)
    # Merging rounds in another order of sums, in float32.
    assert torch.allclose(decoder(IDS), want, atol=1e-4)
    assert (decoder.lm_head.weight is decoder.model.embed_tokens.weight) == config.tie_word_embeddings
    save_hf(decoder, tmp_path / "merged")
    assert torch.equal(load_hf(tmp_path / "merged")(IDS), decoder(IDS))


@pytest.mark.medium
@BOTH
def test_peft_computes_the_same_with_an_exported_adapter(config: DecoderConfig, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_hf(tiny_decoder(config), tmp_path / "base")
    decoder = tiny_decoder(config)
    grow_vocabulary(decoder, 275)
    Lora(rank=2, dropout=0.0).apply(decoder)
    train_rows(decoder, [270, 274])
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(decoder, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base.resize_token_embeddings(275, mean_resizing=False)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(IDS).logits
    # Rows 272 and 273 are nobody's: theirs are random.
    known = [token for token in range(275) if token not in (272, 273)]
    assert torch.allclose(theirs[..., known], decoder(IDS)[..., known], atol=1e-4)  # float32, other order of sums
