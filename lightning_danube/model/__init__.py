"""The Danube decoder in plain PyTorch: shape, network, loss, key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_danube import lazy_attributes

if TYPE_CHECKING:
    from .attention import GroupedQueryAttention, RotaryEmbedding
    from .cache import KVCache
    from .config import PRESETS, DecoderConfig, DecoderShape, RopeScaling
    from .decoder import Backbone, Block, Decoder, RMSNorm, SwiGLU
    from .loss import next_token_loss, token_losses
    from .masks import document_mask

__all__ = [
    "PRESETS",
    "Backbone",
    "Block",
    "Decoder",
    "DecoderConfig",
    "DecoderShape",
    "GroupedQueryAttention",
    "KVCache",
    "RMSNorm",
    "RopeScaling",
    "RotaryEmbedding",
    "SwiGLU",
    "document_mask",
    "next_token_loss",
    "token_losses",
]

_MODULES = {
    "attention": ("GroupedQueryAttention", "RotaryEmbedding"),
    "cache": ("KVCache",),
    "config": ("PRESETS", "DecoderConfig", "DecoderShape", "RopeScaling"),
    "decoder": ("Backbone", "Block", "Decoder", "RMSNorm", "SwiGLU"),
    "loss": ("next_token_loss", "token_losses"),
    "masks": ("document_mask",),
}

# A decoder's shape and its arithmetic need no PyTorch.
__getattr__ = lazy_attributes(__name__, {name: module for module, names in _MODULES.items() for name in names})
