"""The whole model, read from top to bottom.

Parameters have the names of Hugging Face's LlamaForCausalLM and of related models (architecture.py). Weights, adapters
and converters made for those models therefore fit without renaming.

Shapes: B batch, T tokens, D hidden size, V vocabulary; attention.py defines the shapes inside the heads.
"""

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..device import type_under_autocast
from .attention import GroupedQueryAttention, Past, RotaryEmbedding, kernels_for
from .config import ActivationCheckpointing, DecoderConfig
from .elementwise import Gate, RootMeanSquareNorm, gains
from .masks import Mask, Runs, form_of, mask_of

if TYPE_CHECKING:
    from .cache import KVCache


class RMSNorm(nn.Module):
    """Division by the root mean square, then a learned gain.

    `F.rms_norm` computes 16-bit inputs in float32 and rounds once at the end. Hugging Face's formula also rounds before
    the gain, and has a larger error (at most 0.051 against 0.031 on standard normal bfloat16 rows). Forward and
    backward of 8192 x 512 values take 14.1 ms on one core, Hugging Face's formula 16.1 ms. On CUDA it is one kernel.
    float64 stays float64. Under autocast on a GPU the result has autocast's type: otherwise autocast would cast it for
    each matrix that multiplies it, and keep every copy for the backward pass.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.normed(hidden_BTD).to(type_of_products(hidden_BTD))

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the normed states in their own type."""
        weight = self.weight
        if weight.dtype == hidden_BTD.dtype:
            if gains(hidden_BTD) and weight.dtype in (torch.float32, torch.float64) and type(weight) is nn.Parameter:
                normed: Tensor = RootMeanSquareNorm.apply(hidden_BTD, weight, self.eps)
                return normed
            return F.rms_norm(hidden_BTD, weight.shape, weight, self.eps)
        # 16-bit activations with float32 gains (for example of a quantized base) would leave the fused path and warn.
        dtype = torch.promote_types(hidden_BTD.dtype, weight.dtype)
        return F.rms_norm(hidden_BTD.to(dtype), weight.shape, weight.to(dtype), self.eps).to(hidden_BTD.dtype)


def type_of_products(hidden_BTD: Tensor) -> torch.dtype:
    """Returns the type in which a GPU multiplies these states. On a CPU it is their own type: autocast casts there."""
    device, dtype = hidden_BTD.device.type, hidden_BTD.dtype
    if device == "cuda" and dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


class SwiGLU(nn.Module):
    """Feed-forward of three matrices: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden_BTD), self.up_proj(hidden_BTD)
        gated = Gate.apply(gate, up) if gains(gate) else F.silu(gate) * up
        return self.down_proj(gated)


def keep_attention(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """Tells activation checkpointing to keep the results of attention kernels, and to compute all else again."""
    name = str(operation)
    is_kernel = "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if is_kernel else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Attention, then feed-forward, each on a normed copy of the residual stream."""

    def __init__(self, hidden_size: int, norm_eps: float, self_attn: GroupedQueryAttention, mlp: SwiGLU) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = RMSNorm(hidden_size, norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None = None,
        past: Past | None = None,
        selective: bool = False,
    ) -> Tensor:
        """Returns the next block's input. `selective`: keeps only its own input and the attention kernel's result."""
        if selective:
            # In here, so that compiled code sees the kernel as a separate operation.
            contexts = functools.partial(create_selective_checkpoint_contexts, keep_attention)
            result: Tensor = checkpoint(
                self.computed, hidden_BTD, cos, sin, mask, use_reentrant=False, context_fn=contexts
            )
            return result
        return self.computed(hidden_BTD, cos, sin, mask, past)

    def computed(
        self, hidden_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None = None, past: Past | None = None
    ) -> Tensor:
        hidden_BTD = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD), cos, sin, mask, past)
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class Backbone(nn.Module):
    """The decoder without its head. It is a separate module so that parameter names begin with `model.`.

    Args:
        window: tokens that a token sees, including itself; None: all earlier tokens.
        attention_dropout: the dropout of the layers' attention.
    """

    def __init__(
        self,
        embed_tokens: nn.Embedding,
        layers: list[Block],
        norm: RMSNorm,
        rotary_emb: RotaryEmbedding,
        window: int | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.window, self.attention_dropout = window, attention_dropout
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary_emb = rotary_emb

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        cache: "KVCache | None",
        recompute: ActivationCheckpointing,
        document_runs: Runs | None = None,
    ) -> Tensor:
        T = input_ids_BT.shape[1]
        hidden_BTD = self.embed_tokens(input_ids_BT)
        mask: Mask | None = None
        if cache is not None:
            assert document_ids_BT is None, "packed documents are for training; a cache holds one text a row"
            cache.reserve(T)
            is_empty = cache.lengths_B is None and not cache.length
            mask = self.mask(None, hidden_BTD) if is_empty else cache.mask(T)
            if position_ids_BT is None:
                position_ids_BT = cache.positions(T)
        else:
            mask = self.mask(document_ids_BT, hidden_BTD, document_runs)
            if position_ids_BT is None:
                position_ids_BT = torch.arange(T, device=input_ids_BT.device)[None]

        cos, sin = self.rotary_emb(position_ids_BT, hidden_BTD.dtype)
        kernels = kernels_for(hidden_BTD.device, T, cached=cache is not None)
        with kernels():
            for index, block in enumerate(self.layers):
                if cache is not None:
                    hidden_BTD = block(hidden_BTD, cos, sin, mask, cache.layer(index))
                elif recompute == "selective":
                    hidden_BTD = block(hidden_BTD, cos, sin, mask, selective=True)
                elif recompute and kernels is nullcontext:
                    hidden_BTD = checkpoint(block, hidden_BTD, cos, sin, mask, use_reentrant=False)
                elif recompute:
                    # The computation in the backward pass picks among the kernels of the first one.
                    contexts = lambda: (nullcontext(), kernels())  # noqa: E731
                    hidden_BTD = checkpoint(block, hidden_BTD, cos, sin, mask, use_reentrant=False, context_fn=contexts)
                else:
                    hidden_BTD = block(hidden_BTD, cos, sin, mask)
        if cache is not None:
            cache.advance(T)
        return self.norm(hidden_BTD)

    def mask(self, document_ids_BT: Tensor | None, hidden_BTD: Tensor, runs: Runs | None = None) -> Mask | None:
        """Returns the mask of attention without a cache; None if plain causal attention is right. See `form_of`."""
        device = hidden_BTD.device
        dtype = type_under_autocast(hidden_BTD.dtype, device.type)
        B, T, _ = hidden_BTD.shape
        window = None if self.window is None or self.window >= T else self.window
        if document_ids_BT is None and window is None:
            return None
        known = document_ids_BT is None or runs is not None
        dropout = self.attention_dropout if self.training else 0.0
        form = form_of(device, dtype, self.rotary_emb.head_dim, dropout, runs=known)
        return mask_of(form, document_ids_BT, runs, (B, T), window, dtype, device)


def new_embedding(rows: int, size: int) -> nn.Embedding:
    """Returns an nn.Embedding. Skips its initialization on the meta device, which would import PyTorch's compiler (1.4
    CPU seconds)."""
    if torch.get_default_device().type == "meta":
        return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)
    return nn.Embedding(rows, size)


class Decoder(nn.Module):
    """A language model built from its config, with initialized weights.

    On the meta device they stay empty: call `to_empty` and `init_weights`, or `load_state_dict(..., assign=True)`.

    `activation_checkpointing`: training keeps only each block's input, and computes the block again in the backward
    pass. This costs about a third more compute, and no activations inside a block stay in memory. "selective" also
    keeps the results of PyTorch's attention kernels and does not compute them again.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: ActivationCheckpointing = False
        self.has_compiled_blocks = False
        c, head_dim = config, config.head_dim
        assert head_dim is not None  # resolved by the config
        self.model = Backbone(
            embed_tokens=new_embedding(c.vocab_size, c.hidden_size),
            layers=[
                Block(
                    c.hidden_size,
                    c.rms_norm_eps,
                    GroupedQueryAttention(
                        c.hidden_size,
                        c.num_attention_heads,
                        c.num_key_value_heads,
                        head_dim,
                        c.attention_dropout,
                        bias=c.qkv_bias,
                        q_norm=RMSNorm(head_dim, c.rms_norm_eps) if c.qk_norm else None,
                        k_norm=RMSNorm(head_dim, c.rms_norm_eps) if c.qk_norm else None,
                        rotary=c.has_rotary(layer),
                    ),
                    SwiGLU(c.hidden_size, c.intermediate_size),
                )
                for layer in range(c.num_hidden_layers)
            ],
            norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
            rotary_emb=RotaryEmbedding(head_dim, c.rope_theta, c.rope_scaling),
            window=c.sliding_window,
            attention_dropout=c.attention_dropout,
        )
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.tie_weights()
        self.register_load_state_dict_post_hook(tie_after_loading)
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @property
    def activation_dtype(self) -> torch.dtype:
        """The type of the hidden states, outside of autocast."""
        embedding = self.model.embed_tokens
        dtype: torch.dtype = getattr(embedding, "activation_dtype", embedding.weight.dtype)
        return dtype

    def tie_weights(self) -> None:
        """Ties the head to the embedding again, if the config says so.

        Leaving the meta device and loading by assignment replace parameters one by one, which silently unties them.
        """
        # Rows that train beside an adapter (weights/new_tokens.py) are shared already.
        if self.config.tie_word_embeddings and not hasattr(self.lm_head, "parametrizations"):
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def compile_blocks(self) -> None:
        """Makes PyTorch compile the blocks at their first use, with the same code for all blocks and unchanged names.

        Call it before `parallelize`, so that gathering weights stays outside the compiled code. With a cache the blocks
        run uncompiled, because each length of the cache would need a compilation.
        """
        for block in self.model.layers:
            block.compile()
        self.has_compiled_blocks = True

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws matrices from normal(0, initializer_range), sets gains to 1 and biases to 0. Nothing scales with depth,
        as in Llama and Danube."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: "KVCache | None" = None,
        document_runs: Runs | None = None,
    ) -> Tensor:
        """Returns the states after the last norm, (B, T, D): the input of the head and of the chunked loss.

        Default positions start after the tokens of the cache. `document_ids_BT` separates packed texts: each id is one
        text of its row. `document_runs` are the same texts as `runs_of` the ids returns them, which flash attention
        needs. Where it cannot be used (`form_of`), texts may need a mask of B x T x T bools, and a window shorter than
        the text a mask of T x T bools. Adds keys and values of these tokens to a given cache.
        """
        recompute = self.activation_checkpointing if self.training and torch.is_grad_enabled() else False
        as_written = self.has_compiled_blocks and cache is not None
        with torch.compiler.set_stance("force_eager") if as_written else nullcontext():
            return self.model(input_ids_BT, position_ids_BT, document_ids_BT, cache, recompute, document_runs)

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        """Returns the logits of the next token at every position, (B, T, V)."""
        return self.lm_head(self.hidden_states(input_ids_BT, position_ids_BT, document_ids_BT, cache))


def tie_after_loading(decoder: nn.Module, incompatible_keys: Any) -> None:
    # Not a bound method: deep-copying a decoder copies hooks by reference, so the hook would keep the old decoder.
    assert isinstance(decoder, Decoder)
    decoder.tie_weights()
