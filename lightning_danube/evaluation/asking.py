"""The base class of the parts of an evaluation, and the model that the parts ask.

Shapes: B texts of a batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_danube.evaluation.results import Measured
from lightning_danube.generation.sampling import GREEDY, Sampling
from lightning_danube.generation.token_stream import TokenStream
from lightning_danube.inspection.shown import ShownExample, ShownSource, shown_tokens
from lightning_danube.model import Decoder
from lightning_danube.terminal import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD_ROWS = 256
"""Most tokens whose logits are in memory at once."""


class Part(ABC):
    """One part of an evaluation: it has its questions, asks a model, and scores the answers.

    A new part is a file in `evaluation/parts` with a class like this, and an option of `EvaluationData`.
    """

    @property
    @abstractmethod
    def title(self) -> str:
        """Returns the part's name in the progress display and the report."""

    def prepare(self) -> None:  # noqa: B027  (most parts have read their questions by then)
        """Reads the questions that are not read yet. All parts are prepared before the first is measured, so a bad row
        is reported at once.

        Raises:
            ValueError: a row cannot be used; the message names file and row.
        """

    def shown(self, examples: int, tokenizer: PreTrainedTokenizerBase) -> ShownSource:
        """Returns what the model will be asked, for the verb `inspect`: at most `examples` prompts as tokens.

        Raises:
            ValueError: see `prepare`.
        """
        return ShownSource(self.title, "", kept=1, marks=None, notes=["this part does not show what it asks"])

    @abstractmethod
    def measure(self, model: AskedModel) -> list[Measured]:
        """Asks the model the questions, and returns the rows of the report."""


def shown_prompts(
    title: str,
    place: str,
    prompts: Sequence[Sequence[int]],
    notes: Callable[[int], Sequence[str]],
    examples: int,
    tokenizer: PreTrainedTokenizerBase,
) -> ShownSource:
    """Returns prompts as they are shown before a model is asked.

    Args:
        notes: number of a prompt → what is expected as its answer.
    """
    lengths = [len(prompt) for prompt in prompts]
    shown = ShownSource(
        title, "prompts", place, len(prompts), kept=len(prompts), lengths=lengths, marks=None, tokens=sum(lengths)
    )
    for number, prompt in enumerate(prompts[:examples]):
        shown.examples.append(ShownExample(f"prompt {number + 1}", shown_tokens(tokenizer, prompt), notes(number)))
    return shown


class AskedModel:
    """A decoder with its tokenizer, and the methods that the parts need.

    Args:
        weights: the user's name for the model.
        digest: digest of the weights.
        places: most places, padding included, of a batch of texts; a longer text is a separate batch.
        chat_template: whether academic questions are asked as a user's messages.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        weights: str,
        digest: str,
        places: int,
        chat_template: bool,
    ) -> None:
        self.decoder, self.tokenizer, self.weights, self.digest = decoder, tokenizer, weights, digest
        self.places, self.chat_template = places, chat_template
        self.on_progress: Callable[[str, int, int], None] | None = None
        """Called with a part's title, and how much of the part is done."""

    @property
    def device(self) -> torch.device:
        return self.decoder.model.embed_tokens.weight.device

    @property
    def context_length(self) -> int:
        """Returns the most tokens that a text may have."""
        return self.decoder.config.max_position_embeddings

    def progress(self, title: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(title, done, total)

    def nats(self, ids_BT: Tensor) -> Tensor:
        """Returns the loss in nats of each token except the first, (B, T - 1), in float64 on the CPU."""
        states_ND = self.decoder.hidden_states(ids_BT[:, :-1]).flatten(0, 1)
        nats = []
        for states_CD, targets_C in zip(
            states_ND.split(HEAD_ROWS), ids_BT[:, 1:].flatten().split(HEAD_ROWS), strict=True
        ):
            logits_CV = self.decoder.lm_head(states_CD)
            logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
            nats.append(F.cross_entropy(logits_CV, targets_C, reduction="none").cpu().double())
        return torch.cat(nats).view(len(ids_BT), -1)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        ends: Sequence[int],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Returns the new tokens of each prompt, up to the first of `ends`."""
        stream = TokenStream(self.decoder, prompts, new_tokens, eos_ids=ends, sampling=sampling, seeds=seeds)
        rows = torch.stack(list(stream), dim=1).tolist()
        return [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in rows]

    def continuations(
        self, title: str, prompts: Sequence[Sequence[int]], new_tokens: int, ends: Sequence[int]
    ) -> list[str]:
        """Returns the greedy continuation of each prompt. The beginning of a prompt that is too long is cut."""
        room = self.context_length - new_tokens
        kept = [list(prompt[-room:]) for prompt in prompts]
        texts = [""] * len(kept)
        done = 0
        for numbers in self.batches(list(map(len, kept)), new_tokens):
            batch = self.generate([kept[number] for number in numbers], new_tokens, ends)
            for number, ids in zip(numbers, batch, strict=True):
                texts[number] = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            done += len(numbers)
            self.progress(title, done, len(kept))
        return texts

    def batches(self, lengths: Sequence[int], more: int) -> Iterator[list[int]]:
        """Yields batches of text numbers, the longest first. A batch fits `places` if each text grows by `more`."""
        batch: list[int] = []
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            if batch and (len(batch) + 1) * (lengths[batch[0]] + more) > self.places:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def note_of_cut_prompts(self, cut: int) -> list[str]:
        """Returns the report's note on prompts that did not fit; an empty list if all fitted."""
        return (
            [f"{counted(cut, 'prompt lost its', 'prompts lost their')} beginning, at {self.context_length:,} tokens"]
            if cut
            else []
        )


def part_of(asked: int, available: int) -> list[str]:
    """Returns the report's note if only some questions were asked, else an empty list."""
    return [f"{asked:,} of {available:,} questions, chosen by seed"] if asked < available else []


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Returns rows that were appended one by one. Leaves out damaged lines: a power cut leaves half a line."""
    rows = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
