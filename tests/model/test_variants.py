"""Decoders of other families against transformers' own classes, on the same random weights, and in every way to run."""

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_danube.generation.compiled_steps import next_logits
from lightning_danube.generation.packing import JoinedLinear, pack, pack_for_generation
from lightning_danube.generation.token_stream import generate
from lightning_danube.model import Decoder, DecoderConfig, KVCache, next_token_loss
from lightning_danube.model.architecture import OPTIONS, family_of
from lightning_danube.model.attention import inverse_frequencies
from lightning_danube.model.masks import causal_mask, document_mask
from tests.tiny_models import CONFIG, VARIANTS, tiny_decoder

TOKENS = 33
# Float64: a few hundred roundings of 1e-16 in each sum, grown by up to five layers of large weights.
CLOSE = 1e-10


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def some_ids(rows: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))


def exact(config: DecoderConfig) -> Decoder:
    return tiny_decoder(config).double().eval()


def norm_in_its_own_precision(self: Any, hidden: Tensor) -> Tensor:
    normed: Tensor = self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
    return normed


def reference(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' model with the same weights, whose norms do not drop to float32."""
    family = family_of(decoder.config)
    modeling = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
    monkeypatch.setattr(getattr(modeling, f"{family.classes}RMSNorm"), "forward", norm_in_its_own_precision)
    # With a padding id they drop the gradient of its embedding.
    config = AutoConfig.for_model(**decoder.config.to_hf(pad_id=None))
    # Their "eager" attention takes its softmax in float32.
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    assert type(theirs).__name__ == family.class_name("CausalLM")
    theirs.load_state_dict(decoder.state_dict())
    return theirs


def assert_close(found: Tensor, expected: Tensor, within: float = CLOSE) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= within * expected.abs().max()


def test_logits_and_gradients_are_those_of_transformers(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, ids = exact(VARIANTS[variant]), some_ids()
    theirs = reference(ours, monkeypatch)
    inputs, labels = ids[:, :-1], ids[:, 1:]
    expected = theirs(inputs).logits
    assert_close(ours(inputs), expected)
    # The variant changes something here: otherwise this test would say nothing about it.
    off: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(DecoderConfig) if field.name in OPTIONS
    }
    plain = dataclasses.replace(ours.config, **off)
    without = Decoder(plain).double()
    without.load_state_dict(ours.state_dict(), strict=False)
    assert (without(inputs) - expected).abs().max() > 1e-3 * expected.abs().max()

    total, count = next_token_loss(ours.hidden_states(inputs), ours.lm_head.weight, labels)
    (total / count).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, gradients[name].grad)


def test_cached_decoding_is_uncached_decoding(variant: str) -> None:
    decoder, ids = exact(VARIANTS[variant]), some_ids()
    with torch.no_grad():
        expected = decoder(ids)
        # A prompt that is longer than the window and one that is not, then several tokens, then one at a time.
        for prompt in (3, 12):
            cache = KVCache.for_decoder(decoder, len(ids), TOKENS)
            parts = [decoder(ids[:, :prompt], cache=cache), decoder(ids[:, prompt : prompt + 9], cache=cache)]
            for place in range(prompt + 9, TOKENS):
                parts.append(decoder(ids[:, place : place + 1], cache=cache))
            assert_close(torch.cat(parts, dim=1), expected)


def test_rows_of_different_lengths_are_decoded_as_alone(variant: str) -> None:
    decoder, ids = exact(VARIANTS[variant]), some_ids()
    prompts = [ids[0, :5].tolist(), ids[1, :17].tolist()]
    alone = [generate(decoder, [prompt], 12)[0] for prompt in prompts]
    assert generate(decoder, prompts, 12) == alone


def test_several_continuations_of_a_cache_keep_the_variant(variant: str) -> None:
    decoder, ids = exact(VARIANTS[variant]), some_ids(1)
    with torch.no_grad():
        cache = KVCache.for_decoder(decoder, 1, 20)
        decoder(ids[:, :20], cache=cache)
        both = cache.copies([0, 0], [20, 14], room=1)
        logits = next_logits(decoder, torch.tensor([3, 4]), both)
        for row, (length, last) in enumerate(((20, 3), (14, 4))):
            text = torch.cat([ids[:, :length], torch.tensor([[last]])], dim=1)
            assert_close(logits[row], decoder(text)[0, -1])


def test_packed_documents_do_not_see_each_other(variant: str) -> None:
    """Texts of one row, each with its own positions, have the logits that they have alone."""
    decoder, ids = exact(VARIANTS[variant]), some_ids(1)
    documents = torch.tensor([[0] * 13 + [1] * 20])
    positions = torch.cat([torch.arange(13), torch.arange(20)])[None]
    together = decoder(ids, position_ids_BT=positions, document_ids_BT=documents)
    assert_close(together[:, :13], decoder(ids[:, :13]))
    assert_close(together[:, 13:], decoder(ids[:, 13:]))


def test_recomputed_blocks_give_the_same_gradients(variant: str) -> None:
    gradients = []
    for recompute in (False, True):
        decoder = exact(VARIANTS[variant]).train()
        decoder.activation_checkpointing = recompute
        decoder(some_ids()).square().mean().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    for left, right in zip(*gradients, strict=True):
        assert left is not None and right is not None and torch.equal(left, right)


def test_packing_for_generation_gives_the_same_logits(variant: str) -> None:
    ids = some_ids()
    with torch.inference_mode():
        plain, packed = (tiny_decoder(VARIANTS[variant]).eval() for _ in range(2))
        expected = plain(ids)
        pack(packed, JoinedLinear)
        # float32: some roundings of 6e-8 in each sum, grown by the layers.
        assert_close(packed(ids), expected, within=1e-5)
        for rows in (1, 2):
            fast = tiny_decoder(VARIANTS[variant]).eval()
            pack_for_generation(fast, rows=rows)
            assert_close(fast(ids), expected, within=1e-5)
            cache = KVCache.for_decoder(fast, 2, TOKENS)
            parts = [fast(ids[:, :20], cache=cache), *(fast(ids[:, t : t + 1], cache=cache) for t in range(20, TOKENS))]
            assert_close(torch.cat(parts, dim=1), expected, within=1e-5)


# --- the window -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [TOKENS, 10**6])
def test_a_window_that_is_not_shorter_than_the_text_is_none(window: int) -> None:
    windowed, plain, ids = exact(dataclasses.replace(CONFIG, sliding_window=window)), exact(CONFIG), some_ids()
    with torch.no_grad():
        assert torch.equal(windowed(ids), plain(ids))
        assert windowed.model.mask(None, torch.zeros(2, TOKENS, CONFIG.hidden_size)) is None
        cache = KVCache.for_decoder(windowed, 2, TOKENS)
        windowed(ids[:, :-1], cache=cache)
        assert cache.mask(1) is None


def test_a_token_behind_the_window_changes_no_logit() -> None:
    """One layer: through each further one a token sees as far again."""
    decoder = exact(dataclasses.replace(CONFIG, sliding_window=7, num_hidden_layers=1))
    ids = some_ids(1)
    changed = ids.clone()
    changed[0, 4] = (changed[0, 4] + 1) % CONFIG.vocab_size
    difference = (decoder(changed) - decoder(ids)).abs().amax(-1)[0]
    assert (difference > 0).nonzero().squeeze(1).tolist() == list(range(4, 11))


def test_masks_are_what_their_words_say() -> None:
    for window in (None, 1, 3, 50):
        for tokens, past in ((6, 0), (4, 9)):
            mask = causal_mask(tokens, past, torch.device("cpu"), window)[0, 0]
            for row in range(tokens):
                for key in range(past + tokens):
                    distance = past + row - key
                    assert bool(mask[row, key]) == (0 <= distance < (window or 10**6))
        documents = torch.tensor([[5, 5, 5, 5, 2, 2, 2]])
        mask = document_mask(documents, window)[0, 0]
        for row in range(7):
            for key in range(7):
                seen = 0 <= row - key < (window or 10**6) and documents[0, row] == documents[0, key]
                assert bool(mask[row, key]) == bool(seen)


def test_the_blocked_kernel_takes_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_danube.model import attention

    ids = some_ids(3, 150)
    decoder = exact(VARIANTS["mistral"])
    monkeypatch.setattr(attention, "is_faster", lambda q: False)
    expected = decoder(ids)
    monkeypatch.setattr(attention, "is_faster", lambda q: True)
    assert_close(decoder(ids), expected)


# --- rotary positions -----------------------------------------------------------------------------------------------


def test_scaled_frequencies_by_hand() -> None:
    """Llama 3.1: wavelengths below 2,048 tokens stay, those above 8,192 become 32 times as long."""
    scaling = VARIANTS["llama 3.2"].rope_scaling
    plain = inverse_frequencies(64, 500000.0, torch.float64)
    scaled = inverse_frequencies(64, 500000.0, torch.float64, scaling)
    wavelengths = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelengths < 2048], plain[wavelengths < 2048])
    assert torch.equal(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 32)
    between = (wavelengths > 2048) & (wavelengths < 8192)
    assert between.any() and ((scaled < plain) & (scaled > plain / 32))[between].all()


def test_layers_without_positions_do_not_turn() -> None:
    decoder: Any = exact(VARIANTS["smollm3"])
    assert [block.self_attn.rotary for block in decoder.model.layers] == [True, True, True, False, True]


def test_moving_a_decoder_keeps_the_scaling() -> None:
    decoder = tiny_decoder(VARIANTS["llama 3.2"])
    before = decoder.model.rotary_emb.frequencies.clone()
    assert torch.equal(decoder.bfloat16().model.rotary_emb.frequencies, before)


def test_a_stream_that_moves_its_window_keeps_that_of_the_model() -> None:
    """Rows that reach the stream's window at different times are read again one by one."""
    decoder = exact(VARIANTS["mistral"])
    prompts = [some_ids()[0, :5].tolist(), some_ids()[1, :19].tolist()]
    expected = []
    for prompt in prompts:
        text, start = list(prompt), 0
        for _ in range(20):
            start = len(text) - 10 if len(text) - start > 20 else start
            text.append(int(decoder(torch.tensor([text[start:]]))[0, -1].argmax()))
        expected.append(text[len(prompt) :])
    assert generate(decoder, prompts, 20, window=20) == expected
