"""Two tables: the layers of the decoder that have weights, and the families of checkpoints that can hold a decoder.

GGUF files, tensor parallelism, LoRA and quantization take the names of layers from the first table. The second table
says what a `config.json` or the header of a GGUF file means, and as which family a decoder is saved. A new variant
needs an option of `DecoderShape`, rows in these tables, and code in attention.py or decoder.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .config import DecoderConfig, DecoderShape

# --- layers ---------------------------------------------------------------------------------------------------------

Role = Literal["embedding", "gain", "matrix", "head"]


@dataclass(frozen=True)
class WeightLayer:
    """One kind of layer that has weights.

    Args:
        name: name of the module, as in Hugging Face's models; in a block it follows `model.layers.<number>.`.
        gguf: name in GGUF files; in a block it follows `blk.<number>.`.
        role: "matrix" is a linear layer of a block. LoRA may adapt these, and quantization may round them.
        shard_axis: the axis of the weight that tensor parallelism divides over devices. 0 is the output channels, which
            the bias follows; 1 is the input channels. None: every device holds the whole weight.
        sees_some_heads: under tensor parallelism the layer gets only the heads of its device.
        heads: the rows of the weight are the channels of these heads, and rotary positions turn them.
        bias: the option of the config that gives the layer a bias.
        option: the option of the config that adds the layer; None: every decoder has the layer.
    """

    name: str
    gguf: str
    role: Role
    shard_axis: Literal[0, 1] | None = None
    sees_some_heads: bool = False
    heads: Literal["query", "key"] | None = None
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

    def parts(self, config: DecoderShape) -> tuple[str, ...]:
        """Returns the parameters that the layer has in this decoder: "weight" and perhaps "bias", or none."""
        if self.option is not None and not is_on(config, self.option):
            return ()
        return ("weight", "bias") if self.bias is not None and is_on(config, self.bias) else ("weight",)


EMBEDDING = WeightLayer("model.embed_tokens", "token_embd", "embedding", shard_axis=0)
# The order is that of the tensors in this project's GGUF files.
BLOCK_LAYERS = (
    WeightLayer("input_layernorm", "attn_norm", "gain"),
    WeightLayer("self_attn.q_proj", "attn_q", "matrix", shard_axis=0, heads="query", bias="qkv_bias"),
    WeightLayer("self_attn.k_proj", "attn_k", "matrix", shard_axis=0, heads="key", bias="qkv_bias"),
    WeightLayer("self_attn.v_proj", "attn_v", "matrix", shard_axis=0, bias="qkv_bias"),
    WeightLayer("self_attn.q_norm", "attn_q_norm", "gain", sees_some_heads=True, option="qk_norm"),
    WeightLayer("self_attn.k_norm", "attn_k_norm", "gain", sees_some_heads=True, option="qk_norm"),
    WeightLayer("self_attn.o_proj", "attn_output", "matrix", shard_axis=1),
    WeightLayer("post_attention_layernorm", "ffn_norm", "gain"),
    WeightLayer("mlp.gate_proj", "ffn_gate", "matrix", shard_axis=0),
    WeightLayer("mlp.up_proj", "ffn_up", "matrix", shard_axis=0),
    WeightLayer("mlp.down_proj", "ffn_down", "matrix", shard_axis=1),
)
LAST_NORM = WeightLayer("model.norm", "output_norm", "gain")
HEAD = WeightLayer("lm_head", "output", "head", shard_axis=0)
ADAPTABLE = tuple(layer.name.rpartition(".")[2] for layer in BLOCK_LAYERS if layer.adaptable)
"""Short names of the layers that LoRA may adapt."""


@dataclass(frozen=True)
class NamedTensor:
    """One tensor of a decoder: its name (as in Hugging Face's files), its name in GGUF files, and its layer."""

    name: str
    gguf: str
    layer: WeightLayer


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


def _named(layer: WeightLayer, config: DecoderConfig, ours: str, theirs: str) -> Iterator[NamedTensor]:
    for part in layer.parts(config):
        yield NamedTensor(f"{ours}{layer.name}.{part}", f"{theirs}{layer.gguf}.{part}", layer)


# --- families -------------------------------------------------------------------------------------------------------

OPTIONS = ("sliding_window", "qkv_bias", "qk_norm", "rope_scaling", "nope_interval")
"""Fields of `DecoderShape` in which the families differ. All are off in Danube3."""


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
GGUF_NOPE_INTERVAL = 4
"""llama.cpp's `smollm3` has no rotary positions in every fourth layer. The GGUF file does not store this number."""


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
