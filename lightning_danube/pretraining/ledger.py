"""Counts which samples a run has trained on, by stage and source.

Shapes: K stages, S sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_danube.pretraining.curriculum import Curriculum, SampleKey


class SampleLedger:
    """The samples that a run has trained on, over all replicas.

    Args:
        curriculum: gives the names of the stages and the sources.
        sum_over_ranks: sums a tensor over all ranks, in place; every rank must call it.
    """

    def __init__(self, curriculum: Curriculum, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.stages, self.sources = [stage.name for stage in curriculum.stages], list(curriculum.sources)
        self.context_length = curriculum.context_length
        self._sum_over_ranks = sum_over_ranks
        self._samples_KS = torch.zeros(len(self.stages), len(self.sources), dtype=torch.int64)
        """Samples of all replicas up to the last synchronisation."""
        self._since_KS = torch.zeros_like(self._samples_KS)
        """Samples of this replica since the last synchronisation."""
        self._logged_S = torch.zeros(len(self.sources), dtype=torch.int64)

    def add(self, keys: Iterable[SampleKey]) -> None:
        """Counts the samples of a batch of this replica."""
        for key in keys:
            self._since_KS[key.stage, key.source] += 1

    def samples(self) -> Tensor:
        """Returns the samples seen over all replicas, (K, S). A collective call: every rank must make it."""
        self._samples_KS += self._sum_over_ranks(self._since_KS).cpu()
        self._since_KS.zero_()
        return self._samples_KS

    def tokens_by_source(self) -> list[dict[str, int]]:
        """Returns source → tokens seen, for each stage. A collective call."""
        return [
            {name: int(n) * self.context_length for name, n in zip(self.sources, row, strict=True)}
            for row in self.samples().tolist()
        ]

    def values_to_log(self) -> dict[str, float]:
        """Returns by source the share of tokens since the last call, and all tokens seen. A collective call."""
        seen_S = self.samples().sum(0)
        since_S, self._logged_S = seen_S - self._logged_S, seen_S
        values = {f"mix/{name}": float(n / since_S.sum()) for name, n in zip(self.sources, since_S, strict=True)}
        seen = {
            f"tokens_seen/{name}": float(n * self.context_length) for name, n in zip(self.sources, seen_S, strict=True)
        }
        return values | seen

    def state(self) -> dict[str, Any]:
        """Returns the state that a checkpoint keeps under "token_ledger". A collective call.

        stages, sources: names (K,) and (S,); samples: counts (K, S); context_length: tokens of a sample; logged: source
        → samples at the last logged step.
        """
        return {
            "stages": self.stages,
            "sources": self.sources,
            "samples": self.samples().clone(),
            "context_length": self.context_length,
            "logged": dict(zip(self.sources, self._logged_S.tolist(), strict=True)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint, by name.

        A changed config may add stages, and sources that only the new stages use.

        Raises:
            ValueError: the config lacks a stage or source for which the checkpoint has samples.
        """
        self._since_KS.zero_()
        self._samples_KS.zero_()
        self._logged_S = torch.tensor([state["logged"].get(name, 0) for name in self.sources])
        for k, s in state["samples"].nonzero().tolist():
            stage, source = state["stages"][k], state["sources"][s]
            if stage not in self.stages or source not in self.sources:
                raise ValueError(
                    f"the checkpoint counted tokens of source {source!r} in stage {stage!r}, the config has the stages "
                    f"{self.stages} and the sources {self.sources}: what has begun keeps its name"
                )
            self._samples_KS[self.stages.index(stage), self.sources.index(source)] = state["samples"][k, s]
