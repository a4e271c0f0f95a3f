"""The data of preference tuning: pairs of answers, encoded once, with the reference model's log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lightning_danube.chat.data import SPLITS, ConversationData, EncodedChats, batch_of
from lightning_danube.chat.preferences import Preference, PreferenceSource, read_preferences
from lightning_danube.chat.rows import FittedChat, fit_pair
from lightning_danube.chat.settings import PreferenceSettings
from lightning_danube.files import naming_cached, new_file
from lightning_danube.terminal import show
from lightning_danube.text.reading import BadRow
from lightning_danube.training.contract import HeldOutPairBatch, PairBatch, TokenBatch
from lightning_danube.training.loaders import StepRows
from lightning_danube.training.passes import Pass, bucketed_pass
from lightning_danube.training.position import replicas_of


@dataclass
class Reference:
    """The answers' log-probabilities under the model that the run begins with.

    Args:
        values: (source, split) → log-probabilities of the chosen and the rejected answers, (pairs, 2).
        computed: pairs whose values this run computed.
        reused: pairs whose values an earlier run computed.
        seconds: time for all pairs.
    """

    values: dict[tuple[str, str], NDArray[Any]] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0
    seconds: float = 0.0


class PreferenceData(PreferenceSettings, ConversationData):
    """Pairs of a chosen and a rejected answer to the same prompt, for `PreferenceTuning`. `PreferenceSettings` explains
    the arguments."""

    chats_each = 2
    sides = (", chosen", ", rejected")

    def initialize(self) -> None:
        super().initialize()
        self.reference = Reference()

    def read(self, name: str) -> Iterator[Preference | BadRow]:
        source = self.sources[name]
        assert isinstance(source, PreferenceSource)
        return read_preferences(name, source, self.cache_dir)

    def fit_example(self, found: Preference) -> list[FittedChat]:
        answers = (found.chosen, found.rejected)
        return fit_pair(self.encoder, found.prompt, answers, self.context_length, self.too_long)

    def encoded_by(self) -> list[Any]:
        return [self.too_long]

    def lengths(self, chats: EncodedChats) -> NDArray[np.int64]:
        longest: NDArray[np.int64] = chats.places.reshape(-1, 2).max(1)
        return longest

    def counted(self, chats: EncodedChats) -> NDArray[np.int64]:
        """Returns 1 for each pair, however long its answers are."""
        return np.ones(len(chats) // 2, dtype=np.int64)

    def plan(self, number: int) -> Pass:
        return bucketed_pass(self.lengths(self.train_chats), self.context_length, self.batch_rows, self.seed, number)

    def training_rows(self) -> PairRows:
        # `train_chats` holds the pairs of the sources one source after the other.
        parts = [self._reference_of(name, "train") for name in self.sources]
        return PairRows(self.train_chats, np.concatenate(parts), self.context_length)

    def held_out_rows(self, name: str, chats: EncodedChats, batches: list[list[list[int]]]) -> HeldOutPairs:
        return HeldOutPairs(name, chats, self._reference_of(name, "validation"), batches, self.context_length)

    def evaluation_pairs(self, limit: int | None) -> dict[str, int]:
        """Returns the number of pairs behind each source's held-out values."""
        return {name: min(limit or len(chats), len(chats) // 2) for name, chats in self._validation.items()}

    # --- reference log-probabilities ----------------------------------------------------------------------------------

    def prepare_reference(self, model: str, log_probabilities: Callable[[TokenBatch], Tensor]) -> None:
        """Reads or computes the reference log-probabilities of all pairs.

        They are read if an earlier run of this model stored them beside the pairs. Otherwise each replica computes its
        share once, and the values are stored.

        Args:
            model: identifies the weights and the precision; a part of the file's name.
            log_probabilities: batch → log-probabilities of the chosen and the rejected answers, (pairs, 2).
        """
        began, reference = time.monotonic(), Reference()
        trains = self.trainer is None or self.trainer.state.fn == "fit"
        for name, split in product(self.sources, SPLITS if trains else ("validation",)):
            chats, file = self._open(name, split), self._directory(name) / f"{split}-reference-{model}.npy"
            if self._all_replicas_have(file):
                values = self._load(name, file, len(chats) // 2)
                reference.reused += len(values)
            else:
                values = self._compute(chats, log_probabilities)
                self._keep(file, values)
                reference.computed += len(values)
            reference.values[name, split] = values
        reference.seconds = time.monotonic() - began
        self.reference = reference

    def _reference_of(self, name: str, split: str) -> NDArray[np.floating]:
        try:
            return self.reference.values[name, split]
        except KeyError:
            raise ValueError(
                "PreferenceData has no reference log-probabilities, which its task computes: set model.class_path to "
                "lightning_danube.chat.PreferenceTuning"
            ) from None

    def _all_replicas_have(self, file: Path) -> bool:
        if self.trainer is None or self.trainer.world_size == 1:
            return file.exists()
        return bool(self.trainer.strategy.reduce_boolean_decision(file.exists(), all=True))

    def _compute(self, chats: EncodedChats, log_probabilities: Callable[[TokenBatch], Tensor]) -> NDArray[Any]:
        replicas, replica = replicas_of(self.trainer)
        # Longest first, as in validation, so that a pair that does not fit into memory fails at once.
        mine = np.argsort(-self.lengths(chats), kind="stable")[replica::replicas]
        starts = range(0, len(mine), self.micro_batch_size)
        if self.trainer is None or self.trainer.is_global_zero:
            show(f"reference: computing {len(self.lengths(chats)):,} pairs")
        values: Tensor | None = None
        for start in tqdm(starts, desc="reference", unit=" batches", disable=None, leave=False):
            pairs = mine[start : start + self.micro_batch_size]
            found = log_probabilities(pairs_of(chats, [[int(pair)] for pair in pairs], self.context_length))
            if values is None:
                values = found.new_zeros(len(chats) // 2, 2)
            values[torch.from_numpy(pairs).to(values.device)] = found
        if values is None:
            values = torch.zeros(len(chats) // 2, 2)
            if self.trainer is not None:
                values = values.to(self.trainer.strategy.root_device)
        if replicas > 1:
            assert self.trainer is not None
            # Each pair belongs to one replica and is 0 on the others, so the sum is exact.
            values = self.trainer.strategy.reduce(values, reduce_op="sum")
        result: NDArray[Any] = values.cpu().numpy()
        return result

    def _keep(self, file: Path, values: NDArray[Any]) -> None:
        """Writes the values in one process of each machine."""
        if self.trainer is not None and self.trainer.local_rank != 0:
            return
        with new_file(file) as partial, partial.open("wb") as handle:
            np.save(handle, values)

    def _load(self, name: str, file: Path, pairs: int) -> NDArray[Any]:
        with naming_cached(file):
            values: NDArray[Any] = np.load(file)
            if values.shape != (pairs, 2) or not np.isfinite(values).all():
                raise ValueError(f"source {name!r} needs one finite number for each answer of {pairs} pairs")
            return values


class PairRows(Dataset[Any]):
    """Makes micro-batches of pairs with their `reference`, (pairs, 2), and `step_labels`, the number of pairs of the
    whole optimizer step."""

    def __init__(self, chats: EncodedChats, reference: NDArray[Any], context_length: int) -> None:
        self.chats, self.reference, self.context_length = chats, reference, context_length

    def __getitems__(self, rows: StepRows) -> PairBatch:
        batch = pairs_of(self.chats, rows, self.context_length)
        return {**batch, "reference": reference_of(self.reference, rows), "step_labels": rows.step_labels}


class HeldOutPairs(Dataset[Any]):
    """Micro-batches of one source's held-out pairs."""

    def __init__(
        self,
        source: str,
        chats: EncodedChats,
        reference: NDArray[Any],
        batches: list[list[list[int]]],
        context_length: int,
    ) -> None:
        self.source, self.chats, self.reference, self.batches = source, chats, reference, batches
        self.context_length = context_length

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> HeldOutPairBatch:
        rows = self.batches[number]
        return {
            **pairs_of(self.chats, rows, self.context_length),
            "reference": reference_of(self.reference, rows),
            "source": self.source,
            "rows": [row[0] if row else -1 for row in rows],
            "origins": self.chats.origins_of(rows),
        }


def pairs_of(chats: EncodedChats, rows: Sequence[Sequence[int]], context_length: int) -> TokenBatch:
    """Returns input_ids and labels of pairs, (2 × pairs, places): for each pair the chosen answer, then the rejected
    answer. A row without a pair has no label."""
    answers = [[2 * row[0] + side] if row else [] for row in rows for side in (0, 1)]
    return batch_of(chats, answers, context_length, packed=False)


def reference_of(reference: NDArray[Any], rows: Sequence[Sequence[int]]) -> Tensor:
    values = torch.zeros(len(rows), 2, dtype=torch.from_numpy(reference[:0]).dtype)
    for number, row in enumerate(rows):
        if row:
            values[number] = torch.from_numpy(reference[row[0]])
    return values
