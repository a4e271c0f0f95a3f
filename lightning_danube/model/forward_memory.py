"""Estimates the memory of a forward pass on a GPU, for a line that is printed before an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .decoder import Decoder


def forward_memory(decoder: Decoder, places: int, *, head_rows: int, cached: bool) -> str:
    """Returns a line about the largest batch: its tokens, and an estimate of the memory.

    Args:
        places: the most tokens of a batch, padding included.
        head_rows: tokens whose logits are in memory at once.
        cached: whether keys and values of all tokens are kept, as for generation.
    """
    value = decoder.activation_dtype.itemsize
    # A tied head is one of the parameters once.
    parts = {"weights": sum(tensor.nbytes for tensor in (*decoder.parameters(), *decoder.buffers()))}
    if cached:
        parts["keys and values"] = decoder.config.cache_bytes(places, value)
    parts["a pass"] = decoder.config.forward_bytes(places, min(head_rows, places), value)
    told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"at most {places:,} tokens a batch, about {sum(parts.values()) / 1e9:.1f} GB ({told}; an estimate)"
