"""The key-value cache: what attention keeps of the tokens so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_danube.model.attention import Past, causal_mask

if TYPE_CHECKING:
    from lightning_danube.model.decoder import Decoder


class KVCache:
    """Keys and values of the tokens so far, for the key-value heads only: H / G times smaller than with a head each.

    All memory is taken at the start, so a text that fits can be finished, and no shape changes from step to step. Rows
    are filled from slot 0 on, and hold either the same number of tokens, `length`, or numbers of their own, `lengths_B`
    (after `set_lengths`; who extends them sees to it that what is new fits). Those live on the device and select slots
    there: a step then asks the host for nothing, and can be compiled or recorded as a graph.

    Args:
        keys_BGSK: a tensor for each layer. Were they cut out of one tensor within a step, a compiled step would write
            all of it anew in each layer.
        values_BGSK: likewise.
        window: tokens that a token sees, itself included; None: all before it. All tokens stay in the cache: a window
            saves time, not memory.
    """

    def __init__(self, keys_BGSK: Sequence[Tensor], values_BGSK: Sequence[Tensor], window: int | None = None) -> None:
        self.keys_BGSK, self.values_BGSK, self.window = keys_BGSK, values_BGSK, window
        self.length = 0
        self.lengths_B: Tensor | None = None
        self.visible = self.capacity
        """Slots that attention looks at when rows have lengths of their own: at least those of the longest row and of
        the new tokens. Fewer than all save time, all of them keep the shapes fixed."""

    @classmethod
    def for_decoder(cls, decoder: Decoder, batch: int, length: int) -> KVCache:
        """A cache for `length` tokens in the type that the decoder's attention computes in right here."""
        c, device = decoder.config, decoder.model.embed_tokens.weight.device
        assert c.head_dim is not None  # resolved by the config
        dtype = decoder.activation_dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = (batch, c.num_key_value_heads, length, c.head_dim)

        def empty() -> list[Tensor]:
            # Zeros: what is masked is still multiplied by 0, and must not be an inf or nan that was left in the memory.
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(c.num_hidden_layers)]

        return cls(empty(), empty(), c.sliding_window)

    @property
    def capacity(self) -> int:
        return self.keys_BGSK[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(memory_BGSK.nbytes for memory_BGSK in (*self.keys_BGSK, *self.values_BGSK))

    @property
    def device(self) -> torch.device:
        return self.keys_BGSK[0].device

    def layer(self, index: int) -> Past:
        """What one layer's attention adds its keys and values to."""
        # Made for each step: were it kept here, it and the cache would keep each other, and their memory, alive.
        return LayerOfCache(self, self.keys_BGSK[index], self.values_BGSK[index])

    def reserve(self, tokens: int) -> None:
        """Make sure that so many more fit. Rows of different lengths are only extended by whoever knows their lengths.

        Raises:
            ValueError: they do not.
        """
        if self.lengths_B is None and self.length + tokens > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of {self.capacity} tokens; {tokens} more do not fit: make it longer"
            )

    def positions(self, tokens: int) -> Tensor:
        """Of the next tokens, (1 or B, T)."""
        if self.lengths_B is not None:
            return self.lengths_B[:, None] + torch.arange(tokens, device=self.lengths_B.device)
        return torch.arange(self.length, self.length + tokens, device=self.device)[None]

    def mask(self, tokens: int) -> Tensor | None:
        """(1 or B, 1, T, S) for attention of the next tokens, where it is not plainly causal."""
        if self.lengths_B is not None:
            slots_S, positions_BT1 = torch.arange(self.visible, device=self.device), self.positions(tokens)[:, :, None]
            seen_BTS = slots_S <= positions_BT1
            if self.window is not None:
                seen_BTS = seen_BTS & (slots_S > positions_BT1 - self.window)
            return seen_BTS[:, None]
        # A single token is given the keys of its window alone, see `LayerOfCache.extend`.
        window = self.window if self.window is not None and self.window < self.length + tokens else None
        if tokens > 1 and (self.length or window is not None):
            return causal_mask(tokens, self.length, self.device, window)
        return None

    def advance(self, tokens: int) -> None:
        """Count tokens that all layers have taken in. Until then they are not there: a step that was broken off in its
        midst leaves the cache as it was."""
        if self.lengths_B is not None:
            self.lengths_B += tokens
        else:
            self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row."""
        assert self.lengths_B is None and 0 <= length <= self.length, (length, self.length)
        self.length = length

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """From now on each row has a length of its own: what lies behind it is overwritten, and not seen before."""
        assert len(lengths) == self.keys_BGSK[0].shape[0] and max(lengths) <= self.capacity
        self.lengths_B = torch.tensor(lengths, device=self.device)

    def copies(self, rows: Sequence[int], lengths: Sequence[int], room: int) -> KVCache:
        """A cache that has these rows, each as often as it is named, its first so many tokens, and room for more: for
        several continuations of one beginning, which is then read once."""
        capacity = max(lengths) + room
        rows_R, kept = torch.tensor(rows, device=self.device), min(self.capacity, capacity)

        def copied(memory_BGSK: Tensor) -> Tensor:
            _, G, _, K = memory_BGSK.shape
            new_RGSK = memory_BGSK.new_zeros(len(rows), G, capacity, K)
            new_RGSK[:, :, :kept] = memory_BGSK[rows_R, :, :kept]
            return new_RGSK

        cache = KVCache([*map(copied, self.keys_BGSK)], [*map(copied, self.values_BGSK)], self.window)
        cache.set_lengths(lengths)
        return cache

    def row(self, index: int) -> KVCache:
        """An empty cache of one row, in the memory of this one's."""
        keys_BGSK, values_BGSK = (
            [memory_BGSK[index : index + 1] for memory_BGSK in memories_BGSK]
            for memories_BGSK in (self.keys_BGSK, self.values_BGSK)
        )
        return KVCache(keys_BGSK, values_BGSK, self.window)


@dataclass(slots=True)
class LayerOfCache:
    """One layer's part of a cache."""

    cache: KVCache
    keys_BGSK: Tensor
    values_BGSK: Tensor

    def extend(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' into the next slots; those of all slots to look at."""
        keys_BGSK, values_BGSK, lengths_B = self.keys_BGSK, self.values_BGSK, self.cache.lengths_B
        if lengths_B is None:
            start, end = self.cache.length, self.cache.length + k_BGTK.shape[2]
            keys_BGSK[:, :, start:end] = k_BGTK
            values_BGSK[:, :, start:end] = v_BGTK
            first = 0
            if self.cache.window is not None and end - start == 1:
                first = max(0, end - self.cache.window)
            return keys_BGSK[:, :, first:end], values_BGSK[:, :, first:end]
        rows_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
        slots_BT = self.cache.positions(k_BGTK.shape[2])
        keys_BGSK[rows_B1, :, slots_BT] = k_BGTK.transpose(1, 2)
        values_BGSK[rows_B1, :, slots_BT] = v_BGTK.transpose(1, 2)
        return keys_BGSK[:, :, : self.cache.visible], values_BGSK[:, :, : self.cache.visible]
