"""The shape of a decoder, checked once, and the numbers computed from it: parameters, FLOPs, cache bytes.

Fields have the names of Hugging Face's LlamaConfig, so reading and writing a `config.json` needs no table of renamings.
The differences between families are in architecture.py. The sizes of the presets are from the H2O-Danube3 technical
report, arXiv 2407.09276, table 1.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

from .architecture import (
    BLOCK_LAYERS,
    DEFAULTS,
    EMBEDDING,
    HEAD,
    LAST_NORM,
    OPTIONS,
    Family,
    family_called,
    family_of,
    is_on,
    parameters_of,
)

MOST = 2**30
"""No model has a larger number. The limit keeps a damaged number from causing endless work."""
REAL_FIELDS = frozenset({"rope_theta", "rms_norm_eps", "initializer_range", "attention_dropout"})
MOST_OF_A_KIND = {"num_hidden_layers": 10_000, "num_attention_heads": 10_000, "num_key_value_heads": 10_000}
"""Far more than any model has. Layers are made one by one, so a damaged number would take very long."""
POSITIVE_FIELDS = frozenset(
    {
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "initializer_range",
    }
)


ActivationCheckpointing = bool | Literal["selective"]
"""What training computes again in the backward pass instead of keeping it: nothing, whole blocks, or blocks without the
attention kernel."""

CHUNK_TOKENS = 1024
"""Tokens whose logits the loss computes at a time.

One core, 4096 tokens, D = 256, V = 32000, forward and backward: 2.03 s in float32 and 0.73 s under bfloat16 autocast.
Chunks of 256 and 512 tokens are within 6 % of this time, and 4096 tokens take 9 % and 34 % longer. F.cross_entropy
takes 3.02 and 2.56 s. 1024 is the largest of the equally fast sizes: each chunk adds V x D values to the weight's
gradient, which costs more time as D grows."""

GPU_CHUNK_BYTES = 2**29
"""Bytes of the logits of one chunk on a GPU. Each chunk adds V x D values to the head's gradient in float32, and small
products do not fill a GPU, so chunks are as large as half a GiB allows."""


def gpu_chunk_tokens(vocabulary: int, value_bytes: int) -> int:
    """Returns the tokens whose logits the loss computes at a time on a GPU: 8,192 for 32,000 words in 16 bits.

    Args:
        vocabulary: rows of the head on one device.
        value_bytes: bytes of a logit.
    """
    return max(1, GPU_CHUNK_BYTES // (vocabulary * value_bytes * CHUNK_TOKENS)) * CHUNK_TOKENS


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slower rotary positions for long texts, as in Llama 3.1 (`rope_type` "llama3").

    A pair of channels whose wavelength is above `original_max_position_embeddings / low_freq_factor` tokens turns
    `factor` times slower. Below `original_max_position_embeddings / high_freq_factor` tokens nothing changes, and in
    between the factor rises smoothly.

    Args:
        factor: how many times longer the context became.
        low_freq_factor: fully slowed pairs turn at most this many times in the original context.
        high_freq_factor: unchanged pairs turn at least this many times in the original context.
        original_max_position_embeddings: context length in tokens before the extension.

    Raises:
        ValueError: a number is not above 0, or `low_freq_factor` is not below `high_freq_factor`.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"rope_scaling.{name} is {value!r}; it has to be a number above 0")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor}; it has to be below high_freq_factor, "
                f"{self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """The sizes and options of a decoder that the user chooses. The data determine vocabulary and context length.

    The default of `head_dim` is `hidden_size // num_attention_heads`. `dataclasses.replace` keeps the computed number:
    also set `head_dim` to None when the hidden size or the number of heads changes.

    The last five fields are off in Llama 2 and Danube3. Only combinations that transformers can load are allowed.

    Args:
        sliding_window: tokens that a token sees, including itself; None: all earlier tokens. Has no effect on texts
            that are not longer (Mistral, H2O-Danube-1.8B).
        qkv_bias: query, key and value matrices have biases (Qwen2).
        qk_norm: an RMSNorm over the channels of each query and key head, before the rotary positions (Qwen3).
        rope_scaling: slower rotary positions (Llama 3.1, 3.2, 3.3); None: not slowed.
        nope_interval: every n-th layer has no rotary positions (SmolLM3, n = 4); None: all layers have them.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    nope_interval: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):  # from a checkpoint, which holds plain data only
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        self._check_types()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        head_dim_is_given = self.head_dim is not None
        if not head_dim_is_given and heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        for field in (field.name for field in dataclasses.fields(self) if field.name in POSITIVE_FIELDS):
            value = getattr(self, field)
            if value is None or not value > 0:
                raise ValueError(f"{field} is {value}; it has to be above 0")
            if value > (most := MOST_OF_A_KIND.get(field, MOST)):
                raise ValueError(f"{field} is {value}; it may be at most {most:,}")
        if heads % kv_heads:
            working = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}; these do: {working}"
            )
        # The head dimension may be any even number, yet LlamaConfig refuses such a hidden size in every case. Accepting
        # it would train a model that cannot be exported.
        if self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}; "
                f"{max(1, round(self.hidden_size / (2 * heads))) * 2 * heads} would be"
            )
        if self._head_dim % 2 and not head_dim_is_given:
            below = self.hidden_size // (2 * heads) * 2 * heads
            working = " or ".join(str(size) for size in (below, below + 2 * heads) if size)
            raise ValueError(
                f"hidden_size {self.hidden_size} and num_attention_heads {heads} make a head_dim of {self.head_dim}, "
                f"which is odd; rotary embeddings turn pairs of channels, so use a hidden_size of {working}, or "
                "give an even head_dim"
            )
        if self._head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs of channels, so use "
                f"{self._head_dim - 1 or 2} or {self._head_dim + 1}"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout is {self.attention_dropout}; it has to be at least 0 and below 1")
        for field, least in (("sliding_window", 1), ("nope_interval", 2)):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{field} is {value!r}; give a whole number from {least} on, or none")
        family_of(self)

    def _check_types(self) -> None:
        """Checks the types of the numbers, which come from files of other programs.

        Raises:
            ValueError: a value is not a number, or no model is that large.
        """
        for field in (field for field in dataclasses.fields(self) if field.name in POSITIVE_FIELDS | REAL_FIELDS):
            value, whole = getattr(self, field.name), field.name not in REAL_FIELDS
            if value is None:
                continue
            kinds = int if whole else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not -math.inf < value <= MOST:
                raise ValueError(
                    f"{field.name} is {str(value)[:40]}; it has to be a {'whole ' if whole else ''}number of at most "
                    f"{MOST:,}"
                )

    @property
    def _head_dim(self) -> int:
        assert self.head_dim is not None  # resolved in __post_init__
        return self.head_dim

    def with_data(self, vocab_size: int, context_length: int) -> "DecoderConfig":
        """Returns the complete config for a vocabulary size and a context length."""
        shape = {field.name: getattr(self, field.name) for field in dataclasses.fields(DecoderShape)}
        return DecoderConfig(**shape, vocab_size=vocab_size, max_position_embeddings=context_length)

    def has_rotary(self, layer: int) -> bool:
        """Returns whether a layer, counted from 0, has rotary positions."""
        return self.nope_interval is None or (layer + 1) % self.nope_interval != 0


@dataclasses.dataclass(frozen=True)
class DecoderConfig(DecoderShape):
    """A Llama-shaped decoder: SwiGLU, RMSNorm before each half of a block, rotary positions."""

    vocab_size: int = 32000
    max_position_embeddings: int = 8192

    @classmethod
    def preset(cls, name: str) -> "DecoderConfig":
        """Returns a published config by its name in PRESETS.

        Raises:
            ValueError: no preset has this name.
        """
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}"
            raise ValueError(f"no preset is called {name!r}; {hint}")
        return PRESETS[name]

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding. An untied head has the same number."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        others = (EMBEDDING, LAST_NORM) if self.tie_word_embeddings else (EMBEDDING, LAST_NORM, HEAD)
        return self.num_hidden_layers * parameters_of(BLOCK_LAYERS, self) + parameters_of(others, self)

    @property
    def parameters_without_embedding(self) -> int:
        """Parameters without the input embedding, which needs memory but no multiplication."""
        return self.parameters - self.embedding_parameters

    def flops_per_token(self, context: int, causal: bool = False) -> int:
        """Returns training FLOPs per token, forward and backward, with samples of `context` tokens.

        Counts 6 for each parameter in a matrix product (a tied embedding counts as the head) and 12 for each layer,
        attention channel and position, as in PaLM's appendix B (arXiv 2204.02311). PaLM counts the full square of
        scores; `causal=True` counts the half that a causal kernel computes. A sliding window changes neither count.
        """
        multiplying = self.parameters_without_embedding
        if self.tie_word_embeddings:
            multiplying += self.embedding_parameters
        attention = 12 * self.num_hidden_layers * self.num_attention_heads * self._head_dim * context
        return 6 * multiplying + (attention // 2 if causal else attention)

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Returns the bytes of keys and values of `tokens` tokens in the cache; bf16 and fp16 take 2 bytes a value."""
        values = 2 * self.num_hidden_layers * self.num_key_value_heads * self._head_dim
        return values * tokens * bytes_per_value

    def forward_bytes(self, tokens: int, head_rows: int, bytes_per_value: int = 2) -> int:
        """Returns an estimate of the memory that a forward pass of `tokens` tokens takes beside weights and cache.

        Args:
            head_rows: tokens whose logits are in memory at once, in the type of the products and twice in float32.
        """
        heads = (self.num_attention_heads + 2 * self.num_key_value_heads) * self._head_dim
        # One block: residual stream and normed copy, heads before and after rotation, gate, up and their product.
        values = 3 * self.hidden_size + max(2 * heads, 3 * self.intermediate_size)
        return tokens * values * bytes_per_value + head_rows * self.vocab_size * (bytes_per_value + 2 * 4)

    def facts(self) -> dict[str, Any]:
        """Returns the fields as plain data for checkpoints: `DecoderConfig(**facts)` restores the config.

        Options that are off are left out, so the checkpoint of a Danube3 stays the same when options are added.
        """
        return {
            name: value for name, value in dataclasses.asdict(self).items() if name not in OPTIONS or is_on(self, name)
        }

    def to_hf(self, bos_id: int | None = 1, eos_id: int | None = 2, pad_id: int | None = 0) -> dict[str, Any]:
        """Returns the content of a `config.json` for the family that has the decoder's options.

        The ids belong to the tokenizer; the defaults are those of Danube3. The rotary base is written twice:
        transformers 5 reads `rope_parameters`; transformers 4 and llama.cpp's converter read `rope_theta`. Each ignores
        the other field.
        """
        family = family_of(self)
        scaling = (
            None if self.rope_scaling is None else {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        )
        return {
            "architectures": [family.class_name("CausalLM")],
            "model_type": family.model_type,
            **{name: value for name, value in dataclasses.asdict(self).items() if name not in OPTIONS},
            "hidden_act": "silu",
            **family.fixed,
            **({"sliding_window": self.sliding_window} if "sliding_window" in family.allows else {}),
            **(self._nope_in_hf() if self.nope_interval is not None else {}),
            "use_cache": True,
            "rope_scaling": scaling,
            "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": self.rope_theta},
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "pad_token_id": pad_id,
        }

    def _nope_in_hf(self) -> dict[str, Any]:
        # In the list, 1 means a layer *with* rotary positions, despite the name.
        rotary = [int(self.has_rotary(layer)) for layer in range(self.num_hidden_layers)]
        return {"no_rope_layer_interval": self.nope_interval, "no_rope_layers": rotary}

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "DecoderConfig":
        """Returns the config from a `config.json` of transformers 4 or 5.

        Missing fields get the default of the family. Fields that this decoder cannot compute raise an error: a model
        that ignored such a field would load and give wrong answers.

        Raises:
            ValueError: the family is unknown, a required field is missing, or a field cannot be computed.
        """
        family = family_called(hf.get("model_type"))
        refuse_what_is_not_computed(hf, family)
        required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [field for field in required if hf.get(field) is None]
        if missing:
            raise ValueError(f"no {', '.join(missing)} in the config of a {family.model_type} model")
        known = {**DEFAULTS, **family.defaults, **hf}
        rope = rope_of(hf)
        return cls(
            **{field: hf[field] for field in required},
            num_key_value_heads=known.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=known.get("head_dim"),
            vocab_size=known["vocab_size"],
            max_position_embeddings=known["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or known["rope_theta"] or DEFAULTS["rope_theta"]),
            rms_norm_eps=known["rms_norm_eps"],
            tie_word_embeddings=known["tie_word_embeddings"],
            initializer_range=known["initializer_range"],
            attention_dropout=known["attention_dropout"] or 0.0,
            sliding_window=known.get("sliding_window") if "sliding_window" in family.allows else None,
            qkv_bias="qkv_bias" in family.needs,
            qk_norm="qk_norm" in family.needs,
            rope_scaling=scaling_of(rope) if "rope_scaling" in family.allows else None,
            nope_interval=nope_interval_of(known) if "nope_interval" in family.allows else None,
        )


def refuse_what_is_not_computed(hf: Mapping[str, Any], family: Family) -> None:
    """Refuses fields of a `config.json` that would change what is computed.

    Raises:
        ValueError: a field has an unsupported value; the message names the supported values.
    """
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {hf['hidden_act']!r}; only 'silu' is supported")
    for name, fixed in family.fixed.items():
        if (value := hf.get(name)) not in (None, fixed):
            raise ValueError(f"{name} is {value!r}; of a {family.model_type} model only {fixed!r} is supported")
    if hf.get("quantization_config"):
        raise ValueError("quantization_config is set; load the unquantized weights and quantize them here")
    kinds = ("default", "llama3") if "rope_scaling" in family.allows else ("default",)
    for name in ("rope_scaling", "rope_parameters"):
        parameters = hf.get(name) or {}
        if not isinstance(parameters, Mapping):
            raise ValueError(f"{name} is {str(parameters)[:40]!r}, not a mapping of names to numbers")
        kind = rope_type(parameters)
        if kind not in kinds:
            possible = " and ".join(map(repr, kinds))
            raise ValueError(
                f"{name} asks for rope type {kind!r}; of a {family.model_type} model only {possible} can be computed"
            )
    rotated = rope_of(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor is {rotated}; this decoder rotates every channel")
    every = "sliding_attention" if "sliding_window" in family.allows and hf.get("sliding_window") else "full_attention"
    if others := sorted({str(kind) for kind in hf.get("layer_types") or ()} - {every}):
        raise ValueError(f"layer_types names {', '.join(others)}; here all layers attend alike, {every!r}")


def rope_type(parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rope_type", parameters.get("type", "default"))


def rope_of(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary parameters of a `config.json` from the fields of transformers 4 and 5."""
    return {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}


def scaling_of(rope: Mapping[str, Any]) -> RopeScaling | None:
    """Returns the scaling of rotary positions; None if the type is not "llama3".

    Raises:
        ValueError: a number is missing or impossible.
    """
    if rope_type(rope) != "llama3":
        return None
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if missing := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"no {', '.join(missing)} in the rope parameters of type 'llama3'")
    return RopeScaling(**{name: rope[name] for name in names})


def nope_interval_of(hf: Mapping[str, Any]) -> int | None:
    """Returns n if every n-th layer of a `config.json` has no rotary positions; None if all layers have them.

    Raises:
        ValueError: the layers without rotary positions are not every n-th layer.
    """
    interval, layers = hf["no_rope_layer_interval"], range(1, hf["num_hidden_layers"] + 1)
    rotary = hf.get("no_rope_layers")
    if rotary is None:
        return None if interval is None else int(interval)
    if all(rotary):
        # The interval may be larger than the number of layers: then no layer is the n-th.
        return interval if isinstance(interval, int) and interval > len(rotary) else None
    interval = rotary.index(0) + 1
    if list(map(bool, rotary)) != [layer % interval != 0 for layer in layers]:
        raise ValueError(f"no_rope_layers is {rotary}; only every n-th layer can be without rotary positions")
    return interval


PRESETS: dict[str, DecoderConfig] = {
    "danube3-500m": DecoderConfig(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=96,
    ),
    "danube3-4b": DecoderConfig(
        hidden_size=3840,
        intermediate_size=10240,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=120,
        initializer_range=0.01,
    ),
}
