"""Sampling with a key-value cache: `TokenStream` gives the tokens of a batch step by step, `generate` all of them.

Shapes: B batch, T tokens, V vocabulary, C candidates of a draw, N new tokens, E tokens that end a row; of the cache: G
key-value heads, S tokens that fit, K channels of a head.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import Past, causal_mask
from .compiled_steps import CompiledStep, StepsOfCache, next_logits

if TYPE_CHECKING:
    from .decoder import Decoder


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
    """

    def __init__(self, keys_BGSK: Sequence[Tensor], values_BGSK: Sequence[Tensor]) -> None:
        self.keys_BGSK, self.values_BGSK = keys_BGSK, values_BGSK
        self.length = 0
        self.lengths_B: Tensor | None = None
        self.visible = self.capacity
        """Slots that attention looks at when rows have lengths of their own: at least those of the longest row and of
        the new tokens. Fewer than all save time, all of them keep the shapes fixed."""

    @classmethod
    def for_decoder(cls, decoder: "Decoder", batch: int, length: int) -> "KVCache":
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

        return cls(empty(), empty())

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
            return (torch.arange(self.visible, device=self.device) <= self.positions(tokens)[:, :, None])[:, None]
        return causal_mask(tokens, self.length, self.device) if self.length and tokens > 1 else None

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

    def copies(self, rows: Sequence[int], lengths: Sequence[int], room: int) -> "KVCache":
        """A cache that has these rows, each as often as it is named, its first so many tokens, and room for more: for
        several continuations of one beginning, which is then read once."""
        capacity = max(lengths) + room
        rows_R, kept = torch.tensor(rows, device=self.device), min(self.capacity, capacity)

        def copied(memory_BGSK: Tensor) -> Tensor:
            _, G, _, K = memory_BGSK.shape
            new_RGSK = memory_BGSK.new_zeros(len(rows), G, capacity, K)
            new_RGSK[:, :, :kept] = memory_BGSK[rows_R, :, :kept]
            return new_RGSK

        cache = KVCache([*map(copied, self.keys_BGSK)], [*map(copied, self.values_BGSK)])
        cache.set_lengths(lengths)
        return cache

    def row(self, index: int) -> "KVCache":
        """An empty cache of one row, in the memory of this one's."""
        keys_BGSK, values_BGSK = (
            [memory_BGSK[index : index + 1] for memory_BGSK in memories_BGSK]
            for memories_BGSK in (self.keys_BGSK, self.values_BGSK)
        )
        return KVCache(keys_BGSK, values_BGSK)


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
            return keys_BGSK[:, :, :end], values_BGSK[:, :, :end]
        rows_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
        slots_BT = self.cache.positions(k_BGTK.shape[2])
        keys_BGSK[rows_B1, :, slots_BT] = k_BGTK.transpose(1, 2)
        values_BGSK[rows_B1, :, slots_BT] = v_BGTK.transpose(1, 2)
        return keys_BGSK[:, :, : self.cache.visible], values_BGSK[:, :, : self.cache.visible]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What is set acts in the order of the fields, as in transformers.

    Args:
        repetition_penalty: divides the positive and multiplies the negative logits of all tokens that the text has,
            prompt included; 1 does nothing.
        temperature: divides the logits; 0 takes the likeliest token, whatever follows below.
        top_k: draw among so many likeliest tokens.
        top_p: draw among the fewest likeliest tokens that hold this share.

    Raises:
        ValueError: a number out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it has to be above 0 (1 does nothing)")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; it has to be at least 0 (0 takes the likeliest token)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it has to be at least 1, or left out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it has to be above 0 and at most 1, or left out")


GREEDY = Sampling()


class TokenStream(Iterator[Tensor]):
    """The new tokens of a batch of prompts, (B,) at each step, until every row has ended or has `max_new_tokens`.

    A row gets the tokens that it would get alone: prompts of different lengths are read as they are, nothing padded is
    seen, and each row draws from random numbers of its own seed. What comes after a row's end is to be ignored.

    Args:
        decoder: in evaluation mode.
        prompts: token ids of each row.
        seeds: one for each row; 0 for all where left out. The same on every device.
        eos_ids: tokens that end a row; the row's last token is then one of them.
        window: how many tokens the model reads at most. Whenever a text would outgrow it, all but its last
            `window // 2` tokens are dropped and these are read anew, as if the text began there; so each token is
            predicted from at least the half of the window, and what the model computes is what it computes for a text
            of that length. Without it, a text that does not fit the context is refused.
        cache: one that already holds the beginning of every prompt (`length` tokens, fewer than the shortest has), and
            has room for the rest and all new tokens but the last.
        compiled: what computes the steps after a prompt; without it they are computed as they are written.

    Raises:
        ValueError: an impossible request.
    """

    def __init__(
        self,
        decoder: "Decoder",
        prompts: Sequence[Sequence[int]] | Tensor,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        eos_ids: Sequence[int] = (),
        window: int | None = None,
        cache: KVCache | None = None,
        compiled: CompiledStep | None = None,
    ) -> None:
        check_request(decoder, prompts, max_new_tokens, window)
        device = decoder.model.embed_tokens.weight.device
        self.decoder, self.max_new_tokens, self.sampling, self.window = decoder, max_new_tokens, sampling, window
        self.prompts = [torch.as_tensor(prompt, dtype=torch.long, device=device) for prompt in prompts]
        self.steps: list[Tensor] = []
        """What was given so far."""
        self.lengths = [len(prompt) for prompt in self.prompts]
        self.starts = [0] * len(self.prompts)
        """Of each row: how many tokens its text has, and the first of them that the model still reads."""
        # The last token is never read again, hence one less.
        capacity = max(self.lengths) + max_new_tokens - 1
        if window is not None:
            capacity = min(capacity, window)
        if compiled is not None:
            capacity += 1  # see StepsOfCache
        self.cache = KVCache.for_decoder(decoder, len(self.prompts), capacity) if cache is None else cache
        assert self.cache.capacity >= capacity and self.cache.length < min(self.lengths)
        assert cache is None or window is None, "a window starts from its own cache"
        assert compiled is None or compiled.decoder is decoder
        self.compiled = None if compiled is None else StepsOfCache(compiled, self.cache)

        self.eos_ids_E = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
        self.finished_B = torch.zeros(len(self.prompts), dtype=torch.bool, device=device)
        self.can_finish = bool(eos_ids)
        if sampling.repetition_penalty != 1:
            shape = (len(self.prompts), decoder.config.vocab_size)
            self.seen_BV = torch.zeros(shape, dtype=torch.bool, device=device)
            for row, prompt in enumerate(self.prompts):
                self.seen_BV[row, prompt] = True
        if sampling.temperature > 0:
            # All draws at once, and Python's own generator: one transfer, whose numbers depend on no device or version.
            seeds = [0] * len(self.prompts) if seeds is None else seeds
            assert len(seeds) == len(self.prompts)
            drawn = [uniforms(seed, max_new_tokens) for seed in seeds]
            self.uniforms_NB = torch.tensor(drawn, dtype=torch.float32, device=device).t()

    # no_grad, not inference_mode: layers that keep tensors between calls (quantized ones do) would keep inference
    # tensors, and training would fail on them after a sample was drawn in its midst. Who only generates, as the
    # commands do, goes on in inference_mode, which no_grad leaves alone.
    @torch.no_grad()
    def __next__(self) -> Tensor:
        step = len(self.steps)
        # Whether all have ended is the one thing that a step asks the device for.
        if step == self.max_new_tokens or (step and self.can_finish and bool(self.finished_B.all())):
            raise StopIteration
        logits_BV = self._logits()
        if logits_BV.dtype != torch.float64:
            logits_BV = logits_BV.float()
        if not step and not bool(logits_BV.isfinite().all()):
            raise ValueError(
                "the model gives logits that are no finite numbers: its weights are damaged, or "
                f"{self.decoder.model.norm.weight.dtype} is too narrow for them"
            )
        if self.sampling.repetition_penalty != 1:
            logits_BV = penalize(logits_BV, self.seen_BV, self.sampling.repetition_penalty)
        ids_B = sample(logits_BV, self.sampling, self.uniforms_NB[step] if self.sampling.temperature > 0 else None)
        if self.sampling.repetition_penalty != 1:
            self.seen_BV.scatter_(1, ids_B[:, None], True)
        if self.can_finish:
            self.finished_B |= torch.isin(ids_B, self.eos_ids_E)
        self.steps.append(ids_B)
        self.lengths = [length + 1 for length in self.lengths]
        return ids_B

    def finish(self, row: int) -> None:
        """End a row for a reason that is not in its tokens."""
        self.finished_B[row] = True
        self.can_finish = True

    def _logits(self) -> Tensor:
        """(B, V) after the last token of each row, after reading what has not been read."""
        rows = range(len(self.lengths))
        moved = [row for row in rows if self._slide(row)]
        if not self.steps or len(moved) == len(rows):
            if self.steps:
                self.cache.length, self.cache.lengths_B = 0, None
            return self._read(rows, self.cache)
        longest = max(length - start for length, start in zip(self.lengths, self.starts, strict=True))
        if self.cache.lengths_B is not None:
            for row in moved:
                # The step below writes something into every row; what it writes here is overwritten right after.
                self.cache.lengths_B[row] = 0
            self.cache.visible = longest
        if self.compiled is None:
            logits_BV = next_logits(self.decoder, self.steps[-1], self.cache)
        else:
            logits_BV = self.compiled(self.steps[-1], longest)
        for row in moved:
            assert self.cache.lengths_B is not None, "rows of one length move together"
            logits_BV[row] = self._read([row], self.cache.row(row))[0]
            self.cache.lengths_B[row] = self.lengths[row] - self.starts[row]
        return logits_BV

    def _slide(self, row: int) -> bool:
        """Drop the older half of what a row reads, if the window is full."""
        if self.window is None or self.lengths[row] - self.starts[row] <= self.window:
            return False
        self.starts[row] = self.lengths[row] - self.window // 2
        return True

    def _read(self, rows: Sequence[int], cache: KVCache) -> Tensor:
        """Read the texts of these rows into their cache, past what it holds already; (rows, V) after their last tokens.

        Shorter rows are filled up behind their end, where causal attention keeps them from seeing it.
        """
        begun = cache.length
        texts = [self._text(row)[begun:] for row in rows]
        counts = [len(text) for text in texts]
        ids_BT = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        hidden_BTD = self.decoder.hidden_states(ids_BT, cache=cache)
        of_one_length = min(counts) == max(counts)
        if not of_one_length or (self.compiled is not None and cache is self.cache):
            cache.set_lengths([begun + count for count in counts])
            if self.compiled is not None:
                self.compiled.forget()
        if of_one_length:
            last_BD = hidden_BTD[:, -1]
        else:
            last_B = torch.tensor(counts, device=ids_BT.device) - 1
            last_BD = hidden_BTD[torch.arange(len(counts), device=ids_BT.device), last_B]
        logits_BV: Tensor = self.decoder.lm_head(last_BD)
        return logits_BV

    def _text(self, row: int) -> Tensor:
        """What the model reads of a row."""
        new = [torch.stack(self.steps)[:, row]] if self.steps else []
        return torch.cat([self.prompts[row], *new])[self.starts[row] :]


def generate(
    decoder: "Decoder",
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    eos_ids: Sequence[int] = (),
    window: int | None = None,
) -> list[list[int]]:
    """The new tokens of each row, its end included; arguments as for TokenStream.

    Modules in training mode are put in evaluation mode for the time being.
    """
    with evaluation_mode(decoder):
        stream = TokenStream(
            decoder, prompts, max_new_tokens, sampling=sampling, seeds=seeds, eos_ids=eos_ids, window=window
        )
        rows = torch.stack(list(stream), dim=1).tolist()
    ends = ([place for place, token in enumerate(row) if token in eos_ids] for row in rows)
    return [row[: end[0] + 1] if end else row for row, end in zip(rows, ends, strict=True)]


@contextmanager
def evaluation_mode(decoder: "Decoder") -> Iterator[None]:
    """Evaluation mode, then each module's own mode again."""
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        yield
    finally:
        # One by one: decoder.train() would also wake those that were asleep before.
        for module in training:
            module.training = True


def sample(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor | None = None) -> Tensor:
    """One token a row, (B,), from logits in float32 or float64; `uniforms_B` in (0, 1] say which, where one is drawn.

    A row's token is the one at which the sum of probabilities reaches its number: unlike torch.multinomial, this
    depends on the row's own logits and number, and on nothing else in the batch.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    assert uniforms_B is not None
    probabilities_BC, ids_BC = candidates(logits_BV, sampling)
    sums_BC = probabilities_BC.cumsum(dim=-1)
    # Above 0, so that the first to reach it has a probability; at most all, so that there is one.
    reach_B1 = uniforms_B.to(sums_BC.dtype)[:, None] * sums_BC[:, -1:]
    drawn_B1 = torch.searchsorted(sums_BC, reach_B1)
    return (drawn_B1 if ids_BC is None else ids_BC.gather(-1, drawn_B1))[:, 0]


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities to draw with, up to a factor, and whose they are: (B, C) each, the likeliest first, or (B, V) and
    None, in the order of the vocabulary. Ties at the k-th place are cut, where transformers keeps them all."""
    logits_BC, ids_BC = logits_BV / sampling.temperature, None
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        logits_BC, ids_BC = logits_BC.topk(sampling.top_k)
    elif sampling.top_p is not None and sampling.top_p < 1:
        logits_BC, ids_BC = logits_BC.sort(descending=True, stable=True)
    probabilities_BC = logits_BC.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        # A token goes when those before it already hold top_p; before the first there is nothing, so it always stays.
        surplus_BC = probabilities_BC.cumsum(dim=-1) - probabilities_BC >= sampling.top_p
        probabilities_BC = probabilities_BC.masked_fill(surplus_BC, 0.0)
    return probabilities_BC, ids_BC


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely, as CTRL does (arXiv 1909.05858), with negative logits taken care of."""
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def uniforms(seed: int, count: int) -> list[float]:
    """Numbers in (0, 1]; the first ones do not depend on how many are asked for."""
    source = random.Random(seed)
    return [1.0 - source.random() for _ in range(count)]


def check_request(
    decoder: "Decoder", prompts: Sequence[Sequence[int]] | Tensor, max_new_tokens: int, window: int | None
) -> None:
    context, vocabulary = decoder.config.max_position_embeddings, decoder.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it has to be at least 1")
    if window is not None and not 2 <= window <= context:
        raise ValueError(f"the window is {window}; it has to be at least 2 and at most the context of {context}")
    if not len(prompts):
        raise ValueError("there is no prompt")
    for number, prompt in enumerate(prompts, start=1):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        ids = torch.as_tensor(prompt)
        if ids.ndim != 1:
            raise ValueError(f"prompt ids have the shape {tuple(ids.shape)} a row; they have to be (tokens,)")
        if not len(ids):
            raise ValueError(f"{name} has no tokens")
        if window is None:
            check_room(len(ids), max_new_tokens, context, name)
        least, largest = int(ids.min()), int(ids.max())
        if least < 0 or largest >= vocabulary:
            raise ValueError(
                f"{name} has token ids from {least} to {largest}; the model knows 0 to {vocabulary - 1}: is the "
                "tokenizer another model's?"
            )


def check_room(prompt_tokens: int, max_new_tokens: int, context: int, name: str) -> None:
    """
    Raises:
        ValueError: the prompt and so many new tokens do not fit the context.
    """
    if prompt_tokens + max_new_tokens > context:
        raise ValueError(
            f"{name} has {prompt_tokens} tokens, and with {max_new_tokens} new ones exceeds the context of {context}; "
            f"at most {max(0, context - prompt_tokens)} new tokens fit, or any number with a window"
        )
