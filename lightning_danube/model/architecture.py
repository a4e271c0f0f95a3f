"""Three tables: the layers of the decoder that have weights, its options, and the families of checkpoints.

GGUF files, tensor parallelism, LoRA, quantization, the number of parameters and the memory plan take names and shapes
of layers from the first table. Model cards describe a decoder by the second. The third says what a `config.json` or the
header of a GGUF file means, and as which family a decoder is saved. A new variant needs an option of `DecoderShape`,
rows in these tables, and code in attention.py or decoder.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .config import DecoderConfig, DecoderShape

# --- layers ---------------------------------------------------------------------------------------------------------

Role = Literal["embedding", "gain", "matrix", "head"]
Heads = Literal["query", "key"]
Axis = Literal["vocabulary", "hidden", "feed_forward", "queries", "keys", "head"]
"""An axis of a weight. "queries" and "keys" are the channels of all heads of their kind, "head" those of one head."""


def number_of_heads(config: DecoderShape, heads: Heads) -> int:
    return config.num_attention_heads if heads == "query" else config.num_key_value_heads


def sizes_of_axes(config: DecoderConfig) -> dict[Axis, int]:
    """Returns the channels, or rows, of each axis."""
    assert config.head_dim is not None  # resolved by the config
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "feed_forward": config.intermediate_size,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "head": config.head_dim,
    }


@dataclass(frozen=True)
class WeightLayer:
    """One kind of layer that has weights.

    Args:
        name: name of the module, as in Hugging Face's models; in a block it follows `model.layers.<number>.`.
        gguf: name in GGUF files; in a block it follows `blk.<number>.`.
        role: "matrix" is a linear layer of a block. LoRA may adapt these, and quantization may round them.
        axes: the axes of the weight in PyTorch's order: outputs, then inputs. A bias has the outputs.
        shard_axis: the axis of the weight that tensor parallelism divides over devices. 0 is the output channels, which
            the bias follows; 1 is the input channels. None: every device holds the whole weight.
        each_head: the layer works on each of these heads alone. Under tensor parallelism it gets only the heads of its
            device.
        heads: the rows of the weight are the channels of these heads, and rotary positions turn them.
        bias: the option of the config that gives the layer a bias.
        option: the option of the config that adds the layer; None: every decoder has the layer.
    """

    name: str
    gguf: str
    role: Role
    axes: tuple[Axis, ...]
    shard_axis: Literal[0, 1] | None = None
    each_head: Heads | None = None
    heads: Heads | None = None
    bias: str | None = None
    option: str | None = None

    @property
    def adaptable(self) -> bool:
        """Whether a new LoRA adapter may be attached to the layer."""
        return self.role == "matrix"

    @property
    def quantizable(self) -> bool:
        """Whether quantization replaces the layer by default, when embeddings are not requested."""
        return self.role == "matrix"

    @property
    def short_name(self) -> str:
        """The last part of the name, by which LoRA knows the layer."""
        return self.name.rpartition(".")[2]

    def shapes(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the layer's parameters in this decoder: of "weight" and perhaps "bias", or of none."""
        if self.option is not None and not is_on(config, self.option):
            return {}
        sizes = sizes_of_axes(config)
        shapes = {"weight": tuple(sizes[axis] for axis in self.axes)}
        if self.bias is not None and is_on(config, self.bias):
            shapes["bias"] = shapes["weight"][:1]
        return shapes

    def is_sharded(self, part: str) -> bool:
        """Returns whether tensor parallelism divides the parameter called `part` over devices."""
        return self.shard_axis == 0 or (self.shard_axis == 1 and part == "weight")


EMBEDDING = WeightLayer("model.embed_tokens", "token_embd", "embedding", ("vocabulary", "hidden"), shard_axis=0)
# The order is that of the tensors in this project's GGUF files.
BLOCK_LAYERS = (
    WeightLayer("input_layernorm", "attn_norm", "gain", ("hidden",)),
    WeightLayer(
        "self_attn.q_proj", "attn_q", "matrix", ("queries", "hidden"), shard_axis=0, heads="query", bias="qkv_bias"
    ),
    WeightLayer("self_attn.k_proj", "attn_k", "matrix", ("keys", "hidden"), shard_axis=0, heads="key", bias="qkv_bias"),
    WeightLayer("self_attn.v_proj", "attn_v", "matrix", ("keys", "hidden"), shard_axis=0, bias="qkv_bias"),
    WeightLayer("self_attn.q_norm", "attn_q_norm", "gain", ("head",), each_head="query", option="qk_norm"),
    WeightLayer("self_attn.k_norm", "attn_k_norm", "gain", ("head",), each_head="key", option="qk_norm"),
    WeightLayer("self_attn.o_proj", "attn_output", "matrix", ("hidden", "queries"), shard_axis=1),
    WeightLayer("post_attention_layernorm", "ffn_norm", "gain", ("hidden",)),
    WeightLayer("mlp.gate_proj", "ffn_gate", "matrix", ("feed_forward", "hidden"), shard_axis=0),
    WeightLayer("mlp.up_proj", "ffn_up", "matrix", ("feed_forward", "hidden"), shard_axis=0),
    WeightLayer("mlp.down_proj", "ffn_down", "matrix", ("hidden", "feed_forward"), shard_axis=1),
)
LAST_NORM = WeightLayer("model.norm", "output_norm", "gain", ("hidden",))
HEAD = WeightLayer("lm_head", "output", "head", ("vocabulary", "hidden"), shard_axis=0)
ADAPTABLE = tuple(layer.short_name for layer in BLOCK_LAYERS if layer.adaptable)
"""Short names of the layers that LoRA may adapt."""


@dataclass(frozen=True)
class NamedTensor:
    """One tensor of a decoder: its name (as in Hugging Face's files), its name in GGUF files, its layer and shape."""

    name: str
    gguf: str
    layer: WeightLayer
    shape: tuple[int, ...]


def tensors_of(config: DecoderConfig) -> Iterator[NamedTensor]:
    """Yields the tensors of a decoder in the order of a GGUF file, without a tied head."""
    yield from _named(EMBEDDING, config, "", "")
    for number in range(config.num_hidden_layers):
        for layer in BLOCK_LAYERS:
            yield from _named(layer, config, f"model.layers.{number}.", f"blk.{number}.")
    yield from _named(LAST_NORM, config, "", "")
    if not config.tie_word_embeddings:
        yield from _named(HEAD, config, "", "")


def quantizable_layers(config: DecoderConfig) -> list[str]:
    """Returns the names of the modules that quantization may replace, without embedding and head."""
    return [
        tensor.name.removesuffix(".weight")
        for tensor in tensors_of(config)
        if tensor.layer.quantizable and tensor.name.endswith(".weight")
    ]


def tensors_added_by(option: str) -> set[str]:
    """Returns the names in GGUF files of the tensors that an option adds to the first block; none if it adds none."""
    added = {f"{layer.gguf}.weight" for layer in BLOCK_LAYERS if layer.option == option}
    added |= {f"{layer.gguf}.bias" for layer in BLOCK_LAYERS if layer.bias == option}
    return {f"blk.0.{name}" for name in added}


def parameters_of(layers: Iterable[WeightLayer], config: DecoderConfig) -> int:
    """Returns the number of parameters of some layers, each counted once."""
    return sum(math.prod(shape) for layer in layers for shape in layer.shapes(config).values())


def _named(layer: WeightLayer, config: DecoderConfig, ours: str, theirs: str) -> Iterator[NamedTensor]:
    for part, shape in layer.shapes(config).items():
        yield NamedTensor(f"{ours}{layer.name}.{part}", f"{theirs}{layer.gguf}.{part}", layer, shape)


# --- options --------------------------------------------------------------------------------------------------------

OPTIONS: Mapping[str, tuple[str, str]] = {
    "sliding_window": ("sliding window, tokens", "{:,}"),
    "rope_scaling": ("rotary positions", "{0.factor:g} times slower at long wavelengths"),
    "nope_interval": ("layers without rotary positions", "one in {}"),
    "qkv_bias": ("biases", "of queries, keys and values"),
    "qk_norm": ("norms of heads", "of queries and keys"),
}
"""Field of `DecoderShape` in which the families differ → title and format of its row in a model card.

All are off in Danube3.
"""


# --- families -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Args:
        model_type: the field of that name in `config.json`.
        classes: the prefix of the class names in transformers.
        gguf: `general.architecture` of the family's GGUF files.
        turns_neighbours: llama.cpp turns channels 2i and 2i + 1 of a head as one pair, where this project and
            transformers turn i and i + K/2. The rows of the query and key matrices then have another order.
        needs: options that every decoder of the family has.
        allows: options that some decoders of the family have.
        not_in_gguf: options that llama.cpp does not compute for the architecture.
        in_gguf: options that are not weights → the number that llama.cpp's architecture has, whatever the file says, or
            the key of the number in the file, without the architecture's prefix.
        fixed: fields of `config.json` that must have this value; export writes them, too.
        defaults: values of fields that `config.json` leaves out, where they differ from Llama's defaults.
    """

    model_type: str
    classes: str
    gguf: str
    turns_neighbours: bool
    needs: frozenset[str] = frozenset()
    allows: frozenset[str] = frozenset()
    not_in_gguf: frozenset[str] = frozenset()
    in_gguf: Mapping[str, int | str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def class_name(self, task: Literal["CausalLM", "SequenceClassification"]) -> str:
        """Returns the name of the class in transformers that loads such a model."""
        return f"{self.classes}For{task}"


DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
}
"""Values of the fields that the `config.json` of a Llama model leaves out."""
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
# A decoder is saved as the first family that has its options.
FAMILIES = (
    Family(
        "llama",
        "Llama",
        "llama",
        turns_neighbours=True,
        allows=frozenset({"rope_scaling"}),
        fixed={**NO_BIAS, "pretraining_tp": 1},
    ),
    Family(
        "mistral",
        "Mistral",
        "llama",
        turns_neighbours=True,
        allows=frozenset({"sliding_window"}),
        not_in_gguf=frozenset({"sliding_window"}),
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    ),
    Family(
        "qwen2",
        "Qwen2",
        "qwen2",
        turns_neighbours=False,
        needs=frozenset({"qkv_bias"}),
        fixed={"use_sliding_window": False},
        defaults={"num_key_value_heads": 32, "vocab_size": 151936, "max_position_embeddings": 32768},
    ),
    Family(
        "qwen3",
        "Qwen3",
        "qwen3",
        turns_neighbours=False,
        needs=frozenset({"qk_norm"}),
        fixed={"attention_bias": False, "use_sliding_window": False},
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
        },
    ),
    Family(
        "smollm3",
        "SmolLM3",
        "smollm3",
        turns_neighbours=True,
        allows=frozenset({"nope_interval"}),
        in_gguf={"nope_interval": 4},
        fixed={**NO_BIAS, "use_sliding_window": False},
        defaults={
            "num_key_value_heads": 4,
            "vocab_size": 128256,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
    ),
)


def is_on(config: DecoderShape, option: str) -> bool:
    return getattr(config, option) not in (None, False)


def family_options(config: DecoderShape) -> frozenset[str]:
    """Returns the options that are on in a decoder."""
    return frozenset(option for option in OPTIONS if is_on(config, option))


def family_of(config: DecoderShape) -> Family:
    """Returns the family as which a decoder is saved.

    Raises:
        ValueError: no family combines these options.
    """
    used = family_options(config)
    for family in FAMILIES:
        if family.needs <= used <= family.needs | family.allows:
            return family
    raise ValueError(
        f"{' and '.join(sorted(used))} together: no checkpoint that transformers loads has them, so the model could "
        "not be exported: leave one out"
    )


def family_called(model_type: Any) -> Family:
    """Returns the family of a `config.json` by its `model_type`.

    Raises:
        ValueError: no family has this `model_type`.
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ValueError(f"model_type is {model_type!r}; these can be loaded: {known}")


def family_in_gguf(architecture: Any) -> Family:
    """Returns the first family whose GGUF files have this `general.architecture`.

    Raises:
        ValueError: no family has this architecture.
    """
    for family in FAMILIES:
        if family.gguf == architecture:
            return family
    known = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES))
    raise ValueError(f"the architecture is {architecture!r}; these can be loaded: {known}")
