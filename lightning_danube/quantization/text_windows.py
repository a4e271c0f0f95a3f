"""Divides a text into windows, to measure perplexity by the usual conventions, and makes cloze questions from the text.

Shapes: B windows or continuations of a batch, T tokens of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lightning_danube.inspection.shown import ShownExample, ShownSource, shown_tokens
from lightning_danube.quantization.settings import WindowSettings
from lightning_danube.terminal import counted
from lightning_danube.text.corpora import read_documents
from lightning_danube.tokens.shards import is_held_out
from lightning_danube.tokens.tokenizer import begin_token
from lightning_danube.training.contract import WindowBatch
from lightning_danube.training.planned_data import TokenizedModule

CLOZE_CHOICES = 4
CLOZE_CONTEXT, CLOZE_CONTINUATION = 32, 8
"""Tokens of a question and of each answer."""
BATCH_TOKENS = 1024
"""Most tokens of a batch, which has at least one window: all logits of a batch are in memory at once."""


class TextWindows(WindowSettings, TokenizedModule):
    """The beginning of a text, in windows of one or several lengths. `WindowSettings` explains the arguments."""

    def initialize(self) -> None:
        self._begin = begin_token(self.tokenizer)
        self.passes = 1
        """How often the text is read. The task sets it: once for each model that it still has to measure."""

    def setup(self, stage: str) -> None:
        self.ids, self.calibration_ids = self._read()
        longest = max(self.context_lengths)
        if len(self.ids) < longest:
            raise ValueError(
                f"{self.text.path}: {counted(len(self.ids), 'token is', 'tokens are')} fewer than one "
                "window of data.context_lengths "
                f"({longest:,}): give more text, raise data.max_tokens or take shorter windows"
            )
        self.questions = self._questions()

    def _read(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the tokens to measure on, and the calibration tokens after them."""
        wanted = None if self.max_tokens is None else self.max_tokens + self.calibration_tokens
        parts: list[list[int]] = [] if self._begin is None else [[self._begin]]
        count = documents = 0
        ends = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            for document in read_documents("text", self.text, self.cache_dir):
                if self.held_out is not None and not is_held_out(document.text, self.held_out):
                    continue
                if documents:
                    parts.append(ends)
                documents += 1
                parts.append(backend.encode(document.text, add_special_tokens=False).ids)
                count += len(parts[-1])
                if wanted is not None and count >= wanted:
                    break
        finally:
            backend.encode_special_tokens = False
        if not documents:
            which = "" if self.held_out is None else f", none of its documents is held out at {self.held_out}"
            raise ValueError(f"{self.text.path}: there is no text to measure on{which}")
        ids = np.array([token for part in parts for token in part], np.int64)
        measured = len(ids) if self.max_tokens is None else min(self.max_tokens, len(ids))
        return ids[:measured], ids[measured : measured + self.calibration_tokens]

    # --- windows ------------------------------------------------------------------------------------------------------

    def windows(self, context_length: int) -> NDArray[np.int64]:
        """Returns windows, (windows, T). Each begins with the bos token if there is one."""
        step = context_length if self.stride is None else self.stride
        starts = range(0, len(self.ids) - context_length + 1, step)
        windows = np.stack([self.ids[start : start + context_length] for start in starts])
        if self._begin is not None:
            windows[:, 0] = self._begin
        return windows

    def first_counted(self, context_length: int) -> int:
        """Returns the first position in a window whose prediction counts. The token at the next position is scored."""
        return context_length // 2 if self.stride is None else context_length - 1 - self.stride

    def _questions(self) -> NDArray[np.int64]:
        """Returns (questions, choices, tokens). The first choice is true; the others continue other questions."""
        length = CLOZE_CONTEXT + CLOZE_CONTINUATION
        places = len(self.ids) // length
        count = min(self.cloze_questions, places)
        if not count:
            return np.empty((0, CLOZE_CHOICES, length), np.int64)
        if count < CLOZE_CHOICES:
            raise ValueError(
                f"{self.text.path}: {counted(len(self.ids), 'token is', 'tokens are')} too few for a cloze: "
                "give more text or set "
                "data.cloze_questions: 0"
            )
        starts = np.linspace(0, len(self.ids) - length, count).astype(np.int64)
        texts = np.stack([self.ids[start : start + length] for start in starts])
        if self._begin is not None:
            texts[:, 0] = self._begin
        questions = np.repeat(texts[:, None], CLOZE_CHOICES, axis=1)
        for choice in range(1, CLOZE_CHOICES):
            # The false continuations come from far away: a quarter, half and three quarters of the text from here.
            others = np.roll(texts, -(count * choice // CLOZE_CHOICES), axis=0)
            questions[:, choice, CLOZE_CONTEXT:] = others[:, CLOZE_CONTEXT:]
        return questions

    # --- what `inspect` shows -----------------------------------------------------------------------------------------

    def shown_sources(self, examples: int, rows: int) -> Iterator[ShownSource]:
        """Yields the windows of each length, the questions and the calibration text. `max_tokens` limits what is
        read, not `rows`."""
        self.setup("test")
        batches = self.batches()
        for length in self.context_lengths:
            windows = [batch for batch in batches if batch.get("context_length") == length]
            yield self._shown_batches(f"windows of {length:,} tokens", "windows", windows, examples)
        if questions := [batch for batch in batches if "choices" in batch]:
            shown = self._shown_batches("cloze questions", "answers", questions, examples)
            shown.notes.append(f"{CLOZE_CHOICES} answers to each question; the true answer comes first")
            yield shown
        calibration = self.calibration_ids.tolist()
        size = len(calibration)
        shown = ShownSource("calibration text", "tokens", self.text.path, read=size, kept=size, marks=None)
        shown.notes.append("the text after the measured text, for levels that calibrate on text")
        if examples and calibration:
            start = calibration[: self.context_lengths[0]]
            shown.examples.append(ShownExample("its beginning", shown_tokens(self.tokenizer, start)))
        if not calibration and self.calibration_tokens:
            shown.warnings.append("no text is left to calibrate on: give more text, or lower data.max_tokens")
        yield shown

    def _shown_batches(self, name: str, unit: str, batches: Sequence[WindowBatch], examples: int) -> ShownSource:
        rows = [(row, batch["first"]) for batch in batches for row in batch["input_ids"].tolist()]
        shown = ShownSource(name, unit, self.text.path, len(rows), kept=len(rows), marks="measured")
        shown.tokens = sum(len(row) for row, _ in rows)
        # The prediction at position `first` is of the next token.
        shown.marked_tokens = sum(len(row) - 1 - first for row, first in rows)
        for number, (row, first) in enumerate(rows[:examples]):
            title = f"{unit.removesuffix('s')} {number + 1}"
            measured = [place > first for place in range(len(row))]
            shown.examples.append(ShownExample(title, shown_tokens(self.tokenizer, row, measured)))
        return shown

    def identity(self) -> dict[str, Any]:
        """Returns everything that determines which tokens are measured, and how."""
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.questions.tobytes())
        return {"text": digest.hexdigest(), "context_lengths": self.context_lengths, "stride": self.stride}

    def calibration_identity(self) -> str:
        return hashlib.sha256(self.calibration_ids.tobytes()).hexdigest()

    # --- loaders ------------------------------------------------------------------------------------------------------

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Returns a loader of the whole text for each model that the task evaluates."""
        # The trainer needs a loader even if nothing is left to read.
        batches = self.batches() if self.passes else [WindowBatch()]
        return [DataLoader(WindowBatches(batches), batch_size=None) for _ in range(max(1, self.passes))]

    def batches(self) -> Sequence[WindowBatch]:
        """Returns windows: input_ids (B, T), their context_length, and `first`, the first position whose prediction
        counts. Then questions: input_ids (B, T), where the `choices` of a question are consecutive, true one first."""
        result: list[WindowBatch] = []
        for length in self.context_lengths:
            windows, rows = torch.from_numpy(self.windows(length)), max(1, BATCH_TOKENS // length)
            first = self.first_counted(length)
            result += [{"input_ids": part, "context_length": length, "first": first} for part in windows.split(rows)]
        count, choices, length = self.questions.shape
        if not count:
            return result
        for part in torch.from_numpy(self.questions).split(max(1, BATCH_TOKENS // (choices * length))):
            result.append({"input_ids": part.flatten(0, 1), "choices": choices, "first": CLOZE_CONTEXT - 1})
        return result


class WindowBatches(Dataset[Any]):
    """A data set of batches that are already in memory."""

    def __init__(self, batches: Sequence[WindowBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> WindowBatch:
        return self.batches[number]
