"""The Danube decoder in plain PyTorch: shape, network, loss, key-value cache."""

from .attention import GroupedQueryAttention, RotaryEmbedding, document_mask
from .cache import KVCache
from .config import PRESETS, DecoderConfig, DecoderShape, RopeScaling
from .decoder import Backbone, Block, Decoder, RMSNorm, SwiGLU
from .loss import next_token_loss, token_losses

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
