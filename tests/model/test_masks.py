"""The forms in which attention gets what its tokens see, each against the dense mask.

Shapes: B batch, T tokens, H query heads, G key-value heads, K channels.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_danube.chat.data import EncodedChats, batch_of
from lightning_danube.model import Decoder, DecoderConfig, KVCache
from lightning_danube.model import attention as attention_module
from lightning_danube.model import decoder as decoder_module
from lightning_danube.model.attention import attend_in_blocks, attend_in_runs, repeat_heads
from lightning_danube.model.masks import BLOCK, Blocks, Runs, as_bias, blocks_of, document_mask, form_of, runs_of
from lightning_danube.pretraining.data import inputs_and_labels
from tests.model.flash_on_cpu import Call, flash_on_cpu

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2)
CUDA = torch.device("cuda")
WINDOWS = (None, 1, 7, BLOCK, 200, 10**6)

Heads = tuple[Tensor, Tensor, Tensor]
AttendTo = Callable[[Heads, Tensor, int | None], Tensor]


def packings(rows: int, tokens: int, *, returning: bool, seed: int = 0) -> Tensor:
    """Rows of documents of random lengths; the last third of a row may be padding of id 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens // 3, (rows, tokens), generator=generator)
    ids = 1 + (torch.arange(tokens)[None, :, None] >= lengths.cumsum(1)[:, None]).sum(-1)
    if returning:
        ids = ids % 3
    ids[1, -tokens // 3 :] = 0
    ids[2] = 5
    return ids


def some_heads(rows: int, tokens: int, *, heads: int = 4, kv_heads: int = 2, channels: int = 16) -> Heads:
    """Queries, keys and values, (B, T, heads, K)."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(rows, tokens, count, channels, dtype=torch.float64, generator=generator).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    return q, k, v


def densely(heads: Heads, ids: Tensor, window: int | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in heads)
    groups = q.shape[1] // k.shape[1]
    mask = document_mask(ids, window)
    out = F.scaled_dot_product_attention(q, repeat_heads(k, groups), repeat_heads(v, groups), attn_mask=mask)
    return out.transpose(1, 2)


def in_runs(heads: Heads, ids: Tensor, window: int | None) -> Tensor:
    runs = runs_of(ids)
    assert runs is not None
    return attend_in_runs(*heads, runs._replace(window=window)).view_as(heads[0])


def in_blocks(heads: Heads, ids: Tensor, window: int | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in heads)
    return attend_in_blocks(q, k, v, blocks_of(ids, window)).transpose(1, 2)


@pytest.fixture
def flash() -> Iterator[list[Call]]:
    with flash_on_cpu() as calls:
        yield calls


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's formula, uncompiled. On a CPU PyTorch forbids its gradient, although the formula has one."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def assert_equal_to_dense(attend: AttendTo, ids: Tensor, window: int | None, kv_heads: int) -> None:
    heads = some_heads(len(ids), ids.shape[1], kv_heads=kv_heads)
    got, expected = attend(heads, ids, window), densely(heads, ids, window)
    # Sums of at most 300 products of order one, in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(expected)
    for mine, other in zip(*(torch.autograd.grad(out, heads, direction) for out in (got, expected)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


# --- equal to the dense mask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_runs_are_equal_to_the_dense_mask(window: int | None, kv_heads: int, flash: list[Call]) -> None:
    assert_equal_to_dense(in_runs, packings(3, 150, returning=False), window, kv_heads)
    assert len(flash) == 1


@pytest.mark.parametrize("returning", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_are_equal_to_the_dense_mask(window: int | None, returning: bool, flex: None) -> None:
    assert_equal_to_dense(in_blocks, packings(3, 300, returning=returning), window, kv_heads=2)


@pytest.mark.parametrize("returning", [False, True])
@pytest.mark.parametrize("tokens", [1, BLOCK, 300, 3 * BLOCK])
@pytest.mark.parametrize("window", WINDOWS)
def test_no_seen_score_lies_outside_of_the_computed_blocks(window: int | None, tokens: int, returning: bool) -> None:
    """The formula above ignores the lists of blocks, which decide what the compiled kernel computes."""
    ids = packings(3, tokens, returning=returning) if tokens > 3 else torch.zeros(3, tokens, dtype=torch.int64)
    mask = blocks_of(ids, window).mask
    blocks = -(-tokens // BLOCK)
    rest = blocks * BLOCK - tokens
    seen = F.pad(document_mask(ids, window)[:, 0], (0, rest, 0, rest)).unflatten(1, (blocks, BLOCK))
    seen = seen.unflatten(3, (blocks, BLOCK)).transpose(2, 3).flatten(3)
    partial, whole = (
        torch.stack([torch.zeros(blocks, dtype=torch.bool).index_fill(0, order[:count], True)
                     for count, order in zip(counts.flatten(), orders.flatten(0, 2).long(), strict=True)])
        .view(3, blocks, blocks)
        for counts, orders in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    )  # fmt: skip
    assert not (partial & whole).any()
    assert not seen[~(partial | whole)].any()
    # Queries of the padding of the last block are not computed.
    inner = F.pad(torch.ones(tokens, dtype=torch.bool), (0, rest)).view(blocks, BLOCK)[:, None, :, None]
    assert (seen | ~inner.expand(blocks, blocks, BLOCK, BLOCK).flatten(2))[whole].all()
    if not returning:
        # Sorted ids: no block is computed that holds no seen score, except for the padding in the middle row.
        assert torch.equal((partial | whole)[::2], seen[::2].any(-1))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 7}, {"qk_norm": True}])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_decoder_with_runs_is_one_with_the_dense_mask(
    changes: dict[str, Any], recompute: bool, flash: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(CONFIG, **changes)).double().train()
    decoder.activation_checkpointing = recompute
    ids, documents = torch.randint(0, 101, (3, 40)), packings(3, 40, returning=False)
    results = []
    for form in ("dense", "runs"):
        monkeypatch.setattr(decoder_module, "form_of", lambda *args, form=form, **known: form)
        decoder.zero_grad()
        states = decoder.hidden_states(ids, document_ids_BT=documents, document_runs=runs_of(documents))
        states.square().sum().backward()
        results.append([states, *(parameter.grad for parameter in decoder.model.layers.parameters())])
    layers = 2
    assert len(flash) == layers * (2 if recompute else 1)
    assert {call.left for call in flash} == {changes.get("sliding_window", 0) - 1}
    for mine, other in zip(*results, strict=True):
        # Two layers of sums of 64 products.
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_a_window_alone_needs_no_documents(flash: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(CONFIG, sliding_window=7)).double().eval()
    ids = torch.randint(0, 101, (2, 20))
    with torch.no_grad():
        expected = decoder(ids)
        monkeypatch.setattr(decoder_module, "form_of", lambda *args, **known: "runs")
        torch.testing.assert_close(decoder(ids), expected, rtol=0, atol=1e-12)
        assert [call[:5] for call in flash] == [([0, 20, 40], 20, False, 6, 0)] * 2
        # A prompt that is read into an empty cache, and one that follows on it.
        cache = KVCache.for_decoder(decoder, 2, 20)
        parts = [decoder(ids[:, :12], cache=cache), decoder(ids[:, 12:], cache=cache)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)
        assert len(flash) == 4


# --- the documents of a batch -----------------------------------------------------------------------------------------


def test_runs_are_where_ids_change() -> None:
    runs = runs_of(torch.tensor([[3, 3, 3, 1, 2, 2], [2, 2, 2, 2, 2, 2]]))
    assert runs is not None
    assert runs.starts_N1.tolist() == [0, 3, 4, 6, 12] and runs.starts_N1.dtype == torch.int32
    assert runs.longest == 6


@pytest.mark.parametrize(("longest", "told"), [(1, BLOCK), (128, 128), (129, 256), (256, 256), (257, 300)])
def test_the_longest_run_is_rounded_up_but_not_beyond_the_row(longest: int, told: int) -> None:
    ids = torch.arange(300).clamp(min=longest - 1)[None]
    runs = runs_of(ids)
    assert runs is not None and runs.longest == told


def test_an_id_that_returns_is_no_run() -> None:
    assert runs_of(torch.tensor([[1, 1, 2, 1]])) is None
    # In another row the same id is another document.
    assert runs_of(torch.tensor([[1, 1, 2, 2], [2, 2, 1, 0]])) is not None


def test_batches_come_with_their_runs() -> None:
    import numpy as np

    batch = inputs_and_labels(np.array([[5, 0, 7, 8, 0, 3], [1, 2, 3, 4, 5, 0]]), document_end=0)
    assert batch["document_runs"].starts_N1.tolist() == [0, 2, 5, 10]
    ids, learned = np.arange(9), np.ones(9, dtype=bool)
    chats = EncodedChats(ids, learned, np.array([0, 4, 9]))
    packed = batch_of(chats, [[0, 1]], 10, packed=True)
    # Inputs of three and four tokens, then padding.
    assert packed["document_runs"] is not None and packed["document_runs"].starts_N1.tolist() == [0, 3, 7, 10]
    assert "document_runs" not in batch_of(chats, [[0], [1]], 10, packed=False)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "dropout", "runs", "form"),
    [
        ("cpu", torch.bfloat16, 64, 0.0, True, "dense"),
        ("cuda", torch.bfloat16, 96, 0.0, True, "runs"),
        ("cuda", torch.float16, 256, 0.0, True, "runs"),
        ("cuda", torch.bfloat16, 96, 0.0, False, "blocks"),
        ("cuda", torch.bfloat16, 60, 0.0, True, "blocks"),
        ("cuda", torch.float32, 96, 0.0, True, "blocks"),
        ("cuda", torch.float32, 8, 0.0, True, "dense"),
        ("cuda", torch.float64, 96, 0.0, True, "dense"),
        ("cuda", torch.bfloat16, 96, 0.1, True, "dense"),
    ],
)
def test_the_form_follows_from_device_type_and_dropout(
    device: str, dtype: torch.dtype, head_dim: int, dropout: float, runs: bool, form: str, hopper: None
) -> None:
    assert form_of(torch.device(device), dtype, head_dim, dropout, runs=runs) == form


def test_old_gpus_and_machines_without_triton_fall_back(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert form_of(CUDA, torch.float16, 64, 0.0, runs=True) == "blocks"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert form_of(CUDA, torch.float16, 64, 0.0, runs=True) == "dense"


def test_dropout_counts_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def chosen(device: Any, dtype: Any, head_dim: int, dropout: float, *, runs: bool) -> str:
        asked.append(dropout)
        return "dense"

    monkeypatch.setattr(decoder_module, "form_of", chosen)
    decoder = Decoder(dataclasses.replace(CONFIG, attention_dropout=0.5))
    ids = torch.zeros(1, 4, dtype=torch.long)
    decoder.train()(ids, document_ids_BT=ids)
    decoder.eval()(ids, document_ids_BT=ids)
    assert asked == [0.5, 0.0]


def test_a_bias_is_the_mask_for_the_kernel() -> None:
    q, k, v = (x.transpose(1, 2) for x in some_heads(3, 20, kv_heads=4))
    mask = document_mask(packings(3, 20, returning=True))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, attn_mask=as_bias(mask, torch.float64)), expected)


# --- compiled, and on a GPU -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "runs", "blocks"])
def test_a_block_with_any_mask_is_one_graph(form: str, flash: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    decoder = Decoder(CONFIG)
    documents = packings(3, 160, returning=False)
    monkeypatch.setattr(decoder_module, "form_of", lambda *args, **known: form)
    hidden = torch.randn(3, 160, 64)
    mask = decoder.model.mask(documents, hidden, runs_of(documents))
    assert isinstance(mask, {"dense": Tensor, "runs": Runs, "blocks": Blocks}[form])
    tables = decoder.model.rotary_emb(torch.arange(160)[None], torch.float32)
    with torch.no_grad():
        told = torch._dynamo.explain(decoder.model.layers[0])(hidden, *tables, mask)
    assert (told.graph_count, told.graph_break_count) == (1, 0), told.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_take_batches_of_other_runs(
    recompute: bool, flash: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of documents and longest documents change from batch to batch: that may cost one more compilation."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).double().train()
    decoder.activation_checkpointing = recompute
    counter = CompileCounterWithBackend("aot_eager")
    compiled = Decoder(CONFIG).double().train()
    compiled.load_state_dict(decoder.state_dict())
    compiled.activation_checkpointing = recompute
    for block in compiled.model.layers:
        block.compile(backend=counter)
    monkeypatch.setattr(decoder_module, "form_of", lambda *args, **known: "runs")
    ids = torch.randint(0, 101, (3, 600))
    graphs = []
    for batch in range(4):
        documents = packings(3, 600, returning=False, seed=batch)
        if batch == 2:
            documents[0] = 1
        results = []
        for model in (decoder, compiled):
            model.zero_grad()
            states = model.hidden_states(ids, document_ids_BT=documents, document_runs=runs_of(documents))
            states.square().sum().backward()
            results.append([states, *(parameter.grad for parameter in model.model.layers.parameters())])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
        graphs.append(counter.frame_count)
    assert graphs[-1] <= 3, graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.bfloat16, "runs"), (torch.bfloat16, "blocks"), (torch.float32, "blocks")]
)
def test_a_gpus_kernels_are_equal_to_the_dense_mask(window: int | None, dtype: torch.dtype, form: str) -> None:
    ids = packings(3, 300, returning=False)
    expected_heads = some_heads(3, 300, channels=96)
    expected = densely(expected_heads, ids, window)
    direction = torch.randn_like(expected)
    q, k, v = (x.detach().to("cuda", dtype).requires_grad_() for x in expected_heads)
    heads = (q, k, v)
    if form == "runs":
        runs = runs_of(ids)
        assert runs is not None
        mine = attend_in_runs(q, k, v, runs._replace(starts_N1=runs.starts_N1.cuda(), window=window)).view_as(q)
    else:
        mine = in_blocks(heads, ids.cuda(), window)
    # 2^-8 of values and gradients of up to 8; float32 products may be TF32's.
    most = 0.06 if dtype == torch.bfloat16 else 0.01
    torch.testing.assert_close(mine.double().cpu(), expected, rtol=0, atol=most)
    for got, wanted in zip(
        torch.autograd.grad(mine, heads, direction.to("cuda", dtype)),
        torch.autograd.grad(expected, expected_heads, direction),
        strict=True,
    ):
        torch.testing.assert_close(got.double().cpu(), wanted, rtol=0.02, atol=most)


def test_only_a_gpu_compiles_flex(flex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise AssertionError("on a CPU nothing is compiled")

    monkeypatch.setattr(attention_module, "compiled_flex", refuse)
    assert in_blocks(some_heads(3, 20), packings(3, 20, returning=True), None).shape == (3, 20, 4, 16)
