"""Computes how much memory of a device the training of the decoder needs, without weights and without a device.

Every term is something that decoder.py, loss.py or the optimizer keeps, and is named after it. The tensors kept for the
backward pass are checked against autograd's own hooks in tests/planning/test_memory.py. The sums are checked against
the measured peaks of processes in benchmarks/plan_memory.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from lightning_danube.model.architecture import (
    BLOCK_LAYERS,
    Role,
    WeightLayer,
    number_of_heads,
    parameters_of,
)
from lightning_danube.model.config import CHUNK_TOKENS, ActivationCheckpointing, DecoderConfig, gpu_chunk_tokens
from lightning_danube.weights.lora import Lora

BYTES: dict[str, tuple[int, int]] = {
    "32-true": (4, 4),
    "bf16-mixed": (4, 2),
    "16-mixed": (4, 2),
    "bf16-true": (2, 2),
    "16-true": (2, 2),
    "64-true": (8, 8),
}
"""The trainer's name of a precision → bytes of a weight, and of the inputs and outputs of matrix products."""

BYTES_IN_4_BITS = 0.5 + 1 / 64
"""Bytes of a weight in 4 bits, with an 8-bit scale for each 64 weights."""

IMPORTS = 450 * 2**20
"""Bytes of the libraries in a process on a CPU."""


def kept_beside_tensors(planned: int) -> int:
    """Returns about how many bytes kernels, mapped files and the allocator of a process on a CPU keep.

    A line through the three measurements of benchmarks/plan_process.py, which are of one shape.

    Args:
        planned: bytes of the tensors at their peak.
    """
    return 57 * 2**20 + 42 * planned // 100


DDP_BUCKET = 25 * 2**20
"""Bytes of one of DDP's buckets, its default."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How training is spread over devices.

    Args:
        replicas: number of data-parallel replicas; each processes other rows.
        tensor_parallel: number of devices that share the matrices of one replica.
        sharded: weights, gradients and optimizer state are sharded over the replicas (FSDP2), instead of copied to
            each of them (DDP).
        shard_size: number of replicas that share one copy (HSDP); None: all replicas.
        gather_again, reduce_once: options of the strategy, see checkpoints/strategy.py.
    """

    replicas: int = 1
    tensor_parallel: int = 1
    sharded: bool = False
    shard_size: int | None = None
    gather_again: bool = True
    reduce_once: bool = True

    @property
    def shares(self) -> int:
        """Returns into how many parts the weights of a device are sharded."""
        return (self.shard_size or self.replicas) if self.sharded else 1

    @property
    def by_fsdp(self) -> bool:
        """Returns whether FSDP2 gathers weights and sums gradients. Without replicas there is nothing to do for it."""
        return self.sharded and self.replicas > 1

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor_parallel


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the moment of the highest use.

    Args:
        weights: parameters, as stored.
        gradients: gradients of all parameters.
        optimizer: the averages that the optimizer keeps.
        casts: 16-bit copies of weights that autocast makes. FSDP2 gathers weights in 16 bits instead.
        activations: tensors kept for the backward pass, and the temporary tensors of one block.
        logits: logits of one chunk of tokens, and the gradients that the loss computes with them.
        communication: weights that FSDP2 gathers and gradients that it sends; a bucket of DDP while it is sent.
        moment: the phase of a step in which the peak is reached.
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
        rows, context: shape of one micro-batch.
        precision: the trainer's name of the precision, one of BYTES.
        recompute: the kind of activation checkpointing.
        accumulate: whether a step has several micro-batches; gradients then stay in memory in all but the first.
        layout: how training is spread over devices.
        compiled: the blocks are compiled for a GPU. The compiler keeps the result of attention's last product in place
            of the second norm's input, and computes the activated gate again.
        float8: the blocks' matrices are multiplied in FP8, so no 16-bit copies of them are kept. Compiled blocks then
            keep no inputs of products that they can compute again from what they keep anyway: the normed residual
            stream, and the product of gate and up. A product in FP8 reads copies in 8 bits, which the backward pass
            makes again.
        gpu: CUDA kernels instead of the CPU's: RMSNorm keeps only its input in 16 bits, too; the activated gate is
            kept; flash attention needs 16 bits, and reads no dense mask; the loss takes larger chunks, and no wider
            copy of their logits.
        document_masks: whether packed documents are masked from each other.
        averages: values that the optimizer keeps for each weight: of the blocks' matrices, and of all other parameters.
        orthogonalizes: whether the optimizer makes the steps of the blocks' matrices orthogonal, as Muon does.
        lora: the adapter that trains on frozen weights; None: all weights train. What DoRA and 4-bit weights keep
            beside that is not counted.
        new_tokens: tokens whose rows of the embedding and of the head train beside the adapter.
    """

    config: DecoderConfig
    rows: int
    context: int
    precision: str = "32-true"
    recompute: ActivationCheckpointing = False
    accumulate: bool = False
    layout: Layout = Layout()
    gpu: bool = False
    compiled: bool = False
    float8: bool = False
    document_masks: bool = False
    averages: tuple[int, int] = (2, 2)
    orthogonalizes: bool = False
    lora: Lora | None = None
    new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.precision not in BYTES:
            raise ValueError(f"precision is {self.precision!r}; memory is known for {', '.join(BYTES)}")

    # --- memory held during the whole run -----------------------------------------------------------------------------

    @property
    def optimizer_values(self) -> int:
        """Returns how many numbers the optimizer keeps on a device."""
        if self.lora is not None:
            return -(-self.averages[1] * self.trained_parameters // self.layout.shares)
        of_matrices, of_others = self.averages
        matrices = self.config.num_hidden_layers * self.block_matrices // self.layout.tensor_parallel
        matrices = -(-matrices // self.layout.replicas) if self.layout.sharded else matrices
        return of_matrices * matrices + of_others * (self.stored_parameters - matrices)

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    @property
    def weight_bytes(self) -> int:
        """Returns bytes per stored weight. Gradients, moments and the residual stream have the same type."""
        return BYTES[self.precision][0]

    @property
    def _product(self) -> int:
        return BYTES[self.precision][1]

    @property
    def _wide(self) -> int:
        """Returns bytes of a value that needs more than 16 bits."""
        return max(4, self.weight_bytes)

    @property
    def block_parameters(self) -> int:
        """Returns the parameters of one block's matrices and biases on a device, before sharding over replicas."""
        sizes = {True: 0, False: 0}  # whether tensor parallelism divides them → the sum
        for layer in _of_role("matrix"):
            for part, shape in layer.shapes(self.config).items():
                sizes[layer.is_sharded(part)] += math.prod(shape)
        return sizes[True] // self.layout.tensor_parallel + sizes[False]

    @property
    def block_matrices(self) -> int:
        """Returns the parameters of one block's matrices, without biases."""
        return sum(inputs * outputs for inputs, outputs in self.matrix_widths.values())

    @property
    def head_parameters(self) -> int:
        return self.config.embedding_parameters // self.layout.tensor_parallel

    @property
    def parameters(self) -> int:
        """Returns the parameters of a device: its share of the matrices, and all gains."""
        c = self.config
        embeddings = self.head_parameters * (1 if c.tie_word_embeddings else 2)
        block = self.block_parameters + parameters_of(_of_role("gain"), c)
        return embeddings + c.num_hidden_layers * block + c.hidden_size

    @property
    def stored_parameters(self) -> int:
        """Returns how many of the parameters stay on the device between steps."""
        return -(-self.parameters // self.layout.shares)

    @property
    def trained_parameters(self) -> int:
        """Returns how many parameters of a device train: all of them, or those of the adapter and of new rows."""
        if self.lora is None:
            return self.parameters
        inputs, outputs = self._widths_of_targets
        of_a_block = self.lora.rank * (inputs + outputs) + (outputs if self.lora.dora else 0)
        c = self.config
        rows = self.new_tokens * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        return c.num_hidden_layers * of_a_block + rows

    @property
    def _widths_of_targets(self) -> tuple[int, int]:
        """Returns the sums of the inputs' and of the outputs' channels of the layers with an adapter in one block."""
        assert self.lora is not None
        inputs = [self.matrix_widths[name][0] for name in self.lora.targets]
        outputs = [self.matrix_widths[name][1] for name in self.lora.targets]
        return sum(inputs), sum(outputs)

    @property
    def matrix_widths(self) -> dict[str, tuple[int, int]]:
        """Returns the channels of the input and of the output of one block's matrices, by their short names."""
        widths = {}
        for layer in _of_role("matrix"):
            if shapes := layer.shapes(self.config):
                outputs, inputs = shapes["weight"]
                widths[layer.short_name] = inputs, outputs
        return widths

    @property
    def _weights(self) -> int:
        """Returns the bytes of the stored weights and of an adapter on a device."""
        if self.lora is None:
            return self.weight_bytes * self.stored_parameters
        adapter = self.weight_bytes * self.trained_parameters
        matrices = self.config.num_hidden_layers * self.block_matrices // self.layout.tensor_parallel
        if self.lora.quantization is None:
            return self.weight_bytes * self.stored_parameters + adapter
        return int(BYTES_IN_4_BITS * matrices) + self.weight_bytes * (self.parameters - matrices) + adapter

    # --- activations --------------------------------------------------------------------------------------------------

    def norm_bytes(self) -> int:
        """Returns the bytes that one RMSNorm of the residual stream keeps for its backward pass."""
        return self._norm_bytes(self.tokens, self.config.hidden_size, self.weight_bytes)

    def _norm_bytes(self, rows: int, channels: int, value: int) -> int:
        """Returns the bytes that one RMSNorm keeps. `value` is the bytes of an input's value."""
        if self.gpu or value == self._wide:
            return rows * (channels * value + self._wide)
        # The CPU's plain operations on 16-bit values. A frozen gain needs no copy of the normed values.
        copies = 2 if self.lora is None else 1
        return rows * (copies * channels * self._wide + self._wide)

    def head_norm_bytes(self) -> int:
        """Returns the bytes that the norms of one block's query and key heads keep."""
        c = self.config
        kinds = [layer.each_head for layer in _of_role("gain") if layer.each_head is not None and layer.shapes(c)]
        heads = sum(number_of_heads(c, kind) for kind in kinds) // self.layout.tensor_parallel
        # Under autocast the heads have 16 bits and the gains float32, so the norm works on a float32 copy.
        value = self._product if self._product == self.weight_bytes or not self.gpu else self._wide
        return self._norm_bytes(self.tokens * heads, head_dim(c), value)

    def block_bytes(self) -> int:
        """Returns the bytes that one block keeps, without the copies of its weights."""
        c, a, tp = self.config, self._product, self.layout.tensor_parallel
        # On a CPU autocast copies the input for each matrix that multiplies it. On a GPU the norm writes one copy.
        queries_and_feed_forward = (3 + 2) if a < self.weight_bytes and not self.gpu else (1 + 1)
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        if self._repeats_heads:
            kv_heads = heads
        attention = a * (heads + 2 * kv_heads) * head_dim(c) + self._attention_bytes_of_a_token()
        # Gate, up and their product; on a GPU also the activated gate.
        feed_forward = a * (4 if self.gpu else 3) * c.intermediate_size
        per_token = a * c.hidden_size * queries_and_feed_forward + (attention + feed_forward) // tp
        if self.gpu and self.compiled:
            per_token -= c.hidden_size * (self.weight_bytes - a) + a * c.intermediate_size // tp
            if self.float8:
                per_token -= 2 * a * c.hidden_size + a * c.intermediate_size // tp
        per_token += self._more_bytes_with_lora()
        norms = sum(layer.each_head is None and bool(layer.shapes(c)) for layer in _of_role("gain"))
        return norms * self.norm_bytes() + self.head_norm_bytes() + self.tokens * per_token

    def _more_bytes_with_lora(self) -> int:
        """Returns the bytes for one token that one block keeps more (or fewer, if negative) because of an adapter.

        A frozen matrix does not need its input for its gradient. An adapter needs its own input, and its narrow states.
        """
        if self.lora is None:
            return 0
        a, targets = self._product, self.lora.targets
        more = a * self.lora.rank * len(targets)
        copies = not self.gpu and a < self.weight_bytes  # autocast on a CPU copies the input for each matrix
        if self.lora.dropout:
            # Each adapter has its own input after dropout, and the mask.
            mask = 1 if self.gpu else self.weight_bytes  # on a CPU the mask is a tensor of the adapter's type
            more += (a + mask) * self._widths_of_targets[0]
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)):
            width = a * self.matrix_widths[names[0]][0]
            kept = 0 if self.lora.dropout else sum(name in targets for name in names)
            more -= width * (len(names) - kept if copies else int(not kept))
        return more

    def _not_kept_of_first_block(self) -> int:
        """Returns the bytes that the first block does not keep, because a frozen embedding needs no gradient."""
        if self.lora is None or self.new_tokens or self.recompute:
            return 0
        shared = [name for name in ("q_proj", "k_proj", "v_proj") if name in self.lora.targets]
        mask = (1 if self.gpu else self.weight_bytes) if self.lora.dropout else 0
        return self.norm_bytes() + self.tokens * mask * self.config.hidden_size * len(shared)

    def _attention_bytes_of_a_token(self) -> int:
        """Returns the bytes that attention keeps of its own results for one token, before tensor parallelism."""
        heads = self.config.num_attention_heads
        # If scores are computed in blocks, the largest of each row, in their type. Otherwise the kernel's own
        # statistics, in float32.
        of_a_row = self._product if self._attention_by_blocks else self._wide
        return heads * (self._product * head_dim(self.config) + of_a_row)

    @property
    def _attention_by_blocks(self) -> bool:
        return not self.gpu and self._product == 2 and _cpu_multiplies_bfloat16()

    def kept_bytes_of_block(self) -> int:
        """Returns the bytes that one block keeps until its backward pass."""
        if not self.recompute:
            return self.block_bytes()
        return self.tokens * self.config.hidden_size * self.weight_bytes + self._kept_attention_bytes()

    def _kept_attention_bytes(self) -> int:
        """Returns the bytes of one block's attention that "selective" activation checkpointing keeps."""
        if self.recompute != "selective" or self._attention_by_blocks:  # no kernel of PyTorch
            return 0
        return self.tokens * self._attention_bytes_of_a_token() // self.layout.tensor_parallel

    def kept_bytes(self) -> int:
        """Returns the bytes that the network keeps for its backward pass, without the copies of its weights."""
        c = self.config
        block = self.kept_bytes_of_block()
        rotary = 2 * self.context * head_dim(c) * self._wide
        whole = c.num_hidden_layers * block + self.norm_bytes() + rotary + self.mask_bytes()
        return whole - self._not_kept_of_first_block()

    @property
    def _form(self) -> Literal["none", "runs", "blocks", "dense"]:
        """Returns the form of attention's mask, as `form_of` in model/masks.py chooses it for the usual head sizes."""
        window = self.config.sliding_window
        if not self.document_masks and (window is None or window >= self.context):
            return "none"
        if not self.gpu or self.config.attention_dropout or self._product == 8:
            return "dense"
        return "runs" if self._product == 2 else "blocks"

    @property
    def _repeats_heads(self) -> bool:
        """Returns whether key-value heads are repeated, because the kernel takes no grouped heads."""
        return self.gpu and (self._form == "dense" or (self._form == "none" and self._product != 2))

    def mask_bytes(self) -> int:
        """Returns the bytes of the attention mask, which all layers share."""
        if self._form == "dense":
            rows = self.rows if self.document_masks else 1
            return rows * self.context**2 * (self._product if self.gpu else 1)
        if self._form == "blocks":
            # Whole and partial blocks of 128, their numbers and how many there are, by queries and by keys.
            blocks = -(-self.context // 128)
            return self.rows * 2 * 2 * 4 * (blocks**2 + blocks)
        # Runs are four bytes a document.
        return 0

    def cast_bytes(self, blocks: int) -> int:
        """Returns the bytes of the 16-bit copies of some blocks' weights."""
        if self.float8 or self.layout.by_fsdp:
            return 0
        if self.lora is not None and self.lora.quantization is not None:
            # Each matrix is decoded for its product, and not kept.
            return self._product * self.config.hidden_size * self.config.intermediate_size
        matrices = self.block_matrices // self.layout.tensor_parallel
        return self._product * blocks * matrices if self._product < self.weight_bytes else 0

    # --- the phases of a step -----------------------------------------------------------------------------------------

    def loss_phase(self) -> DeviceMemory:
        """Returns the memory while the last chunk of the head's gradient is added.

        All of the forward pass is kept. The previous step's gradients still exist: they are freed just before the
        backward pass.
        """
        c, w, a, wide, N = self.config, self.weight_bytes, self._product, self._wide, self.tokens
        head = self.head_parameters
        # Measured: copies of recomputed blocks' weights are freed at once, but not copies of distributed weights.
        kept = not self.recompute or (self.layout.sharded and self.layout.devices > 1)
        casts = self.cast_bytes(c.num_hidden_layers) if kept else 0
        casts += a * head if a < w and not self.layout.by_fsdp else 0
        vocabulary = c.vocab_size // self.layout.tensor_parallel
        chunk = min(gpu_chunk_tokens(vocabulary, a) if self.gpu else CHUNK_TOKENS, N) * vocabulary
        # The fused kernels of a GPU need no wider copy.
        logits = chunk * (a if self.gpu or a == wide else a + wide)
        logits += N * c.hidden_size * a  # the gradient of the hidden states
        if self._head_trains:
            logits += head * wide
        if self.lora is not None and self.new_tokens:
            logits += 2 * head * w  # the embedding and the head with the new rows
        if a < wide and self._head_trains:  # one chunk's gradient of the head, which the CPU widens before the addition
            logits += head * (a if self.gpu else a + wide)
        hidden = N * c.hidden_size * (a if self.gpu or a == w else w + a)
        return self._device(
            "the loss",
            casts=casts,
            activations=self.kept_bytes() + hidden,
            logits=logits,
            gradients=self.trained_parameters,
        )

    @property
    def _head_trains(self) -> bool:
        return self.lora is None or self.new_tokens > 0

    def backward_phase(self) -> DeviceMemory:
        """Returns the higher memory of two moments of the backward pass.

        In the last block, the activations of all blocks are kept, and only earlier micro-batches have gradients. In the
        first block, only its own activations are kept, and all gradients exist.
        """
        first, last = self._backward(0), self._backward(self.config.num_hidden_layers - 1)
        return max(first, last, key=lambda memory: memory.total)

    def _backward(self, block: int) -> DeviceMemory:
        c, w, a, N = self.config, self.weight_bytes, self._product, self.tokens
        layers = c.num_hidden_layers
        done = layers - 1 - block
        kept = self.kept_bytes() - self.norm_bytes() - done * (self.kept_bytes_of_block())
        if self.recompute:
            kept += self.block_bytes() - self._kept_attention_bytes()
        # Gradients of the residual stream, of the feed-forward's product, gate and up, and of one matrix.
        D, width = c.hidden_size, c.intermediate_size // self.layout.tensor_parallel
        meanwhile = 2 * N * D * w + 3 * N * width * a
        largest = D * width
        meanwhile += largest * (a if a == w else a + w)
        gradients = self.parameters if self.accumulate else self.head_parameters + done * self.block_parameters
        if self.lora is not None:
            gradients = self.trained_parameters
            meanwhile += self.head_parameters * w if self.new_tokens else 0
        casts = self.cast_bytes(1 if self.recompute else block + 1)
        return self._device(
            "the backward pass", casts=casts, activations=kept + meanwhile, logits=0, gradients=gradients
        )

    def _device(self, moment: str, *, casts: int, activations: int, logits: int, gradients: int) -> DeviceMemory:
        w = self.weight_bytes
        if self.layout.replicas > 1 and not self.layout.sharded:
            gradients = self.trained_parameters  # DDP's buckets, which stay
        if not (self.layout.by_fsdp and self.accumulate and self.layout.reduce_once):
            gradients = -(-gradients // self.layout.shares)
        return DeviceMemory(
            weights=self._weights,
            gradients=w * gradients,
            optimizer=w * self.optimizer_values,
            casts=casts,
            activations=activations,
            logits=logits,
            communication=self.communication_bytes(backward=not logits),
            moment=moment,
        )

    def communication_bytes(self, *, backward: bool) -> int:
        """Returns the bytes that a device holds for communication.

        DDP: one more bucket in the backward pass, while the buckets are sent. FSDP2: whole weights and gradients.

        The embedding and the head are gathered from the forward pass to the end of the backward pass. In the backward
        pass there are also their whole gradients, the current block, the next block (gathered ahead), one block's whole
        gradients, and with 16-bit products these gradients in float32, as they are sent.
        """
        if not self.layout.by_fsdp:
            buckets = self.weight_bytes * self.trained_parameters if self.layout.replicas > 1 else 0
            return min(buckets, DDP_BUCKET) if backward else 0
        a, wide = self._product, self._wide
        ends = self.head_parameters * (1 if self.config.tie_word_embeddings else 2)
        blocks = 0 if self.layout.gather_again else self.config.num_hidden_layers * self.block_parameters
        if not backward:
            return a * (ends + blocks)
        sent = wide if a < self.weight_bytes else 0
        ahead = 2 * self.block_parameters if self.layout.gather_again else 0
        return a * (2 * ends + (blocks or ahead)) + (a + sent) * self.block_parameters

    def optimizer_phase(self) -> DeviceMemory:
        """Returns the memory while Muon orthogonalizes. AdamW's fused kernel makes no tensors.

        Muon holds new averages and directions of all matrices of the blocks, and the results of the shapes that it has
        done. Of the last shape, that of the feed-forward, it holds a stack, its scaled copy, the result and four square
        matrices each.
        """
        made = 0
        if self.orthogonalizes and self.lora is None:
            c = self.config
            matrices = c.num_hidden_layers * self.block_matrices
            last = 3 * c.num_hidden_layers * c.hidden_size * c.intermediate_size
            squares = 4 * 3 * c.num_hidden_layers * min(c.hidden_size, c.intermediate_size) ** 2
            made = 2 * self.weight_bytes * matrices + self._wide * (matrices - last + 3 * last + squares)
        kept = self._device("the optimizer", casts=0, activations=0, logits=0, gradients=self.trained_parameters)
        communication = DDP_BUCKET if kept.communication == DDP_BUCKET else 0
        return dataclasses.replace(kept, optimizer=kept.optimizer + made, communication=communication)

    def peak(self) -> DeviceMemory:
        phases = self.loss_phase(), self.backward_phase(), self.optimizer_phase()
        return max(phases, key=lambda memory: memory.total)


def _cpu_multiplies_bfloat16() -> bool:
    """Returns whether oneDNN multiplies bfloat16 matrices on this CPU. Importing PyTorch for this takes 2 CPU s."""
    import torch

    from lightning_danube.device import onednn_multiplies

    return onednn_multiplies(torch.bfloat16)


def _of_role(role: Role) -> list[WeightLayer]:
    """Returns the layers of one block that have a role. Not every decoder has all of them."""
    return [layer for layer in BLOCK_LAYERS if layer.role == role]


def head_dim(config: DecoderConfig) -> int:
    assert config.head_dim is not None  # resolved by the config
    return config.head_dim
