"""Sampling with a key-value cache: `TokenStream` yields the tokens of a batch step by step, `generate` returns all.

Shapes: B batch, T tokens, V vocabulary, D hidden size, N new tokens, E tokens that end a row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_danube.generation.compiled_steps import (
    FEWEST_RECORDED,
    CompiledStep,
    StepsOfCache,
    can_be_recorded,
    next_logits,
)
from lightning_danube.generation.readback import Readback
from lightning_danube.generation.sampling import GREEDY, Sampling, penalize, sample, uniforms
from lightning_danube.model.cache import KVCache

if TYPE_CHECKING:
    from lightning_danube.model.decoder import Decoder


class TokenStream(Iterator[Tensor]):
    """The new tokens of a batch of prompts, (B,) at each step, until every row has ended or has `max_new_tokens`.

    A row gets the tokens that it would get alone: no row sees padding, and each row has its own random numbers. The
    caller ignores the tokens after a row's end. On a GPU there may be one step more than needed, because the host
    learns the end of the last row when it has already started the next step.

    Args:
        decoder: in evaluation mode.
        prompts: token ids of each row.
        seeds: one for each row; the default is 0 for all. A seed gives the same random numbers on every device.
        eos_ids: tokens that end a row. The token that ended the row is its last one.
        window: the most tokens that the model reads. When a text would exceed the window, all but its last
            `window // 2` tokens are dropped, and these are read again as if the text began there. So each token is
            predicted from at least half a window. Without a window, a text that does not fit the context is refused.
        cache: a cache that already holds the first `length` tokens of every prompt, fewer than the shortest prompt has.
            It needs room for the other tokens and for all new tokens but the last.
        compiled: computes the steps after the prompt; the default is to compute them without compilation. On a GPU both
            are recorded as a CUDA graph, plain steps only where that pays (`FEWEST_RECORDED`) and can be done
            (`can_be_recorded`).

    Raises:
        ValueError: the request is impossible.
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
        """The tokens yielded so far, (B,) for each step."""
        self.lengths = [len(prompt) for prompt in self.prompts]
        self.starts = [0] * len(self.prompts)
        """For each row: the length of its text, and the index of the first token that the model still reads."""
        # The last new token is never read.
        capacity = max(self.lengths) + max_new_tokens - 1
        if window is not None:
            capacity = min(capacity, window)
        if compiled is not None:
            capacity += 1  # see StepsOfCache
        self.cache = KVCache.for_decoder(decoder, len(self.prompts), capacity) if cache is None else cache
        assert self.cache.capacity >= capacity and self.cache.length < min(self.lengths)
        assert cache is None or window is None, "a window starts from its own cache"
        assert compiled is None or compiled.decoder is decoder
        self._fixed: StepsOfCache | None = None
        """Computes steps of fixed shapes."""
        if compiled is not None:
            self._fixed = StepsOfCache(compiled, self.cache)
        elif max_new_tokens >= FEWEST_RECORDED and can_be_recorded(decoder):
            self._fixed = StepsOfCache(partial(next_logits, decoder), self.cache)

        self.eos_ids_E = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
        self.finished_B = torch.zeros(len(self.prompts), dtype=torch.bool, device=device)
        self.can_finish = bool(eos_ids)
        self._all_finished: Readback | None = None
        if sampling.repetition_penalty != 1:
            shape = (len(self.prompts), decoder.config.vocab_size)
            self.seen_BV = torch.zeros(shape, dtype=torch.bool, device=device)
            for row, prompt in enumerate(self.prompts):
                self.seen_BV[row, prompt] = True
        if sampling.temperature > 0:
            # All numbers at once, so that there is one transfer to the device. They come from Python's generator, so
            # they depend on no device and no version of torch.
            seeds = [0] * len(self.prompts) if seeds is None else seeds
            assert len(seeds) == len(self.prompts)
            drawn = [uniforms(seed, max_new_tokens) for seed in seeds]
            self.uniforms_NB = torch.tensor(drawn, dtype=torch.float32, device=device).t()

    # no_grad, not inference_mode: quantized layers keep tensors between calls. If a sample is drawn during training,
    # they would keep inference tensors, on which training fails. A caller that only generates may use inference_mode
    # around this.
    @torch.no_grad()
    def __next__(self) -> Tensor:
        step = len(self.steps)
        if step == self.max_new_tokens or self._has_ended():
            raise StopIteration
        logits_BV = self._logits()
        if logits_BV.dtype != torch.float64:
            logits_BV = logits_BV.float()
        if not step and not bool(logits_BV.isfinite().all()):
            raise ValueError(
                "the model gives logits that are not finite: its weights are damaged, or "
                f"{self.decoder.model.embed_tokens.weight.dtype} is too narrow for them"
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

    def _has_ended(self) -> bool:
        """Returns whether all rows had ended: on a GPU before the last step, so that the last step need not be over.

        This is the one place in a step that waits for the device.
        """
        if not self.steps or not self.can_finish:
            return False
        before, self._all_finished = self._all_finished, Readback(self.finished_B.all())
        told = before if self._all_finished.is_late else self._all_finished
        return told is not None and bool(told.values())

    @property
    def cached(self) -> int:
        """The tokens of each row that the cache holds, where the rows have one length."""
        # The last new token is not read yet.
        return self.cache.length if self.cache.lengths_B is None else self.lengths[0] - self.starts[0] - 1

    def finish(self, row: int) -> None:
        """Ends a row for a reason other than its tokens."""
        self.finished_B[row] = True
        self.can_finish = True

    def _logits(self) -> Tensor:
        """The logits after the last token of each row, (B, V). Reads the tokens that were not read yet."""
        rows = range(len(self.lengths))
        moved = [row for row in rows if self._slide(row)]
        if not self.steps or len(moved) == len(rows):
            if self.steps:
                self.cache.length, self.cache.lengths_B = 0, None
            return self._read(rows, self.cache)
        longest = max(length - start for length, start in zip(self.lengths, self.starts, strict=True))
        if self.cache.lengths_B is not None:
            for row in moved:
                # The step below writes into every row. What it writes into this one is overwritten afterwards.
                self.cache.lengths_B[row] = 0
            self.cache.visible = longest
        if self._fixed is None:
            logits_BV = next_logits(self.decoder, self.steps[-1], self.cache)
        else:
            logits_BV = self._fixed(self.steps[-1], longest)
        for row in moved:
            assert self.cache.lengths_B is not None, "rows of one length move together"
            logits_BV[row] = self._read([row], self.cache.row(row))[0]
            self.cache.lengths_B[row] = self.lengths[row] - self.starts[row]
        return logits_BV

    def _slide(self, row: int) -> bool:
        """Drops the older half of a row's window if the window is full. Returns whether it did."""
        if self.window is None or self.lengths[row] - self.starts[row] <= self.window:
            return False
        self.starts[row] = self.lengths[row] - self.window // 2
        return True

    def _read(self, rows: Sequence[int], cache: KVCache) -> Tensor:
        """Reads the texts of these rows into their cache, and returns the logits after their last tokens, (rows, V).

        Shorter rows are padded at the end, where causal attention does not see the padding.
        """
        begun = cache.length
        texts = [self._text(row)[begun:] for row in rows]
        counts = [len(text) for text in texts]
        ids_BT = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        hidden_BTD = self.decoder.hidden_states(ids_BT, cache=cache)
        of_one_length = min(counts) == max(counts)
        if not of_one_length or (self._fixed is not None and cache is self.cache):
            cache.set_lengths([begun + count for count in counts])
            if self._fixed is not None:
                self._fixed.forget()
        if of_one_length:
            last_BD = hidden_BTD[:, -1]
        else:
            last_B = torch.tensor(counts, device=ids_BT.device) - 1
            last_BD = hidden_BTD[torch.arange(len(counts), device=ids_BT.device), last_B]
        logits_BV: Tensor = self.decoder.lm_head(last_BD)
        return logits_BV

    def _text(self, row: int) -> Tensor:
        """The tokens of a row that the model reads, (T,)."""
        new = [torch.stack(self.steps)[:, row]] if self.steps else []
        return torch.cat([self.prompts[row], *new])[self.starts[row] :]


def tokens_on_host(stream: TokenStream) -> Iterator[list[int]]:
    """Yields the tokens of each step as a list; on a GPU while the next step runs there."""
    waiting: Readback | None = None
    for ids_B in stream:
        new = Readback(ids_B)
        if waiting is not None:
            yield waiting.values()
        if new.is_late:
            waiting = new
        else:
            yield new.values()
    if waiting is not None:
        yield waiting.values()


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
    """The new tokens of each row, including the token that ended it. The arguments are those of `TokenStream`.

    The decoder is in evaluation mode meanwhile.
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
    """Puts a decoder into evaluation mode, and each module back into its own mode at the end."""
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        yield
    finally:
        # One by one: decoder.train() would also change modules that were in evaluation mode before.
        for module in training:
            module.training = True


def check_request(
    decoder: "Decoder", prompts: Sequence[Sequence[int]] | Tensor, max_new_tokens: int, window: int | None
) -> None:
    """Checks what is asked of a `TokenStream`.

    Raises:
        ValueError: the request is impossible.
    """
    context, vocabulary = decoder.config.max_position_embeddings, decoder.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it has to be at least 1")
    if window is not None and not 2 <= window <= context:
        raise ValueError(f"--window is {window}: it has to be at least 2 and at most the context of {context}")
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
    """Checks that a prompt and its new tokens fit the context.

    Raises:
        ValueError: they do not fit; with the number of new tokens that would.
    """
    if prompt_tokens + max_new_tokens > context:
        raise ValueError(
            f"{name} has {prompt_tokens} tokens, and with {max_new_tokens} new ones exceeds the context of {context}; "
            f"at most {max(0, context - prompt_tokens)} new tokens fit, or any number with a window"
        )
