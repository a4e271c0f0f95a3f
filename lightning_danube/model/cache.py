"""The key-value cache: keys and values of the tokens so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_danube.device import type_under_autocast
from lightning_danube.model.attention import Past
from lightning_danube.model.masks import causal_mask

if TYPE_CHECKING:
    from lightning_danube.model.decoder import Decoder


class KVCache:
    """Keys and values of the tokens so far. Only key-value heads are stored: H / G times less than for all query heads.

    All memory is allocated at the start, so a text that fits can be finished, and no shape changes between steps. Rows
    are filled from slot 0. All rows hold `length` tokens or, after `set_lengths`, each row has its own length in
    `lengths_B`; then the caller checks that new tokens fit. `lengths_B` is on the device and selects slots there. A
    step therefore never waits for the host, and can be compiled or recorded as a graph.

    Args:
        keys_BGSK: one tensor per layer. If layers were slices of one tensor, a compiled step would write the whole
            tensor again in each layer.
        values_BGSK: one tensor per layer, like `keys_BGSK`.
        window: tokens that a token sees, including itself; None: all earlier tokens. All tokens stay in the cache: a
            window saves time, not memory.
    """

    def __init__(self, keys_BGSK: Sequence[Tensor], values_BGSK: Sequence[Tensor], window: int | None = None) -> None:
        self.keys_BGSK, self.values_BGSK, self.window = keys_BGSK, values_BGSK, window
        self.length = 0
        self.lengths_B: Tensor | None = None
        self.visible = self.capacity
        """Slots that attention reads when each row has its own length: at least the longest row plus the new tokens.
        Fewer slots than the capacity save time; the full capacity keeps the shapes fixed."""

    @classmethod
    def for_decoder(cls, decoder: Decoder, batch: int, length: int) -> KVCache:
        """Returns a cache for `length` tokens, in the type of the decoder's attention (autocast's type if it is on)."""
        c, device = decoder.config, decoder.model.embed_tokens.weight.device
        assert c.head_dim is not None  # resolved by the config
        dtype = type_under_autocast(decoder.activation_dtype, device.type)
        shape = (batch, c.num_key_value_heads, length, c.head_dim)

        def empty() -> list[Tensor]:
            # Zeros, because masked values are still multiplied by 0: inf or nan in uninitialized memory would spread.
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
        """Returns the part of the cache to which one layer's attention adds its keys and values."""
        # A new object for each step: a stored object and the cache would keep each other, and their memory, alive.
        return LayerOfCache(self, self.keys_BGSK[index], self.values_BGSK[index])

    def reserve(self, tokens: int) -> None:
        """Checks that this many new tokens fit. Does not check rows with their own lengths: the caller knows them.

        Raises:
            ValueError: the tokens do not fit.
        """
        if self.lengths_B is None and self.length + tokens > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of {self.capacity} tokens; {tokens} more do not fit: make it longer"
            )

    def positions(self, tokens: int) -> Tensor:
        """Returns the positions of the next tokens, (1 or B, T)."""
        if self.lengths_B is not None:
            return self.lengths_B[:, None] + torch.arange(tokens, device=self.lengths_B.device)
        return torch.arange(self.length, self.length + tokens, device=self.device)[None]

    def mask(self, tokens: int) -> Tensor | None:
        """Returns the attention mask of the next tokens, (1 or B, 1, T, S); None if plain causal attention is right."""
        if self.lengths_B is not None:
            slots_S, positions_BT1 = torch.arange(self.visible, device=self.device), self.positions(tokens)[:, :, None]
            seen_BTS = slots_S <= positions_BT1
            if self.window is not None:
                seen_BTS = seen_BTS & (slots_S > positions_BT1 - self.window)
            return seen_BTS[:, None]
        # A single token gets only the keys of its window, see `LayerOfCache.extend`.
        window = self.window if self.window is not None and self.window < self.length + tokens else None
        if tokens > 1 and (self.length or window is not None):
            return causal_mask(tokens, self.length, self.device, window)
        return None

    def advance(self, tokens: int) -> None:
        """Counts new tokens after all layers have stored them. Until then the cache ignores them, so an interrupted
        step leaves the cache unchanged."""
        if self.lengths_B is not None:
            self.lengths_B += tokens
        else:
            self.length += tokens

    def truncate(self, length: int) -> None:
        """Removes all but the first `length` tokens of each row. If rows had their own lengths, they have one again."""
        assert self.lengths_B is not None or 0 <= length <= self.length, (length, self.length)
        self.length, self.lengths_B = length, None

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Gives each row its own length. Tokens after that length are hidden, and later overwritten."""
        assert len(lengths) == self.keys_BGSK[0].shape[0] and max(lengths) <= self.capacity
        self.lengths_B = torch.tensor(lengths, device=self.device)

    def copies(self, rows: Sequence[int], lengths: Sequence[int], room: int) -> KVCache:
        """Returns a new cache with copies of the named rows, for several continuations of a prompt that is read once.

        Args:
            rows: row of this cache for each row of the new cache; a row may occur several times.
            lengths: tokens to keep in each row of the new cache.
            room: further tokens that must fit.
        """
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
        """Returns an empty cache of one row that shares the memory of this row."""
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
        """Writes new keys and values into the next slots. Returns keys and values of all slots to attend to."""
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
