"""What training takes, by arithmetic, against what autograd keeps; whole steps are in benchmarks/plan_memory.py."""

import dataclasses
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.model import decoder as decoder_module
from lightning_danube.model.config import ActivationCheckpointing
from lightning_danube.model.elementwise import gains
from lightning_danube.model.masks import Runs, as_bias, blocks_of, document_mask, runs_of
from lightning_danube.planning.memory import BYTES, Layout, TrainingMemory, kept_beside_tensors
from lightning_danube.training.optim import Muon
from lightning_danube.weights.lora import Lora
from tests.model.flash_on_cpu import flash_on_cpu

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


class AttentionResults(TorchDispatchMode):
    """Watches the results of attention kernels. Selective checkpointing keeps them where autograd's hooks do not see
    them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[StorageWeakRef, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "attention" in str(func):
            storages = [each.untyped_storage() for each in result if isinstance(each, torch.Tensor)]
            self.seen += [(StorageWeakRef(one), one.data_ptr(), one.nbytes()) for one in storages]
        return result

    def alive(self) -> dict[int, int]:
        """Address → bytes of the results that are still in memory."""
        return {address: size for storage, address, size in self.seen if not storage.expired()}


def kept_for_backward(
    config: DecoderConfig,
    precision: str,
    recompute: ActivationCheckpointing,
    rows: int,
    context: int,
    *,
    documents: bool = False,
    compiled: bool = False,
) -> int:
    """Bytes that autograd holds after the forward pass, weights and token ids left out."""
    decoder = Decoder(config).to(DTYPES[precision])
    decoder.activation_checkpointing = recompute
    for block in decoder.model.layers if compiled else ():
        block.compile(backend="aot_eager_decomp_partition")  # chooses what is kept as the default backend does
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    held: dict[int, torch.Tensor] = {}
    results = AttentionResults()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, config.vocab_size, (rows, context))
    parts = torch.arange(context).expand(rows, -1) // 20 if documents else None
    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"),
        nullcontext(results) if compiled else results,  # under a mode nothing is compiled
    ):
        runs = None if parts is None else runs_of(parts.contiguous())
        states = decoder.hidden_states(ids, document_ids_BT=parts, document_runs=runs)
    assert states.requires_grad
    kept = {address: tensor.untyped_storage().nbytes() for address, tensor in held.items()}
    return sum({**kept, **results.alive()}.values())


@pytest.mark.parametrize(
    ("precision", "recompute"), [*itertools.product(DTYPES, (False, True)), ("64-true", "selective")]
)
def test_what_is_kept_for_the_backward_pass_is_counted_to_the_byte(
    precision: str, recompute: ActivationCheckpointing
) -> None:
    memory = TrainingMemory(TINY, rows=2, context=48, precision=precision, recompute=recompute)
    copies = 0 if recompute else memory.cast_bytes(TINY.num_hidden_layers)
    assert memory.kept_bytes() + copies == kept_for_backward(TINY, precision, recompute, 2, 48)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations of a GPU, on CPU tensors: PyTorch's attention kernel, a plain gate, norms that write 16 bits.

    Only the norms of the residual stream stay those of the CPU. They keep their input and a factor for each row, as the
    kernel for GPUs does. (Autograd takes no fake CUDA tensors where PyTorch was built for CPUs alone.)
    """
    monkeypatch.setattr("lightning_danube.model.decoder.type_of_products", lambda hidden: torch.bfloat16)
    monkeypatch.setattr("lightning_danube.model.decoder.gains", lambda x: gains(x) and x.dtype == torch.float32)
    monkeypatch.setattr("lightning_danube.model.attention.gains", lambda x: False)
    monkeypatch.setattr("lightning_danube.model.attention.is_faster", lambda q: False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_what_a_gpu_keeps_under_autocast_is_counted_to_the_byte(recompute: ActivationCheckpointing) -> None:
    memory = TrainingMemory(TINY, rows=2, context=48, precision="bf16-mixed", recompute=recompute, gpu=True)
    copies = 0 if recompute else memory.cast_bytes(TINY.num_hidden_layers)
    kept = kept_for_backward(TINY, "bf16-mixed", recompute, 2, 48)
    assert memory.kept_bytes() + copies == kept


@pytest.mark.filterwarnings("ignore:Detected that context_fn")
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "recompute",
    [pytest.param(False, marks=pytest.mark.medium), pytest.param(True, marks=pytest.mark.medium), "selective"],
)
def test_what_compiled_blocks_keep_is_counted_to_the_byte(recompute: ActivationCheckpointing) -> None:
    memory = TrainingMemory(TINY, 2, 48, "bf16-mixed", recompute=recompute, gpu=True, compiled=True)
    copies = 0 if recompute else memory.cast_bytes(TINY.num_hidden_layers)
    torch.compiler.reset()
    kept = kept_for_backward(TINY, "bf16-mixed", recompute, 2, 48, compiled=True)
    torch.compiler.reset()
    assert memory.kept_bytes() + copies == kept


def test_a_compiled_block_keeps_the_normed_states_in_16_bits_and_computes_the_gate_again() -> None:
    eager = TrainingMemory(TINY, 2, 48, "bf16-mixed", gpu=True)
    compiled = dataclasses.replace(eager, compiled=True)
    saved = TINY.hidden_size * (4 - 2) + TINY.intermediate_size * 2  # for each token of each block
    assert eager.kept_bytes() - compiled.kept_bytes() == TINY.num_hidden_layers * 2 * 48 * saved


@pytest.mark.kernels
@pytest.mark.usefixtures("as_on_a_gpu")
def test_compiled_blocks_in_float8_keep_no_inputs_of_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's partitioner, with torchao's emulated products. Scales and a few sums come on top."""
    from lightning_danube.pretraining.float8 import multiply_in_float8

    config = dataclasses.replace(TINY, intermediate_size=64, head_dim=16)
    decoder = Decoder(config)
    multiply_in_float8(decoder, emulate=True)
    monkeypatch.setattr(f"{__name__}.Decoder", lambda config: decoder)
    torch.compiler.reset()
    kept = kept_for_backward(config, "bf16-mixed", False, 2, 64, compiled=True)
    torch.compiler.reset()
    in_16_bits = TrainingMemory(config, 2, 64, "bf16-mixed", gpu=True, compiled=True)
    in_8_bits = dataclasses.replace(in_16_bits, float8=True)
    assert kept == pytest.approx(in_8_bits.kept_bytes(), rel=0.02)
    # For each token of each block: the normed residual stream, twice, and the product of gate and up, of 2 bytes each.
    saved = 3 * (2 * 64) * 2 * (32 + 32 + 64)
    assert in_16_bits.kept_bytes() - in_8_bits.kept_bytes() == saved


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
    mask = Decoder(config).model.mask(None, torch.zeros(2, 48, config.hidden_size))
    assert mask is None or isinstance(mask, torch.Tensor)
    assert (0 if mask is None else mask.untyped_storage().nbytes()) == masks


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 9}])
def test_runs_keep_what_plain_attention_keeps(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys, values, the result and a sum for each row: no tensor grows with the square of the context."""
    config = dataclasses.replace(TINY, **changes)
    memory = TrainingMemory(config, 2, 48, "bf16-mixed", gpu=True, document_masks=True)
    assert memory.mask_bytes() == 0
    plain = kept_for_backward(TINY, "32-true", False, 2, 48)
    monkeypatch.setattr(decoder_module, "form_of", lambda *args, **known: "runs")
    with flash_on_cpu() as calls:
        assert kept_for_backward(config, "32-true", False, 2, 48, documents=True) == plain
    assert len(calls) == TINY.num_hidden_layers


def test_a_dense_mask_on_a_gpu_is_kept_once_a_batch_in_the_type_of_the_products() -> None:
    config = dataclasses.replace(TINY, attention_dropout=0.1)
    for precision, bytes_ in (("bf16-mixed", 2), ("32-true", 4)):
        memory = TrainingMemory(config, 2, 48, precision, gpu=True, document_masks=True)
        assert memory.mask_bytes() == bytes_ * 2 * 48 * 48
        assert as_bias(document_mask(torch.zeros(2, 48)), DTYPES["32-true"]).nbytes == 4 * 2 * 48 * 48
        # Four query heads and two key-value heads: these are repeated, because the kernel that takes a mask knows no
        # groups.
        less = TrainingMemory(TINY, 2, 48, precision, gpu=True, document_masks=True)
        assert memory.block_bytes() - less.block_bytes() == bytes_ * 2 * (4 - 2) * 12 * 2 * 48


def test_blocks_are_counted_to_the_byte() -> None:
    mask = blocks_of(torch.zeros(3, 300, dtype=torch.long)).mask
    kept = sum(value.nbytes for value in mask.as_tuple() if isinstance(value, torch.Tensor))
    assert TrainingMemory(TINY, 3, 300, "32-true", gpu=True, document_masks=True).mask_bytes() == kept


@pytest.mark.skipif(torch.version.cuda is None, reason="no GPU in this build of PyTorch")
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_documents_at_full_size_are_counted_within_a_twentieth(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without memory. This needs a build of PyTorch with CUDA, but no GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(decoder_module, "form_of", lambda *args, **known: "runs")
    config = dataclasses.replace(DecoderConfig.preset("danube3-500m"), num_hidden_layers=3)
    rows, context = 6, 8192
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            decoder = Decoder(config)
    finally:
        torch.set_default_dtype(torch.float32)
    held: dict[int, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder.to_empty(device="cuda").train()
        decoder.activation_checkpointing = recompute
        weights = {parameter.untyped_storage()._cdata for parameter in decoder.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                held[storage._cdata] = storage.nbytes()
                kept.append(tensor)
            return tensor

        kept: list[torch.Tensor] = []
        ids = torch.zeros(rows, context, dtype=torch.long, device="cuda")
        runs = Runs(torch.zeros(rows + 1, dtype=torch.int32, device="cuda"), context)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder.hidden_states(ids, document_ids_BT=ids, document_runs=runs)
    memory = TrainingMemory(config, rows, context, "bf16-true", recompute, gpu=True, document_masks=True)
    assert abs(memory.kept_bytes() / sum(held.values()) - 1) < 0.05


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
    assert TrainingMemory(config, 2, 48, averages=(1, 2)).loss_phase().optimizer == 4 * kept


def test_muons_step_makes_what_is_counted() -> None:
    """All that the step allocates beyond what it keeps, by torch's own count."""
    from torch.profiler import ProfilerActivity, profile

    config = dataclasses.replace(TINY, hidden_size=64, intermediate_size=192, head_dim=16)
    decoder = Decoder(config)
    optimizer = Muon().build(decoder, lr=0.1)
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    most = max(itertools.accumulate(changes))
    memory = TrainingMemory(config, 1, 4, averages=(1, 2), orthogonalizes=True)
    kept = memory.loss_phase().optimizer
    assert memory.optimizer_phase().optimizer - kept == pytest.approx(most, rel=1e-3)
    assert memory.peak().moment == "the optimizer"
    other = dataclasses.replace(memory, averages=(1, 1), orthogonalizes=False)  # one average, as Lion
    assert other.peak().moment != "the optimizer" and other.peak().optimizer == 4 * config.parameters


def test_products_in_8_bits_keep_what_a_gpu_kept() -> None:
    """An H200 had 34.69 GiB at its peak, 45.97 in 16 bits (benchmarks/results/gpu, training-500m-h200)."""
    memory = TrainingMemory(DecoderConfig.preset("danube3-500m"), 6, 8192, "bf16-mixed", gpu=True, compiled=True)
    assert memory.peak().total / 2**30 == pytest.approx(45.97, rel=0.01)
    assert dataclasses.replace(memory, float8=True).peak().total / 2**30 == pytest.approx(34.69, rel=0.01)


def test_the_papers_4b_as_computed_by_hand() -> None:
    memory = TrainingMemory(DecoderConfig.preset("danube3-4b"), 2, 8192, "bf16-mixed", recompute=True, gpu=True)
    peak = memory.loss_phase()
    assert (peak.weights, peak.optimizer) == (4 * 3_961_839_360, 8 * 3_961_839_360)
    # 24 block inputs of 2 × 8192 × 3840 floats, the last norm's input and factors, cosines and sines, and the hidden
    # states in 16 bits.
    tokens, width = 2 * 8192, 3840
    norm, rotary = tokens * (4 * width + 4), 2 * 8192 * 120 * 4
    assert peak.activations == 24 * tokens * width * 4 + norm + rotary + tokens * width * 2
    # Of the head; a block's are made again with it. A block: 2 × 3840 × (32 + 8) × 120 + 3 × 3840 × 10240 weights.
    assert peak.casts == 2 * 122_880_000
    assert memory.cast_bytes(1) == 2 * 154_828_800


def test_sharding_divides_what_is_stored_and_ddp_keeps_gradients_in_its_buckets() -> None:
    alone = TrainingMemory(TINY, 2, 48).loss_phase()
    ddp = TrainingMemory(TINY, 2, 48, layout=Layout(4)).loss_phase()
    sharded = TrainingMemory(TINY, 2, 48, layout=Layout(4, sharded=True)).loss_phase()
    assert (ddp.weights, ddp.gradients, ddp.communication) == (alone.weights, 4 * TINY.parameters, 0)
    whole = TrainingMemory(TINY, 2, 48, layout=Layout(4))._backward(2)
    assert whole.gradients == whole.communication == 4 * TINY.parameters, "the buckets stay; this one is below 25 MiB"
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


def test_gradients_exist_as_far_as_the_backward_pass_has_come() -> None:
    """The head's gradient is made first, then one block's after the other, the last block's first."""
    once, again = TrainingMemory(TINY, 2, 48), TrainingMemory(TINY, 2, 48, accumulate=True)
    head, block = 80 * 32, 2 * 32 * (4 + 2) * 12 + 3 * 32 * 56
    assert [once._backward(k).gradients for k in range(3)] == [4 * (head + (2 - k) * block) for k in range(3)]
    assert {again._backward(k).gradients for k in range(3)} == {4 * TINY.parameters}
    first, last = once._backward(0).activations, once._backward(2).activations
    assert last - first == 2 * once.block_bytes()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_peak_is_the_highest_moment_of_a_step(precision: str) -> None:
    """A short row has little but gradients, most of them at the end of the backward pass; a long row activations."""
    found = set()
    for context in (4, 4096):
        memory = TrainingMemory(TINY, 1, context, precision)
        blocks = [memory._backward(block).total for block in range(TINY.num_hidden_layers)]
        assert memory.backward_phase().total == max(blocks)
        assert memory.peak().total == max(*blocks, memory.loss_phase().total)
        found.add((blocks.index(max(blocks)), memory.peak().moment))
    assert found == {(0, "the loss"), (2, "the backward pass")}


@pytest.mark.parametrize("context", [48, 3000])
def test_the_loss_needs_the_logits_of_one_chunk(context: int) -> None:
    """Logits, the gradients of hidden states and of the head; a chunk has 1,024 tokens."""
    memory = TrainingMemory(TINY, 1, context).loss_phase()
    assert memory.logits == 4 * (min(context, 1024) * 80 + context * 32 + 80 * 32)


def test_a_gpus_block_as_computed_by_hand() -> None:
    """Under autocast: products take 2 bytes a value, the residual stream 4."""
    memory = TrainingMemory(TINY, 2, 48, "bf16-mixed", gpu=True)
    inputs = 2 * 32 * 2  # one copy for queries, keys and values, one for gate and up
    attention = 2 * (2 * 4 * 12 + 2 * 2 * 12) + 4 * 4  # queries, outputs, keys, values; a statistic for each head
    feed_forward = 4 * 56 * 2  # gate, activated gate, up, and their product
    norms = 2 * (32 * 4 + 4)
    assert memory.block_bytes() == 96 * (inputs + attention + feed_forward + norms)


@pytest.mark.parametrize("replicas", [3, 7])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_hold_all_parameters_and_what_is_gathered_is_whole(replicas: int, tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    memory = TrainingMemory(config, 2, 48, layout=Layout(replicas, sharded=True))
    assert 0 <= replicas * memory.stored_parameters - config.parameters < replicas
    ends, block = 80 * 32 * (1 if tied else 2), 2 * 32 * (4 + 2) * 12 + 3 * 32 * 56
    assert memory.loss_phase().communication == 4 * ends
    # Gradients of both ends, this block and the next one, and the gradients of a block.
    assert memory.backward_phase().communication == 4 * (2 * ends + 3 * block)
    # With 16-bit products two bytes a value, and a block's gradients in float32 as they are sent.
    mixed = dataclasses.replace(memory, precision="bf16-mixed")
    assert mixed.loss_phase().communication == 2 * ends and mixed.peak().casts == 0
    assert mixed.backward_phase().communication == 2 * (2 * ends + 3 * block) + 4 * block
    kept = dataclasses.replace(mixed, layout=Layout(replicas, sharded=True, gather_again=False))
    assert kept.loss_phase().communication == 2 * (ends + 3 * block)
    assert kept.backward_phase().communication == 2 * (2 * ends + 3 * block + block) + 4 * block


def test_gradients_that_wait_for_the_last_micro_batch_are_whole() -> None:
    once, each = (Layout(6, sharded=True, shard_size=2, reduce_once=once) for once in (True, False))
    waiting, dealt = (TrainingMemory(TINY, 2, 48, accumulate=True, layout=layout) for layout in (once, each))
    assert waiting.loss_phase().gradients == waiting.backward_phase().gradients == 4 * TINY.parameters
    assert dealt.loss_phase().gradients == 4 * TINY.parameters // 2
    assert waiting.stored_parameters == TINY.parameters // 2, "2 of the 6 replicas share a copy"
    alone = dataclasses.replace(waiting, accumulate=False)
    assert alone.loss_phase().gradients == dealt.loss_phase().gradients


# --- adapters ---------------------------------------------------------------------------------------------------------

ADAPTERS = [
    Lora(rank=2, dropout=0.0),
    Lora(rank=3, dropout=0.1),
    Lora(rank=2, dropout=0.1, targets=("q_proj", "up_proj")),
]


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora", ADAPTERS)
def test_what_an_adapter_keeps_is_counted_to_the_byte(
    precision: str, recompute: bool, lora: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = Decoder(TINY)
    lora.apply(adapted)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    monkeypatch.setattr(f"{__name__}.Decoder", lambda config: adapted)
    memory = TrainingMemory(TINY, rows=2, context=48, precision=precision, recompute=recompute, lora=lora)
    assert memory.trained_parameters == trained
    assert memory.kept_bytes() == kept_for_backward(TINY, precision, recompute, 2, 48)
    assert memory.optimizer_values == 2 * trained
    for peak in (memory.loss_phase(), memory.backward_phase()):
        assert peak.gradients == memory.weight_bytes * trained
        assert peak.weights == memory.weight_bytes * (TINY.parameters + trained)


def test_rows_of_new_tokens_train_beside_an_adapter() -> None:
    plain = TrainingMemory(TINY, rows=2, context=48, lora=Lora(rank=2))
    for tied, rows in ((False, 2), (True, 1)):
        config = dataclasses.replace(TINY, tie_word_embeddings=tied)
        memory = dataclasses.replace(plain, config=config, new_tokens=5)
        assert memory.trained_parameters == plain.trained_parameters + rows * 5 * TINY.hidden_size
    in_4_bits = dataclasses.replace(plain, lora=Lora(rank=2, quantization="nf4"))
    assert in_4_bits.loss_phase().weights < plain.loss_phase().weights


@pytest.mark.parametrize(("planned", "kept"), [(84.0, 92), (249.3, 162), (485.9, 261)])
def test_what_a_process_keeps_beside_tensors_is_about_what_was_measured(planned: float, kept: int) -> None:
    """benchmarks/results/plan-process-2026-11-27.md"""
    assert kept_beside_tensors(int(planned * 2**20)) / 2**20 == pytest.approx(kept, abs=1)
