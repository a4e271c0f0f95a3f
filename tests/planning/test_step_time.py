"""The predicted time of a step, against counting, simulation and limits that can be computed by hand."""

import dataclasses
import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.model.elementwise import gains
from lightning_danube.planning.accelerators import ACCELERATORS
from lightning_danube.planning.memory import Layout, TrainingMemory
from lightning_danube.planning.network import LATENCY_OF_A_NODE, LATENCY_OF_TWO_NODES, Network
from lightning_danube.planning.step_time import (
    BANDWIDTH,
    COMMUNICATION,
    CUDNN,
    GAP,
    PRODUCTS,
    SPREAD,
    Kernels,
    StepTime,
    _Step,
    behind,
    seen_tokens,
    step_time,
    waiting,
)
from lightning_danube.weights.lora import Lora

H100 = ACCELERATORS["h100"]
NODE = Network(H100.link)
SMALL = DecoderConfig.preset("danube3-500m")


def step(memory: TrainingMemory, micro_batches: int = 1, network: Network = NODE, **options: Any) -> StepTime:
    return step_time(memory, H100, micro_batches, network, **options)


def sent(found: StepTime, layout: Layout) -> float:
    """Returns the seconds that a step waits for the network, without those for the slowest device."""
    return found.network - behind(layout.devices) * (found.products + found.attention)


def of_rows(rows: int = 6, **options: Any) -> TrainingMemory:
    return TrainingMemory(SMALL, rows, 8192, "bf16-mixed", gpu=True, **options)


def test_products_take_six_flops_a_weight_and_token() -> None:
    found = step(of_rows(compiled=True))
    matrices = SMALL.parameters_without_embedding - (2 * 16 + 1) * 1536  # norms multiply no matrix
    assert found.products == pytest.approx(6 * matrices * 6 * 8192 / (PRODUCTS * 989e12))
    assert found.network == 0
    assert step(of_rows(compiled=True), 3).products == pytest.approx(3 * found.products)


def test_gaps_between_kernels_depend_on_their_number_and_not_on_their_length() -> None:
    """A step of the 500M has 1,501 kernels with compiled blocks and 2,013 without, however many rows it has."""
    assert step(of_rows(6, compiled=True)).idle == step(of_rows(2, compiled=True)).idle == pytest.approx(1501 * GAP)
    assert step(of_rows()).idle == pytest.approx(2013 * GAP)
    assert step(of_rows(), 3).idle == pytest.approx(3 * 2013 * GAP)
    assert step(of_rows(recompute=True)).idle == pytest.approx(2013 * 4 / 3 * GAP)
    assert 5e-6 < GAP < 7e-6


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_all_devices_wait_for_the_slowest(devices: int) -> None:
    """The slowest of some devices, by chance."""
    chance = random.Random(0)
    slowest = [max(chance.gauss(0, SPREAD) for _ in range(devices)) for _ in range(4000)]
    # 4,000 draws have a standard error of at most 2 % of the spread. The formula is off by at most 1 %.
    assert behind(devices) == pytest.approx(sum(slowest) / len(slowest), abs=0.06 * SPREAD)
    together = step(of_rows(layout=Layout(1, devices)))
    network = of(of_rows(layout=Layout(1, devices))).of_network(0.0, 0.0)
    assert together.network - network == pytest.approx(behind(devices) * (together.products + together.attention))


@pytest.mark.parametrize(("recompute", "products", "attention"), [("selective", 8, 7), (True, 8, 9)])
def test_what_is_computed_again_is_counted(recompute: Any, products: int, attention: int) -> None:
    plain, again = step(of_rows()), step(of_rows(recompute=recompute))
    head = 6 * SMALL.embedding_parameters * 6 * 8192 / (PRODUCTS * 989e12)
    assert (again.products - head) / (plain.products - head) == pytest.approx(products / 6)
    assert again.attention / plain.attention == pytest.approx(attention / 7)
    assert plain.recomputed_flops == 0
    square = 4 * 8192 * 16 * 96 if recompute is True else 0
    by_hand = 6 * 8192 * 16 * (2 * of_rows().block_matrices + square)
    assert again.recomputed_flops == by_hand


def test_half_of_the_square_is_computed_at_the_rate_that_was_measured() -> None:
    """One row of 8,192 tokens took 2.03 ms in one layer of the 500M."""
    assert step(of_rows(1)).attention / 16 == pytest.approx(2.03e-3, rel=0.01)


@pytest.mark.parametrize("mean", [3, 40, 2000])
def test_seen_tokens_are_those_of_a_simulation(mean: int) -> None:
    chance, context, seen, age = random.Random(0), 100, 0, 0
    rows = 3000
    for _ in range(rows):
        for place in range(context):
            age = 0 if chance.random() < 1 / mean else age + 1
            seen += min(age, place) + 1  # a token sees itself, too
    # The formula has documents without a smallest unit, so it is off by parts of a token for the shortest.
    assert seen / rows / context == pytest.approx(seen_tokens(context, document=mean), rel=0.03, abs=0.6)


def test_a_window_and_documents_bound_what_is_seen() -> None:
    assert seen_tokens(8192) == seen_tokens(8192, window=8192) == 4096
    assert seen_tokens(16384, window=4096) == 4096 * (1 - 1 / 8)
    assert seen_tokens(8192, document=1e9) == pytest.approx(4096, rel=1e-3)
    assert seen_tokens(8192, document=700) < 700


def test_masked_documents_take_less_time_in_attention_alone() -> None:
    masked = dataclasses.replace(of_rows(), document_masks=True)
    plain, found = step(of_rows()), step(masked, document=700)
    assert found.attention < plain.attention / 2 and found.memory == plain.memory
    assert step(masked, document=100).attention < found.attention


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, without matrix products, attention, norms and views."""

    LEFT_OUT = ("mm", "attention", "embedding", "view", "alias", "detach", "empty", "ones", "zeros", "arange")

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        if not func.is_view and not any(word in name for word in self.LEFT_OUT):
            tensors = [one for one in (*args, *(result if isinstance(result, tuple) else (result,)))]
            read = [one for one in tensors if isinstance(one, torch.Tensor)]
            self.bytes[name] += sum(one.numel() * one.element_size() for one in read)
        return result


def test_kernels_that_are_stated_replace_those_of_fit() -> None:
    memory = TrainingMemory(DecoderConfig(32, 64, 1, 4, 2, vocab_size=80), 1, 64, "bf16-mixed", gpu=True)
    ours = _Step(memory, H100, 3, NODE, None, Kernels())
    others = _Step(memory, H100, 3, NODE, None, Kernels(logits=52, gradients=22))
    # Three passes over logits of 16 bits.
    assert (ours.loss_traffic(), others.loss_traffic()) == (80 * 6, 80 * 52)
    # A weight is read and written in 16 bits, as its gradient is in 32, which is then added to a sum.
    assert (ours.weight_traffic(last=True), others.weight_traffic(last=True)) == (6 + 6 + 12, 6 + 22)


def test_an_uncompiled_block_passes_over_its_gate_and_rotary_positions_as_often_as_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The operations of a GPU on CPU tensors. Two widths tell the parts of the formula apart."""
    monkeypatch.setattr("lightning_danube.model.decoder.type_of_products", lambda hidden: torch.bfloat16)
    monkeypatch.setattr("lightning_danube.model.decoder.gains", lambda x: gains(x) and x.dtype == torch.float32)
    monkeypatch.setattr("lightning_danube.model.attention.gains", lambda x: False)
    monkeypatch.setattr("lightning_danube.model.attention.is_faster", lambda q: False)

    def counted(width: int, channels: int) -> tuple[float, float]:
        found = []
        for layers in (1, 2):
            config = DecoderConfig(32, width, layers, 4, 2, head_dim=channels, vocab_size=80)
            decoder, ids = Decoder(config), torch.zeros(1, 64, dtype=torch.long)
            with Traffic() as forward, torch.autocast("cpu", torch.bfloat16):
                states = decoder.hidden_states(ids)
            with Traffic() as backward:
                states.sum().backward()
            found.append([one.bytes.total() / 64 for one in (forward, backward)])
        (a, b), (c, d) = found
        return c - a, d - b

    def planned(width: int, channels: int) -> tuple[float, float]:
        config = DecoderConfig(32, width, 1, 4, 2, head_dim=channels, vocab_size=80)
        memory = TrainingMemory(config, 1, 64, "bf16-mixed", gpu=True)
        return _Step(memory, H100, 1, NODE, None, Kernels()).block_traffic()

    for (width, channels), direction in itertools.product(((320, 8), (64, 40)), (0, 1)):
        # The same widths less give the difference of the gate's part, or of the heads', without norms and residuals.
        more = counted(width, channels)[direction] - counted(64, 8)[direction]
        weights = 3 * 32 * (width - 64) + 2 * 32 * 6 * (channels - 8)  # their casts, and those of their gradients
        tables = 4 * 4 * (channels - 8)  # cosines and sines, of queries and of keys, which all heads share
        expected = planned(width, channels)[direction] - planned(64, 8)[direction] + tables
        assert more - 6 * weights / 64 == pytest.approx(expected, rel=0.05)


def test_compiled_kernels_and_faster_memory_save_time_where_the_memory_is_waited_for() -> None:
    eager, compiled = step(of_rows()), step(of_rows(compiled=True))
    assert compiled.memory < eager.memory / 2 and compiled.products == eager.products
    on_h200 = step_time(of_rows(), ACCELERATORS["h200"], 1, NODE)
    assert on_h200.memory == pytest.approx(eager.memory * 3.35 / 4.8) and on_h200.attention == eager.attention


def test_products_in_8_bits_are_faster_and_their_casts_cost_memory() -> None:
    wide, narrow = step(of_rows(compiled=True)), step(of_rows(compiled=True, float8=True))
    head = 6 * SMALL.embedding_parameters * 6 * 8192 / (PRODUCTS * 989e12)
    assert (narrow.products - head) == pytest.approx((wide.products - head) * 989 / 1979)
    assert narrow.memory > wide.memory


def test_adamw_passes_ten_times_over_the_weights_of_a_device() -> None:
    """The norm reads gradients, clipping reads and writes them, and the step reads four tensors and writes three, in
    four bytes; a quarter of it remains to each of four that share."""
    alone = step(of_rows()).optimizer
    assert alone == pytest.approx(4 * (1 + 2 + 7) * SMALL.parameters / (BANDWIDTH * 3.35e12))
    shared = step(of_rows(layout=Layout(4, sharded=True))).optimizer
    assert shared == pytest.approx(alone / 4, rel=1e-6)
    assert step(of_rows(averages=(1, 2), orthogonalizes=True)).optimizer > 2 * alone, "Muon multiplies"


def test_the_network_works_beside_kernels() -> None:
    assert waiting(1.0, 10.0) == pytest.approx(COMMUNICATION)
    assert waiting(10.0, 0.0) == 10
    assert waiting(10.0, 4.0) == 6
    most = 10 / (1 - COMMUNICATION)
    assert waiting(most, 10.0) == pytest.approx(most - 10), "both at once"


def test_layouts_differ_in_what_they_wait_for() -> None:
    slow = Network(H100.link, 8, 12.5e9)

    def network(layout: Layout, on: Network = NODE, micro_batches: int = 4) -> float:
        return sent(step(of_rows(layout=layout, accumulate=micro_batches > 1), micro_batches, on), layout)

    over_nodes, hybrid = Layout(64, sharded=True), Layout(64, sharded=True, shard_size=8)
    assert network(hybrid, slow) < network(over_nodes, slow) / 2, "weights are gathered inside the node"
    assert network(Layout(8), slow) == network(Layout(8)), "one node needs no network"
    assert network(Layout(64)) < network(Layout(64), slow)
    each = dataclasses.replace(over_nodes, reduce_once=False)
    assert network(over_nodes, slow) < network(each, slow)
    kept = dataclasses.replace(over_nodes, gather_again=False)
    assert network(kept, slow) < network(over_nodes, slow)
    assert network(Layout(1, 8, sharded=True)) > network(Layout(8, 1, sharded=True))


def test_ddp_waits_for_its_last_bucket_alone_if_the_backward_pass_is_long() -> None:
    """The embedding is in the last bucket, and larger than 25 MiB. Smaller vocabularies leave a bucket of that size."""
    bus = 450e9 * 786 / 900
    for vocabulary in (32000, 1000):
        config = dataclasses.replace(SMALL, vocab_size=vocabulary)
        memory = dataclasses.replace(of_rows(layout=Layout(8)), config=config)
        found = step(memory)
        bytes_ = 4 * config.parameters
        whole = -(-bytes_ // (25 * 2**20)) * 12.9e-6 + 12.9e-6 + 2 * bytes_ * 7 / 8 / bus
        last = 12.9e-6 + 2 * max(25 * 2**20, 4 * vocabulary * 1536) * 7 / 8 / bus
        assert sent(found, memory.layout) == pytest.approx(last + COMMUNICATION * (whole - last))


def test_larger_buckets_have_fewer_latencies_and_one_bucket_has_no_kernels_beside_it() -> None:
    """48 nodes have a latency of 645 microseconds."""
    memory = of_rows(layout=Layout(384))
    steps = [step(memory, kernels=Kernels(bucket=size * 2**20)) for size in (25, 100, 10**6)]
    small, large, one = (sent(each, memory.layout) for each in steps)
    assert large < small
    bytes_, bus = 4 * SMALL.parameters, 0.85 * 400e9
    latency = LATENCY_OF_TWO_NODES + 46 * LATENCY_OF_A_NODE
    assert one == pytest.approx((1 + COMMUNICATION) * latency + 2 * bytes_ * 383 / 384 / bus)


def test_flex_attention_computes_blocks_that_are_seen_in_part() -> None:
    """128 tokens more for each, at its own rate of 228.9 TFLOP/s, which was measured without documents."""
    masked = of_rows(1, document_masks=True)
    found = step(masked, document=700, kernels=Kernels("flex"))
    flops = 2 * 7 * (seen_tokens(8192, document=700) + 128) * 1536 * 8192 * 16
    assert found.attention == pytest.approx(flops / 228.9e12, rel=0.01)
    # One layer without documents took 3.152 ms.
    assert step(of_rows(1), kernels=Kernels("flex")).attention / 16 == pytest.approx(3.152e-3, rel=0.01)


def test_the_traffic_of_other_kernels_replaces_ours() -> None:
    plain, other = step(of_rows()), step(of_rows(), kernels=Kernels(traffic=(1e6, 2e6)))
    ours = sum(of(of_rows()).block_traffic())
    more = 16 * 6 * 8192 * (3e6 - ours) / (BANDWIDTH * 3.35e12)
    assert other.memory - plain.memory == pytest.approx(more)


def test_parts_add_up() -> None:
    found = step(of_rows(layout=Layout(16, sharded=True)), 2)
    assert found.total == pytest.approx(sum(getattr(found, part) for part in StepTime.PARTS))
    fields = {field.name for field in dataclasses.fields(StepTime)}
    assert fields == {*StepTime.PARTS, "recomputed_flops"}


def of(memory: TrainingMemory) -> _Step:
    return _Step(memory, H100, 1, NODE, None, Kernels())


def test_an_adapter_trains_no_matrix_and_not_the_head() -> None:
    """The backward pass of frozen matrices computes the gradients of their inputs alone: four FLOPs instead of six."""
    all_train, adapted = step(of_rows()), step(of_rows(lora=Lora()))
    assert adapted.products == pytest.approx(all_train.products * 4 / 6)
    with_new_tokens = step(of_rows(lora=Lora(), new_tokens=3))
    head = 2 * SMALL.embedding_parameters * 6 * 8192 / (PRODUCTS * 989e12)
    assert with_new_tokens.products - adapted.products == pytest.approx(head)


@pytest.mark.parametrize(("channels", "computed"), [(96, 128), (128, 128), (160, 256), (256, 256)])
def test_cudnn_computes_128_channels_at_once(channels: int, computed: int) -> None:
    config = DecoderConfig(1536, 4096, 2, 8, 8, head_dim=channels)
    memory = TrainingMemory(config, 1, 8192, "bf16-mixed", gpu=True)
    assert of(memory).attention_rate == pytest.approx(CUDNN * 989e12 * channels / computed)


def test_flash_attention_is_planned_for_a_length_that_cudnn_does_not_take() -> None:
    """Flash attention has less than half of cuDNN's rate."""
    rates = [of(dataclasses.replace(of_rows(), context=context)).attention_rate for context in (8192, 8193)]
    assert rates[1] < 0.7 * rates[0]


def test_a_wide_window_does_not_lengthen_documents() -> None:
    assert seen_tokens(8192, window=4096, document=100) == seen_tokens(8192, document=100)
    assert seen_tokens(8192, window=64, document=4000) == seen_tokens(8192, window=64)


def test_recomputed_blocks_sum_over_tensor_parallel_devices_again() -> None:
    """Two sums for each of 16 blocks in each pass, and two for the ends of the decoder."""
    layout = Layout(1, 8)
    plain, again = step(of_rows(layout=layout)), step(of_rows(layout=layout, recompute=True))
    assert sent(again, layout) / sent(plain, layout) == pytest.approx((2 * 3 * 16 + 2) / (2 * 2 * 16 + 2))


def test_an_untied_head_is_gathered_and_summed_beside_the_embedding() -> None:
    """One more matrix at each end of the network: gathered in 16 bits, its gradient summed in 32."""
    layout = Layout(8, sharded=True)
    tied, untied = (
        of(dataclasses.replace(of_rows(layout=layout), config=dataclasses.replace(SMALL, tie_word_embeddings=tie)))
        for tie in (True, False)
    )
    more = (2 + 4) * SMALL.embedding_parameters * 7 / 8 / (450e9 * 786 / 900)
    assert untied.of_fsdp(0.1, 0.2) - tied.of_fsdp(0.1, 0.2) == pytest.approx(more)


def test_copies_of_a_hybrid_layout_have_one_device_of_a_node_each() -> None:
    copies = of(of_rows(layout=Layout(64, sharded=True, shard_size=8))).copies
    assert (copies.ranks, copies.of_a_node) == (8, 1)
    halves = of(of_rows(layout=Layout(64, sharded=True, shard_size=4))).copies
    assert (halves.ranks, halves.of_a_node) == (16, 2)
