"""The stages of a pre-training run, and the sample at each position of the run.

The paper trains in three stages whose share of web text falls from 90.6 to 81.7 to 51.6 % (arXiv 2407.09276). Here a
run is a list of `Stage`s, and `Curriculum` computes (stage, source, epoch, row) from the number of a sample. The state
of the training data is therefore one integer: the number of samples that the optimizer has consumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lightning_danube.options import Length, TokensOrShare, parse_tokens, written_share
from lightning_danube.pretraining.mixture import Mixture
from lightning_danube.terminal import name_meant
from lightning_danube.training.passes import IntArray, permute


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Args:
        name: name of the stage in logs, checkpoints and tables.
        tokens: length of the stage, as an integer or like "2.8T", or as a share of the run like "60 %"; rounded up to
            whole global batches.
        mix: source → share of the stage's samples, in any unit (percent here).
    """

    name: str
    tokens: Length
    mix: dict[str, float]

    def __post_init__(self) -> None:
        if not self.part.is_share:
            object.__setattr__(self, "tokens", self.part.of(0))
        if not self.mix:
            raise ValueError(f"stage {self.name!r} has an empty mix: name at least one source with its share")
        for source, share in self.mix.items():
            if not math.isfinite(share) or share < 0:
                raise ValueError(
                    f"stage {self.name!r} gives source {source!r} the share {share}: shares are finite and not negative"
                )
        if not 0 < (total := sum(self.mix.values())) < math.inf:
            wrong = "too large: give percentages" if total else "0: at least one source needs a positive share"
            raise ValueError(f"all shares of stage {self.name!r} are {wrong}")

    @cached_property
    def part(self) -> TokensOrShare:
        """The length of the stage as a part of the run."""
        return TokensOrShare.parse(self.tokens, f"tokens of stage {self.name!r}")


class SampleKey(NamedTuple):
    """Address of one training sample: indices of stage and source, the epoch over the source, the row of the source."""

    stage: int
    source: int
    epoch: int
    row: int


@dataclass(frozen=True)
class StageSpan:
    """The samples [start, stop) of a stage in the run, and their number from each source."""

    name: str
    start: int
    stop: int
    samples_by_source: dict[str, int]

    @property
    def samples(self) -> int:
        return self.stop - self.start


class Curriculum:
    """The whole run as a function of the sample's number.

    Args:
        stages: the stages, in order.
        source_rows: source → rows (windows of `context_length` tokens) in one epoch over the source. The order numbers
            the sources.
        context_length: tokens per sample.
        batch_samples: samples of one optimizer step over all ranks; every stage ends with a whole step.
        seed: seed of the shuffling.

    Raises:
        ValueError: there is no stage, two stages have one name, a mix names an unknown source, or a share is too small.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        source_rows: Mapping[str, int],
        *,
        context_length: int,
        batch_samples: int,
        seed: int,
    ) -> None:
        check_stages(stages, list(source_rows))
        self.stages = tuple(stages)
        self.source_rows = dict(source_rows)
        self.sources = tuple(source_rows)
        self.context_length = context_length
        self.batch_samples = batch_samples
        self.seed = seed

        self._mixtures = [Mixture({name: stage.mix.get(name, 0.0) for name in self.sources}) for stage in stages]
        lengths = [stage_samples(stage, context_length, batch_samples) for stage in stages]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # _taken[k, s]: samples of source s consumed by the stages before stage k; an epoch continues across stages.
        taken = [np.zeros(len(self.sources), dtype=np.int64)]
        for mixture, length in zip(self._mixtures, lengths, strict=True):
            taken.append(taken[-1] + mixture.taken_before(np.array([length]))[0])
        self._taken = np.stack(taken)
        self._rows = np.array([source_rows[name] for name in self.sources], dtype=np.int64)

    @property
    def total_samples(self) -> int:
        return int(self._starts[-1])

    @property
    def total_tokens(self) -> int:
        return self.total_samples * self.context_length

    @property
    def total_steps(self) -> int:
        return self.total_samples // self.batch_samples

    @property
    def spans(self) -> list[StageSpan]:
        taken = np.diff(self._taken, axis=0)
        return [
            StageSpan(
                stage.name,
                int(self._starts[k]),
                int(self._starts[k + 1]),
                {name: int(taken[k, s]) for s, name in enumerate(self.sources)},
            )
            for k, stage in enumerate(self.stages)
        ]

    def stage_index(self, sample: int) -> int:
        """Returns the number of the stage that contains `sample`; the last stage for the end of the run."""
        assert 0 <= sample <= self.total_samples
        return min(int(np.searchsorted(self._starts, sample, side="right")) - 1, len(self.stages) - 1)

    def passes(self) -> dict[str, float]:
        """Returns the number of epochs of the whole run over each source."""
        return self.passes_after(len(self.stages))

    def passes_after(self, stages: int) -> dict[str, float]:
        """Returns the number of epochs over each source after the first `stages` stages."""
        return {name: float(self._taken[stages, s] / self._rows[s]) for s, name in enumerate(self.sources)}

    def samples(self, start: int, stop: int) -> list[SampleKey]:
        """Returns the keys of the samples [start, stop). The cost does not depend on `start`."""
        return list(map(SampleKey._make, self.keys(start, stop).tolist()))

    def described(self, key: SampleKey) -> dict[str, str | int]:
        """Returns a sample's address with the names of its stage and source."""
        stage, source = self.stages[key.stage].name, self.sources[key.source]
        return {"stage": stage, "source": source, "epoch": key.epoch, "row": key.row}

    def __getitem__(self, sample: int) -> SampleKey:
        return self.samples(sample, sample + 1)[0]

    def keys(self, start: int, stop: int) -> IntArray:
        """Returns the keys of the samples [start, stop) as an array, (samples, 4), in the order of `SampleKey`."""
        assert 0 <= start <= stop <= self.total_samples
        keys = np.empty((stop - start, len(SampleKey._fields)), dtype=np.int64)
        at = start
        while at < stop:
            k = self.stage_index(at)
            end = min(stop, int(self._starts[k + 1]))
            self._stage_keys(k, np.arange(at, end) - self._starts[k], keys[at - start : end - start])
            at = end
        return keys

    def _stage_keys(self, k: int, positions: IntArray, keys: IntArray) -> None:
        """Writes the keys at positions of one stage into `keys`, (positions, 4)."""
        mixture = self._mixtures[k]
        sources = mixture.sources_at(positions)
        here = np.arange(len(positions))
        ordinals = (self._taken[k] + mixture.taken_before(positions))[here, sources]
        epochs, places = np.divmod(ordinals, self._rows[sources])
        keys[:, 0], keys[:, 1], keys[:, 2] = k, sources, epochs
        for source, epoch in set(zip(sources.tolist(), epochs.tolist(), strict=True)):
            chosen = (sources == source) & (epochs == epoch)
            keys[chosen, 3] = permute(
                places[chosen], int(self._rows[source]), seed=self.seed, stream=self.sources[source], epoch=epoch
            )


def stages_in_tokens(stages: Sequence[Stage], tokens: Length | None) -> list[Stage]:
    """Returns the stages with their lengths in tokens.

    Args:
        stages: lengths in tokens, or in shares of the run.
        tokens: tokens of the whole run, `data.tokens`; None if every stage has its length in tokens.

    Raises:
        ValueError: a stage has a share and the length of the run is not known, or the stages do not add up to the run.
    """
    if tokens is None:
        for number, stage in enumerate(stages):
            if stage.part.is_share:
                raise ValueError(
                    f"data.stages.{number}.tokens is {stage.tokens!r}, a share of the run: also give the tokens of the "
                    "run, such as --data.init_args.tokens 10M"
                )
        return list(stages)
    total = parse_tokens(tokens, "data.tokens")
    together = _amount(stages, total)
    if together != total:
        taken = written_share(together / total)
        raise ValueError(f"data.tokens is {tokens}, and the stages take {taken} of it: {_way_out(stages, total)}")
    return [replace(stage, tokens=stage.part.of(total)) for stage in stages]


def _amount(stages: Sequence[Stage], total: int) -> Fraction:
    """Returns the tokens of some stages before they are rounded."""
    return sum((stage.part.amount * (total if stage.part.is_share else 1) for stage in stages), Fraction(0))


def _way_out(stages: Sequence[Stage], total: int) -> str:
    """Returns how to make the stages add up to the run."""
    *others, last = stages
    if not any(stage.part.is_share for stage in stages):
        whole = sum(stage.part.amount for stage in stages)
        shares = " / ".join(written_share(stage.part.amount / whole) for stage in stages)
        return f"give the stages shares, such as {shares}, or leave data.tokens out"
    left = total - _amount(others, total)
    if left <= 0:
        return "their shares have to add up to 100 %"
    written = f"'{written_share(left / total)}'" if last.part.is_share else f"{int(left)}"
    return f"with tokens {written}, the last stage {last.name!r} would end the run"


def tokens_of_stages(data: Mapping[str, Any]) -> list[int]:
    """Returns the tokens of each stage of a configuration's options of `CurriculumData`."""
    stages = stages_in_tokens([Stage(**stage) for stage in data["stages"]], data.get("tokens"))
    return [int(stage.tokens) for stage in stages]


def stage_samples(stage: Stage, context_length: int, batch_samples: int) -> int:
    """Returns the samples of a stage: its tokens rounded up to whole optimizer steps."""
    batch_tokens = context_length * batch_samples
    return -(-int(stage.tokens) // batch_tokens) * batch_samples


LONGEST_NAME = 100
"""Bytes of the name of a stage or a source. File systems allow 255, for the whole name of a file."""


def check_stages(stages: Sequence[Stage], sources: Sequence[str]) -> None:
    """Checks the stages as far as possible before a source is opened.

    Raises:
        ValueError: there is no stage, two stages have one name, a name is too long, or a mix names an unknown source.
    """
    if not stages:
        raise ValueError("data.stages is empty: a run needs at least one stage")
    names = [stage.name for stage in stages]
    for name in names:
        if len(str(name).encode("utf-8", "replace")) > LONGEST_NAME:  # of a file: found when the stage ends otherwise
            raise ValueError(
                f"a stage is called {str(name)[:20]!r}… ({len(str(name))} letters): its checkpoint has the name of the "
                f"stage, so give at most {LONGEST_NAME} letters"
            )
        if names.count(name) > 1:
            raise ValueError(f"two stages are called {name!r}: every stage needs another name")
    for stage in stages:
        for name in stage.mix:
            if name not in sources:
                hint = name_meant(name, sources, "data.sources has")
                raise ValueError(f"stage {stage.name!r} mixes the unknown source {name!r}: {hint}")
