"""The Danube decoder in plain PyTorch: shape, network, loss, generation, checkpoints."""

from .attention import GroupedQueryAttention, RotaryEmbedding, document_mask
from .checkpoints import load_checkpoint, load_hf, save_hf
from .compiled_steps import CompiledStep
from .config import PRESETS, DecoderConfig, DecoderShape
from .decoder import Backbone, Block, Decoder, RMSNorm, SwiGLU
from .generation import GREEDY, KVCache, Sampling, TokenStream, evaluation_mode, generate, sample
from .loss import next_token_loss, token_losses

__all__ = [
    "GREEDY",
    "PRESETS",
    "Backbone",
    "Block",
    "CompiledStep",
    "Decoder",
    "DecoderConfig",
    "DecoderShape",
    "GroupedQueryAttention",
    "KVCache",
    "RMSNorm",
    "RotaryEmbedding",
    "Sampling",
    "SwiGLU",
    "TokenStream",
    "document_mask",
    "evaluation_mode",
    "generate",
    "load_checkpoint",
    "load_hf",
    "next_token_loss",
    "sample",
    "save_hf",
    "token_losses",
]
