"""What training the decoder takes of a device's memory, by arithmetic: no weight is made, no device is asked.

Every term is something that decoder.py, loss.py or the optimizer keeps, and is named after it. What was kept for the
backward pass is checked against autograd's own hooks in tests/planning/test_memory.py, the sums against the measured
peaks of processes in benchmarks/plan_memory.py.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from lightning_danube.model.config import CHUNK_TOKENS, DecoderConfig

BYTES: dict[str, tuple[int, int]] = {
    "32-true": (4, 4),
    "bf16-mixed": (4, 2),
    "16-mixed": (4, 2),
    "bf16-true": (2, 2),
    "16-true": (2, 2),
    "64-true": (8, 8),
}
"""Precision, as the trainer calls it → bytes of a weight, and of what matrix products take and give."""

Engine = Literal["single", "ddp", "fsdp"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How training is spread over devices.

    Args:
        replicas: data-parallel replicas; each has rows of its own.
        tensor_parallel: devices that share the matrices of one replica.
        sharded: weights, gradients and optimizer state are dealt over the replicas (FSDP2), instead of being held by
            each of them (DDP).
    """

    replicas: int = 1
    tensor_parallel: int = 1
    sharded: bool = False

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor_parallel


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the moment that needs most.

    Args:
        weights: parameters, as stored.
        gradients: of all parameters.
        optimizer: the averages that it keeps.
        casts: 16-bit copies of weights that autocast makes.
        activations: kept for the backward pass, and what one block needs meanwhile.
        logits: of one chunk of tokens, and the gradients that the loss computes with them.
        communication: gathered weights (FSDP2) or gradient buckets (DDP).
        moment: the phase of a step in which it is reached.
    """

    weights: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    logits: int
    communication: int
    moment: str

    PARTS = ("weights", "gradients", "optimizer", "casts", "activations", "logits", "communication")

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in self.PARTS)


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Memory of a training step.

    Args:
        config: the decoder.
        rows, context: of one micro-batch.
        precision: the trainer's name of it, one of BYTES.
        recompute: activation checkpointing.
        accumulate: whether a step has several micro-batches; gradients then live through all but the first.
        layout: how it is spread over devices.
        gpu: kernels of CUDA rather than of the CPU: RMSNorm keeps its input alone in 16 bits, too; the activated gate
            is kept; flash attention is for 16 bits alone.
        document_masks: packed documents do not see each other.
        muon: the optimizer keeps one average of the blocks' matrices, where AdamW keeps two moments.
    """

    config: DecoderConfig
    rows: int
    context: int
    precision: str = "32-true"
    recompute: bool = False
    accumulate: bool = False
    layout: Layout = Layout()
    gpu: bool = False
    document_masks: bool = False
    muon: bool = False

    def __post_init__(self) -> None:
        if self.precision not in BYTES:
            raise ValueError(f"precision is {self.precision!r}; memory is known for {', '.join(BYTES)}")

    # --- what the whole run holds -------------------------------------------------------------------------------------

    @property
    def optimizer_values(self) -> int:
        """Numbers that a device's optimizer keeps."""
        matrices = self.block_matrices // self.layout.tensor_parallel
        saved = self.config.num_hidden_layers * matrices if self.muon else 0
        return 2 * self.stored_parameters - saved

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    @property
    def weight_bytes(self) -> int:
        """Of one stored weight, and of what follows its type: its gradient, its moments, the residual stream."""
        return BYTES[self.precision][0]

    @property
    def _product(self) -> int:
        return BYTES[self.precision][1]

    @property
    def _wide(self) -> int:
        """Bytes of a value where 16 bits would be too few."""
        return max(4, self.weight_bytes)

    @property
    def block_parameters(self) -> int:
        """Parameters of one block's matrices and their biases that a device holds when nothing is sharded over the
        replicas."""
        return (self.block_matrices + self.block_biases) // self.layout.tensor_parallel

    @property
    def block_matrices(self) -> int:
        """Parameters of one block's matrices."""
        c = self.config
        attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * head_dim(c)
        return attention + 3 * c.hidden_size * c.intermediate_size

    @property
    def block_biases(self) -> int:
        c = self.config
        return (c.num_attention_heads + 2 * c.num_key_value_heads) * head_dim(c) if c.qkv_bias else 0

    @property
    def head_parameters(self) -> int:
        return self.config.embedding_parameters // self.layout.tensor_parallel

    @property
    def parameters(self) -> int:
        """Parameters of one device's share of the matrices; gains are on all of them."""
        c = self.config
        embeddings = self.head_parameters * (1 if c.tie_word_embeddings else 2)
        gains = (2 * c.num_hidden_layers + 1) * c.hidden_size
        gains += 2 * c.num_hidden_layers * head_dim(c) if c.qk_norm else 0
        return embeddings + c.num_hidden_layers * self.block_parameters + gains

    @property
    def stored_parameters(self) -> int:
        """Of these, what stays on the device between steps."""
        return -(-self.parameters // self.layout.replicas) if self.layout.sharded else self.parameters

    # --- activations --------------------------------------------------------------------------------------------------

    def norm_bytes(self) -> int:
        """Kept by one RMSNorm of the residual stream for its backward pass."""
        return self._norm_bytes(self.tokens, self.config.hidden_size, self.weight_bytes)

    def _norm_bytes(self, rows: int, channels: int, value: int) -> int:
        """`value`: bytes of an input's value."""
        if self.gpu or value == self._wide:
            return rows * (channels * value + self._wide)
        # The CPU's plain operations on 16-bit values.
        return rows * (2 * channels * self._wide + self._wide)

    def head_norm_bytes(self) -> int:
        """Kept by the norms of one block's query and key heads."""
        c = self.config
        if not c.qk_norm:
            return 0
        heads = (c.num_attention_heads + c.num_key_value_heads) // self.layout.tensor_parallel
        # Autocast gives 16-bit heads to gains in float32, and the norm works on a copy in float32.
        value = self._product if self._product == self.weight_bytes or not self.gpu else self._wide
        return self._norm_bytes(self.tokens * heads, head_dim(c), value)

    def block_bytes(self) -> int:
        """Kept by one block, without the copies of its weights."""
        c, a, tp = self.config, self._product, self.layout.tensor_parallel
        # Autocast makes a copy of the input for each matrix that is multiplied with it.
        queries_and_feed_forward = (3 + 2) if a < self.weight_bytes else (1 + 1)
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        if self.gpu and a != 2:
            kv_heads = heads  # repeated: no fused kernel takes them as they are
        # Of each row of scores its largest, in their type, where they are multiplied in blocks; else what the kernel
        # keeps, in float32.
        of_a_row = a if not self.gpu and a == 2 and _cpu_multiplies_bfloat16() else self._wide
        attention = a * 2 * (heads + kv_heads) * head_dim(c) + of_a_row * heads
        # Gate, up and their product; on a GPU the activated gate, too.
        feed_forward = a * (4 if self.gpu else 3) * c.intermediate_size
        per_token = a * c.hidden_size * queries_and_feed_forward + (attention + feed_forward) // tp
        return 2 * self.norm_bytes() + self.head_norm_bytes() + self.tokens * per_token

    def kept_bytes(self) -> int:
        """Kept by the whole network for its backward pass, without the copies of its weights."""
        c = self.config
        block = self.tokens * c.hidden_size * self.weight_bytes if self.recompute else self.block_bytes()
        rotary = 2 * self.context * head_dim(c) * self._wide
        return c.num_hidden_layers * block + self.norm_bytes() + rotary + self.mask_bytes()

    def mask_bytes(self) -> int:
        """Of documents, one mask a row; of a window alone, one for all rows."""
        window = self.config.sliding_window
        if self.document_masks:
            return self.rows * self.context**2
        return self.context**2 if window is not None and window < self.context else 0

    def cast_bytes(self, blocks: int) -> int:
        """16-bit copies of the weights of so many blocks."""
        matrices = self.block_matrices // self.layout.tensor_parallel
        return self._product * blocks * matrices if self._product < self.weight_bytes else 0

    # --- the phases of a step -----------------------------------------------------------------------------------------

    def loss_phase(self) -> DeviceMemory:
        """The last chunk of the head's gradient is being added: all of the forward pass is kept, gradients of the step
        before are still there (they are dropped just before the backward pass)."""
        c, w, a, wide, N = self.config, self.weight_bytes, self._product, self._wide, self.tokens
        head = self.head_parameters
        # Measured: recomputed blocks' copies are dropped at once, but not those of distributed weights.
        kept = not self.recompute or (self.layout.sharded and self.layout.devices > 1)
        casts = self.cast_bytes(c.num_hidden_layers) if kept else 0
        casts += a * head if a < w else 0
        chunk = min(CHUNK_TOKENS, N) * c.vocab_size // self.layout.tensor_parallel
        logits = chunk * (wide if a == wide else a + wide)
        logits += N * c.hidden_size * a + head * wide  # gradients of hidden states and head
        if a < wide:  # one chunk's part of the latter, which the CPU widens before it adds it
            logits += head * (a if self.gpu else a + wide)
        hidden = N * c.hidden_size * (w if a == w else w + a)
        return self._device(
            "the loss", casts=casts, activations=self.kept_bytes() + hidden, logits=logits, gradients=self.parameters
        )

    def backward_phase(self) -> DeviceMemory:
        """A block is being gone through: the last one, when all others are kept and no gradient is there yet but those
        of earlier micro-batches; or the first one, when only its own are kept and all gradients are there."""
        first, last = self._backward(0), self._backward(self.config.num_hidden_layers - 1)
        return max(first, last, key=lambda memory: memory.total)

    def _backward(self, block: int) -> DeviceMemory:
        c, w, a, N = self.config, self.weight_bytes, self._product, self.tokens
        layers = c.num_hidden_layers
        done = layers - 1 - block
        kept = self.kept_bytes() - self.norm_bytes() - done * (self.kept_bytes_of_block())
        if self.recompute:
            kept += self.block_bytes()
        # Gradients of the residual stream, of the feed-forward's product, gate and up, of one matrix.
        D, width = c.hidden_size, c.intermediate_size // self.layout.tensor_parallel
        meanwhile = 2 * N * D * w + 3 * N * width * a
        largest = D * width
        meanwhile += largest * (a if a == w else a + w)
        gradients = self.parameters if self.accumulate else self.head_parameters + done * self.block_parameters
        casts = self.cast_bytes(1 if self.recompute else block + 1)
        return self._device(
            "the backward pass", casts=casts, activations=kept + meanwhile, logits=0, gradients=gradients
        )

    def kept_bytes_of_block(self) -> int:
        return self.tokens * self.config.hidden_size * self.weight_bytes if self.recompute else self.block_bytes()

    def _device(self, moment: str, *, casts: int, activations: int, logits: int, gradients: int) -> DeviceMemory:
        w = self.weight_bytes
        if self.layout.sharded:
            gradients = -(-gradients // self.layout.replicas)
        return DeviceMemory(
            weights=w * self.stored_parameters,
            gradients=w * gradients,
            optimizer=w * self.optimizer_values,
            casts=casts,
            activations=activations,
            logits=logits,
            communication=w * self.communicated_parameters(backward=not logits),
            moment=moment,
        )

    def communicated_parameters(self, *, backward: bool) -> int:
        """Parameters whose values or gradients a device holds whole for the sake of others.

        DDP: its buckets, beside the gradients. FSDP2: the embedding and the head, gathered from the forward pass to the
        end of the backward pass; in that, their whole gradients as well, of the blocks the one at work and the one
        gathered ahead of it, and one block's whole gradients.
        """
        if self.layout.replicas == 1:
            return 0
        if not self.layout.sharded:
            return self.parameters
        ends = self.head_parameters * (1 if self.config.tie_word_embeddings else 2)
        return 2 * ends + 3 * self.block_parameters if backward else ends

    def peak(self) -> DeviceMemory:
        return max(self.loss_phase(), self.backward_phase(), key=lambda memory: memory.total)


def _cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this CPU. Only then PyTorch is imported, which takes 2 CPU s."""
    import torch

    from lightning_danube.device import onednn_multiplies

    return onednn_multiplies(torch.bfloat16)


def head_dim(config: DecoderConfig) -> int:
    assert config.head_dim is not None  # resolved by the config
    return config.head_dim
