"""The shape of a decoder, checked once, and what follows from it on paper: parameters, FLOPs, cache bytes.

Field names are those of Hugging Face's LlamaConfig, so that a `config.json` is read and written without a table of
renamings. Sizes of the presets: H2O-Danube3 technical report, arXiv 2407.09276, table 1.
"""

import dataclasses
import difflib
from typing import Any

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


CHUNK_TOKENS = 1024
"""Tokens whose logits the loss computes at a time.

One core, 4096 tokens, D = 256, V = 32000, forward and backward: 2.03 s in float32 and 0.73 s under bfloat16 autocast.
256 and 512 tokens are within 6 % of it, 4096 take 9 % and 34 % longer, F.cross_entropy takes 3.02 and 2.56 s. 1024 is
the largest of the equally fast ones: the larger D is, the more time goes into adding up the weight's gradient (V x D
for each chunk)."""


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """What a person chooses of a decoder; vocabulary and context length come with the data.

    `head_dim` left out is `hidden_size // num_attention_heads`; `dataclasses.replace` keeps the resolved number, so
    replace `head_dim` too (by None) when the hidden size or the number of heads changes.
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

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        for field in (field.name for field in dataclasses.fields(self) if field.name in POSITIVE_FIELDS):
            value = getattr(self, field)
            if value is None or value <= 0:
                raise ValueError(f"{field} is {value}; it has to be above 0")
        if heads % kv_heads:
            working = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}; these do: {working}"
            )
        # The head dimension may be any even number, yet LlamaConfig refuses such a hidden size all the same: taking it
        # would train a model that cannot be exported.
        if self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}; "
                f"the nearest multiple is {max(1, round(self.hidden_size / heads)) * heads}"
            )
        if self._head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs of channels, so use "
                f"{self._head_dim - 1 or 2} or {self._head_dim + 1}"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout is {self.attention_dropout}; it has to be at least 0 and below 1")

    @property
    def _head_dim(self) -> int:
        assert self.head_dim is not None  # resolved in __post_init__
        return self.head_dim

    def with_data(self, vocab_size: int, context_length: int) -> "DecoderConfig":
        """The whole config for a tokenizer and a context length."""
        shape = {field.name: getattr(self, field.name) for field in dataclasses.fields(DecoderShape)}
        return DecoderConfig(**shape, vocab_size=vocab_size, max_position_embeddings=context_length)


@dataclasses.dataclass(frozen=True)
class DecoderConfig(DecoderShape):
    """A Llama-shaped decoder: SwiGLU, RMSNorm before each half of a block, rotary positions, no bias anywhere."""

    vocab_size: int = 32000
    max_position_embeddings: int = 8192

    @classmethod
    def preset(cls, name: str) -> "DecoderConfig":
        """A published shape by its name, one of PRESETS."""
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}"
            raise ValueError(f"no preset is called {name!r}; {hint}")
        return PRESETS[name]

    @property
    def embedding_parameters(self) -> int:
        """Parameters of one token embedding; an untied head has as many again."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        query_and_output = 2 * self.hidden_size * self.num_attention_heads * self._head_dim
        key_and_value = 2 * self.hidden_size * self.num_key_value_heads * self._head_dim
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        blocks = self.num_hidden_layers * (query_and_output + key_and_value + feed_forward + norms)
        embeddings = self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
        return embeddings + blocks + self.hidden_size

    @property
    def parameters_without_embedding(self) -> int:
        """Parameters less the input embedding, which costs memory but no multiplication."""
        return self.parameters - self.embedding_parameters

    def flops_per_token(self, context: int, causal: bool = False) -> int:
        """Training FLOPs a token, forward and backward, at `context` tokens a sample.

        6 for each parameter that multiplies (so a tied embedding counts, as the head) and 12 for each layer, attention
        channel and position, as in PaLM's appendix B (arXiv 2204.02311). That convention counts the whole square of
        scores; `causal=True` counts the half that a causal kernel computes.
        """
        multiplying = self.parameters_without_embedding
        if self.tie_word_embeddings:
            multiplying += self.embedding_parameters
        attention = 12 * self.num_hidden_layers * self.num_attention_heads * self._head_dim * context
        return 6 * multiplying + (attention // 2 if causal else attention)

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that `tokens` tokens leave in the cache; 2 bytes a value is bf16 or fp16."""
        values = 2 * self.num_hidden_layers * self.num_key_value_heads * self._head_dim
        return values * tokens * bytes_per_value

    def to_hf(self, bos_id: int | None = 1, eos_id: int | None = 2, pad_id: int | None = 0) -> dict[str, Any]:
        """The content of a `config.json` for LlamaForCausalLM. The ids belong to the tokenizer; those of Danube3 are
        the defaults.

        The rotary base is there twice: transformers 5 reads `rope_parameters`, version 4 and llama.cpp's converter
        `rope_theta`, and both leave the other one alone.
        """
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **dataclasses.asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "use_cache": True,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "pad_token_id": pad_id,
        }

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "DecoderConfig":
        """The config that a `config.json` of either major version of transformers describes.

        What is absent has LlamaConfig's default. What this decoder cannot compute is refused: a field ignored here
        would be a model that loads and answers wrongly.
        """
        if hf.get("model_type") != "llama":
            raise ValueError(f"model_type is {hf.get('model_type')!r}; only 'llama' can be loaded")
        for field in ("attention_bias", "mlp_bias"):
            if hf.get(field):
                raise ValueError(f"{field} is {hf[field]!r}; this decoder has no biases")
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act is {hf['hidden_act']!r}; only 'silu' is supported")
        if (hf.get("pretraining_tp") or 1) != 1:
            raise ValueError(
                f"pretraining_tp is {hf['pretraining_tp']}; sliced linears are not supported: save the model with 1"
            )
        if hf.get("quantization_config"):
            raise ValueError("quantization_config is set; load the unquantized weights and quantize them here")
        rope: dict[str, Any] = {}
        for field in ("rope_scaling", "rope_parameters"):
            rope |= hf.get(field) or {}
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                raise ValueError(f"{field} asks for rope type {kind!r}; only 'default' is supported")
        rotated = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
        if rotated not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor is {rotated}; this decoder rotates every channel")
        required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [field for field in required if hf.get(field) is None]
        if missing:
            raise ValueError(f"no {', '.join(missing)} in the config of a llama model")
        return cls(
            **{field: hf[field] for field in required},
            num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim"),
            vocab_size=hf.get("vocab_size", 32000),
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            initializer_range=hf.get("initializer_range", 0.02),
            attention_dropout=hf.get("attention_dropout") or 0.0,
        )


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
