"""Predicts the time of an optimizer step from its arithmetic, its memory traffic and the network.

A step on a GPU is the sum of what its kernels take one after the other: matrix products at a share of the peak,
attention at the rate of its kernel, all else at the bandwidth of the memory, and a gap between two kernels. The network
works beside them, and costs what it takes longer than the kernels beside which it works. All devices wait for the
slowest. Each constant is a measurement of its own kind of kernel, or a published one. None is fitted to the speed of a
run. benchmarks/plan_speed.py compares the predictions with runs.

Letters in formulas: D channels of the residual stream, I of the feed-forward, H of all query heads, G of all key (or
value) heads; w bytes of a value of the residual stream, a of a value that is multiplied.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Literal

from lightning_danube.planning.accelerators import Accelerator
from lightning_danube.planning.memory import DDP_BUCKET, TrainingMemory, head_dim
from lightning_danube.planning.network import Group, Network

PRODUCTS = 0.747
"""Share of the dense peak that matrix products reach inside a step: 739 of 989 TFLOP/s on an H100, the sum of the
products' kernels in a step of the 500M (benchmarks/results/gpu/first-contact-h100-01e0813.md, table "fit"). Alone, a
product of 8,192² reached 767."""

BANDWIDTH = 0.85
"""Share of the memory's bandwidth that kernels without products reach: copies had 2.89 of 3.35 TB/s on an H100 and
4.00 of 4.8 on an H200 (benchmarks/results/gpu)."""

CUDNN = 0.479
"""Share of the peak that cuDNN's attention reaches, forward and backward: 355.6 TFLOP/s with 96 channels a head and
443.6 with 120 on an H100 (benchmarks/results/gpu/first-contact-h100-01e0813.md). It computes 128 channels for both:
474 TFLOP/s."""

FLASH: tuple[tuple[int, float], ...] = ((96, 0.219), (128, 0.268))
"""Channels of a head → share of the peak that flash attention reaches, from the same table: 217 TFLOP/s for 96, and
248.2 for 120, for which it computes 128. For fewer channels that of 96 is taken."""

FLEX: tuple[tuple[int, float], ...] = ((96, 0.231), (128, 0.297))
"""The same for FlexAttention, from the same table: 228.9 TFLOP/s for 96 channels, and 275.1 for 120."""
BLOCK = 128
"""Queries and keys of a block, which FlexAttention computes whole if it is seen in part."""

SHORT = 300
"""Tokens at which flash attention has half of the rate that it has for long texts. The paper of FlashAttention-3 (arXiv
2407.08608, figure 5, causal, 128 channels) has 191, 260, 298, 319 and 333 TFLOP/s of FlashAttention-2 for 512, 1,024,
2,048, 4,096 and 8,192 tokens on an H100, which n / (n + 300) meets within 11 %."""
MEASURED_CONTEXT = 8192
"""Tokens for which the rates of attention were measured."""

COMMUNICATION = 20 / 132
"""Share of the GPU that is not there for kernels while the network works beside them: DeepSeek-V3 sets 20 of an H800's
132 multiprocessors aside for it (arXiv 2412.19437, section 3.2)."""

LAUNCHES = {True: 1501 / 16, False: 2013 / 16}
"""Kernels of a step for each block, with compiled blocks and without: 1,501 and 2,013 for the 16 blocks of the 500M and
one micro-batch, loss and optimizer included (benchmarks/results/gpu/first-contact-h100-01e0813.md, "all")."""
FORWARD = 1 / 3
"""Share of these kernels that activation checkpointing starts again: those of the forward pass, by its products."""
GAP = (447.9 - 436.4 + 433.9 - 423.1 + 558.5 - 551.5) / (1501 + 1501 + 2013) / 1e3
"""Seconds between two kernels, however long the kernels take: 5.8 microseconds. Steps of the 500M took 447.9 ms with
436.4 ms of kernels on an H100, 433.9 with 423.1 on an H200, and uncompiled 558.5 with 551.5 on an H100."""

SPREAD = 0.08 / 5.4
"""Standard deviation of the time that equal devices take for products, by the mean. All devices wait for the slowest.
Equal GPUs of five clusters varied by 8 % on average (arXiv 2208.11035). This is taken as the range of a box plot, which
leaves out what is more than 2.7 standard deviations of a normal distribution away. No cluster had an H100."""

FLOAT32 = 1 / 15
"""Peak of float32 products by that of 16 bits, on an A100 and an H100. Muon multiplies in float32."""

MEAN_DOCUMENT = 700
"""Tokens of a document where no prepared shards say more: web text has some hundred to a thousand."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How a run computes a step. The defaults are those of `fit`; other codebases differ.

    Args:
        attention: the kernel of attention; None: the one that `fit` takes.
        logits: bytes that the loss reads and writes for a logit, beside the products; None: three passes over 16 bits.
        recomputed_products: share of the blocks' products that activation checkpointing computes again.
        residual: bytes of a value of the residual stream; None: those of a weight.
        traffic: bytes that kernels without products read and write for a token in a block, forward and backward; None:
            those of this project's blocks.
        gradients: bytes that DDP reads and writes for the gradient of a weight in a micro-batch, before the optimizer;
            None: a cast to the type of the weights, and the sum over micro-batches.
        bucket: bytes of gradients that DDP sums at once.
        updates: whether the step has an optimizer.
    """

    attention: Literal["cudnn", "flash", "flex"] | None = None
    logits: float | None = None
    recomputed_products: float = 1.0
    residual: int | None = None
    traffic: tuple[float, float] | None = None
    gradients: float | None = None
    bucket: int = DDP_BUCKET
    updates: bool = True


OURS = Kernels()


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what they are spent on.

    Args:
        products: matrix products outside attention.
        attention: the kernels of attention.
        memory: all other kernels of the model and of the loss, which wait for the memory.
        optimizer: clipping and the optimizer.
        network: what the network takes longer than the kernels beside which it works, and the time for which devices
            wait for the slowest of them.
        idle: gaps between kernels.
        recomputed_flops: FLOPs of the step that activation checkpointing does again, on one device.
    """

    products: float
    attention: float
    memory: float
    optimizer: float
    network: float
    idle: float
    recomputed_flops: float = 0.0

    PARTS = ("products", "attention", "memory", "optimizer", "network", "idle")

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in self.PARTS)


def seen_tokens(context: int, window: int | None = None, document: float | None = None) -> float:
    """Returns how many tokens a token sees on average.

    Args:
        context: tokens of a row.
        window: tokens that a token sees at most; None: all earlier ones.
        document: mean tokens of a document, if documents are masked from each other. The lengths are taken as
            memoryless: a document ends after each token with the same probability.
    """
    if document is not None:
        # The mean of min(age, place) over the places of a row, where a document's age has the mean `document`.
        seen = document * (1 - document / context * -math.expm1(-context / document))
    else:
        seen = context / 2
    if window is not None and window < context:
        seen = min(seen, window * (1 - window / (2 * context)))
    return seen


def step_time(
    memory: TrainingMemory,
    accelerator: Accelerator,
    micro_batches: int,
    network: Network,
    *,
    document: float | None = None,
    kernels: Kernels = OURS,
) -> StepTime:
    """Returns the predicted time of an optimizer step on a GPU in 16 bits.

    Args:
        memory: the decoder, the shape of a micro-batch, and how training is spread over devices.
        micro_batches: micro-batches of a step on each replica.
        document: mean tokens of a document, if documents are masked.
    """
    return _Step(memory, accelerator, micro_batches, network, document, kernels).time()


@dataclasses.dataclass(frozen=True)
class _Step:
    run: TrainingMemory
    on: Accelerator
    micro_batches: int
    network: Network
    document: float | None
    kernels: Kernels

    def __post_init__(self) -> None:
        assert self.on.bandwidth is not None, "a device whose memory's bandwidth is not known"

    @property
    def a(self) -> int:
        return self.run._product

    @property
    def w(self) -> int:
        return self.kernels.residual or self.run.weight_bytes

    @property
    def blocks(self) -> int:
        return self.run.config.num_hidden_layers

    @property
    def block(self) -> int:
        """Returns the parameters of one block's matrices on a device, before sharding over replicas."""
        return self.run.block_matrices // self.run.layout.tensor_parallel

    def at_memory(self, bytes_: float) -> float:
        """Returns the seconds to read or write so many bytes."""
        assert self.on.bandwidth is not None
        return bytes_ / (BANDWIDTH * self.on.bandwidth)

    # --- products -----------------------------------------------------------------------------------------------------

    def of_products(self, times: float) -> float:
        """Returns the seconds of a block's products of a micro-batch. Forward is once, forward and backward thrice."""
        peak = self.on.float8 if self.run.float8 and self.on.float8 is not None else self.on.flops
        return 2 * times * self.run.tokens * self.block / (PRODUCTS * peak)

    @property
    def backward_products(self) -> int:
        """Returns how often the backward pass multiplies by a matrix: for its input, and for a matrix that trains."""
        return 2 if self.run.lora is None else 1

    def head_products(self) -> float:
        times = 1 + (2 if self.run._head_trains else 1)
        return 2 * times * self.run.tokens * self.run.head_parameters / (PRODUCTS * self.on.flops)

    # --- attention ----------------------------------------------------------------------------------------------------

    @property
    def attention_rate(self) -> float:
        """Returns the FLOP/s of attention for the channels that a head has."""
        kernel = self.kernels.attention
        if kernel is None:
            kernel = "cudnn" if self.run._form == "none" and self.run.context % 128 == 0 else "flash"
        channels = head_dim(self.run.config)
        if kernel == "cudnn":
            return CUDNN * self.on.flops * channels / (128 * math.ceil(channels / 128))
        rates = FLEX if kernel == "flex" else FLASH
        computed, share = next((one for one in rates if one[0] >= channels), rates[-1])
        padded = channels if channels <= rates[0][0] else computed * math.ceil(channels / computed)
        if kernel == "flex":
            return share * self.on.flops * channels / padded
        length = 2 * self.seen  # of a text whose tokens see as many others on average
        short = length / (length + SHORT) * (MEASURED_CONTEXT + SHORT) / MEASURED_CONTEXT
        return share * short * self.on.flops * channels / padded

    @property
    def seen(self) -> float:
        """Returns the tokens that attention computes for a token on average."""
        if self.run._form == "dense":
            return float(self.run.context)
        seen = seen_tokens(self.run.context, self.run.config.sliding_window, self.document)
        # Half a block more at the start of a document, and half a block more at the token.
        return min(seen + BLOCK, self.run.context / 2) if self.kernels.attention == "flex" else seen

    def of_attention(self, products: float) -> float:
        """Returns the seconds of a block's attention. Forward has 2 products, backward 5 (one is computed again)."""
        c = self.run.config
        channels = c.num_attention_heads * head_dim(c) // self.run.layout.tensor_parallel
        return 2 * products * self.seen * channels * self.run.tokens / self.attention_rate

    # --- all other kernels --------------------------------------------------------------------------------------------

    def block_traffic(self) -> tuple[float, float]:
        """Returns the bytes that the kernels without products read and write for one token in one block, forward and
        backward. Compiled kernels fuse what follows each other; the others pass over their tensors one by one."""
        if self.kernels.traffic is not None:
            return self.kernels.traffic
        c, a, w, tp = self.run.config, self.a, self.w, self.run.layout.tensor_parallel
        D, width = c.hidden_size, c.intermediate_size // tp
        turned = (c.num_attention_heads + c.num_key_value_heads) * head_dim(c) // tp
        if self.run.compiled:
            # Twice a sum with the residual stream and a norm; rotary positions; the gate.
            forward = 4 * (a + w) * D + 2 * a * turned + 3 * a * width
            # Two norms, which also sum the gradients of three and two products, and write 16 bits for the next.
            backward = (7 * a + 6 * w) * D + 2 * a * turned + 6 * a * width
        else:
            cast = 2 * (w + a) if w != a else 0
            forward = (2 * (a + 2 * w) + 4 * w + cast) * D + (24 + 5 * a) * turned + 5 * a * width
            backward = (16 * w + 9 * a + 2 * cast) * D + (28 + 8 * a) * turned + 9 * a * width
        if self.run.float8:
            # Each product's inputs are read for their largest value, read again, and written twice in 8 bits.
            inputs = 2 * D + c.num_attention_heads * head_dim(c) // tp + width
            gradients = (c.num_attention_heads + 2 * c.num_key_value_heads) * head_dim(c) // tp + 2 * D + 2 * width
            forward += (2 * a + 2) * inputs
            backward += (2 * a + 2) * gradients
        return forward, backward

    def weight_traffic(self, *, last: bool) -> float:
        """Returns the bytes for one weight in a micro-batch: its casts, its gradient, and copies around the network."""
        a, stored = self.a, self.run.weight_bytes
        layout, several = self.run.layout, self.micro_batches > 1
        if self.run.lora is not None:
            return stored + a if a < stored else 0
        if layout.by_fsdp:
            # What arrives is written, and copied to its place.
            gathers = 2 if layout.gather_again else 1
            wide = max(4, stored) if a < stored else stored
            reduces = last or not layout.reduce_once
            kept = 3 * stored if several and layout.reduce_once else 0
            return gathers * 3 * a + ((a + 2 * wide) if reduces else 0) + kept
        casts = 3 * stored + 2 if self.run.float8 else (stored + a if a < stored else 0)
        if self.kernels.gradients is not None:
            return casts + self.kernels.gradients
        gradient = a + stored if a < stored else 0
        return casts + gradient + (3 * stored if several else 0)

    def loss_traffic(self) -> float:
        """Returns the bytes of the loss for a token: passes over its logits, beside the products."""
        vocabulary = self.run.config.vocab_size // self.run.layout.tensor_parallel
        return vocabulary * (3 * self.a if self.kernels.logits is None else self.kernels.logits)

    # --- the optimizer ------------------------------------------------------------------------------------------------

    def of_optimizer(self) -> float:
        if not self.kernels.updates:
            return 0.0
        values = self.run.trained_parameters // self.run.layout.shares
        # The gradient's norm reads it, clipping reads and writes it; then each value is read and written.
        passes = 3 + 3 + 2 * self.run.averages[1]
        seconds = self.at_memory(self.run.weight_bytes * passes * values)
        if self.run.orthogonalizes:
            rate = PRODUCTS * FLOAT32 * self.on.flops
            seconds += self.blocks * sum(map(_orthogonalizing, self.run.matrix_widths.values())) / rate
        return seconds

    # --- the network --------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> Group:
        layout = self.run.layout
        of_a_node = max(1, self.network.devices // layout.tensor_parallel)
        return Group(layout.shares if layout.sharded else layout.replicas, of_a_node)

    @property
    def copies(self) -> Group:
        """Returns the group that sums gradients over the copies of a hybrid layout."""
        layout = self.run.layout
        return Group(layout.replicas // layout.shares, max(1, self.replicas.of_a_node // layout.shares))

    def of_network(self, forward: float, backward: float) -> float:
        """Returns the seconds that a step waits for the network.

        Args:
            forward, backward: seconds of one block's kernels.
        """
        layout, run = self.run.layout, self.run
        waits = self.micro_batches * self.of_tensor_parallelism()
        if layout.replicas == 1:
            return waits
        if layout.by_fsdp:
            return waits + self.of_fsdp(forward, backward)
        bytes_ = run.weight_bytes * run.trained_parameters
        # One bucket after the other is summed while the backward pass continues. The last one has nothing beside it. It
        # holds the embedding, whose gradient is known last, and a bucket is not smaller than one parameter.
        whole = math.ceil(bytes_ / self.kernels.bucket) * self.network.latency(self.replicas)
        whole += self.network.sum(bytes_, self.replicas)
        embedding = run.weight_bytes * run.head_parameters if run.lora is None else 0
        last = self.network.sum(min(bytes_, max(self.kernels.bucket, embedding)), self.replicas)
        return waits + last + waiting(whole - last, self.blocks * backward)

    def of_fsdp(self, forward: float, backward: float) -> float:
        layout, a, stored = self.run.layout, self.a, self.run.weight_bytes
        wide = max(4, stored) if a < stored else stored
        ends = self.run.head_parameters * (1 if self.run.config.tie_word_embeddings else 2)
        gather = self.network.gather(a * self.block, self.replicas)
        reduce = self.network.gather(wide * self.block, self.replicas)
        reduce += self.network.sum(wide * self.block / layout.shares, self.copies)
        first = self.network.gather(a * ends, self.replicas) + gather
        last = self.network.gather(wide * ends, self.replicas)
        last += self.network.sum(wide * ends / layout.shares, self.copies)
        again = gather if layout.gather_again else 0.0
        waits = 0.0
        for number in range(self.micro_batches):
            reduces = number == self.micro_batches - 1 or not layout.reduce_once
            beside = again + (reduce if reduces else 0.0)
            waits += first + (last if reduces else 0.0)
            waits += (self.blocks - 1) * (waiting(gather, forward) + waiting(beside, backward))
        return waits

    def of_tensor_parallelism(self) -> float:
        """Returns the seconds of a micro-batch's sums over the devices of a replica, which nothing works beside."""
        devices = self.run.layout.tensor_parallel
        group = Group(devices, min(devices, self.network.devices))
        once = self.network.sum(self.a * self.run.tokens * self.run.config.hidden_size, group)
        passes = 2 + (1 if self.run.recompute else 0)
        return (2 * passes * self.blocks + 2) * once

    # --- together -----------------------------------------------------------------------------------------------------

    def time(self) -> StepTime:
        run, n = self.run, self.micro_batches
        again = bool(run.recompute)
        share = self.kernels.recomputed_products if again else 0.0
        forward_bytes, backward_bytes = (run.tokens * one for one in self.block_traffic())
        attention_again = 2 if run.recompute is True else 0
        products = self.of_products(1), self.of_products(self.backward_products + share)
        attention = self.of_attention(2), self.of_attention(5 + attention_again)
        traffic = self.at_memory(forward_bytes), self.at_memory(backward_bytes + (forward_bytes if again else 0))
        weights = self.at_memory(
            (self.block * self.blocks + run.head_parameters)
            * ((n - 1) * self.weight_traffic(last=False) + self.weight_traffic(last=True))
        )
        loss = self.at_memory(self.loss_traffic() * run.tokens)
        of_block = [products[k] + attention[k] + traffic[k] for k in (0, 1)]
        optimizer = self.of_optimizer()
        all_products = n * (self.blocks * sum(products) + self.head_products())
        all_attention = n * self.blocks * sum(attention)
        launches = n * self.blocks * LAUNCHES[run.compiled] * (1 + FORWARD * again)
        return StepTime(
            products=all_products,
            attention=all_attention,
            memory=n * (self.blocks * sum(traffic) + loss) + weights,
            optimizer=optimizer,
            network=self.of_network(*of_block) + behind(run.layout.devices) * (all_products + all_attention),
            idle=GAP * launches,
            recomputed_flops=self.recomputed_flops(share, attention_again),
        )

    def recomputed_flops(self, share: float, attention: int) -> float:
        """Returns the FLOPs of a step that are done again on a device, with the whole square of attention, as the
        utilisation of the model's own FLOPs counts it."""
        c, tp = self.run.config, self.run.layout.tensor_parallel
        square = 2 * attention * self.run.context * c.num_attention_heads * head_dim(c) // tp
        return self.micro_batches * self.run.tokens * self.blocks * (2 * share * self.block + square)


def behind(devices: int) -> float:
    """Returns by what share of the time of its products the slowest of some devices is behind an average one."""
    if devices == 1:
        return 0.0
    # Blom's approximation of the largest of n values of a normal distribution, within 1 %.
    return SPREAD * statistics.NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))


def waiting(network: float, kernels: float) -> float:
    """Returns how much longer kernels take with the network beside them, which takes a part of the GPU.

    Args:
        network: seconds of the network alone.
        kernels: seconds of the kernels alone.
    """
    # While the network works, kernels advance by less. The rest of either runs alone.
    done = network * (1 - COMMUNICATION)
    return network * COMMUNICATION if done <= kernels else network - kernels


def _orthogonalizing(shape: tuple[int, int]) -> float:
    """Returns the FLOPs with which Muon orthogonalizes a matrix, see `newton_schulz`."""
    short, long = min(shape), max(shape)
    return 4 * short**2 * long + 18 * short**3
