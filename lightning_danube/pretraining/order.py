"""Checks that a resumed run changes its data only after the point where it resumes.

The data module keeps `OrderFacts` in each checkpoint, so the check needs neither the old config nor the old machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from lightning_danube.tokens.token_sequence import TokenSequence

_WINDOWS, _WINDOW = 256, 1024
_WAY_OUT = "or begin a new run without --ckpt_path"


@dataclass(frozen=True)
class OrderFacts:
    """All facts that decide which tokens are at each position of a run.

    Args:
        stages: name, samples, and samples of each source in a block of the mixture.
        sources: source → `stream_identity` of its tokens, in the order of the source numbers.
    """

    seed: int
    context_length: int
    batch_samples: int
    stages: list[tuple[str, int, dict[str, int]]]
    sources: dict[str, dict[str, Any]]


def stream_identity(stream: TokenSequence) -> dict[str, Any]:
    """Returns the number of tokens and a digest, which identify a source by content, also on another machine.

    The digest reads windows spread over the whole stream, because the stream can have terabytes.
    """
    digest = hashlib.sha256()
    last = max(0, len(stream) - _WINDOW)
    for start in sorted({last * k // (_WINDOWS - 1) for k in range(_WINDOWS)}):
        digest.update(stream.read(start, min(start + _WINDOW, len(stream))).astype("<u4").tobytes())
    return {"tokens": len(stream), "digest": digest.hexdigest()[:16]}


def check_order(saved: OrderFacts, now: OrderFacts, samples_done: int) -> None:
    """Checks that the samples before `samples_done` are equal with the saved and the current facts.

    Raises:
        ValueError: the samples differ; the message names the config key and the remedy.
    """
    _same("data.seed", saved.seed, now.seed)
    _same("data.context_length", saved.context_length, now.context_length)
    _same("data.batch_tokens", saved.batch_samples * saved.context_length, now.batch_samples * now.context_length)
    drawn: set[str] = set()
    start = 0
    for k, (name, samples, mix) in enumerate(saved.stages):
        if start >= samples_done:
            break
        drawn |= {source for source, count in mix.items() if count}
        here = f"stage {name!r} (number {k + 1})"
        if k >= len(now.stages) or now.stages[k][0] != name:
            found = f"has {now.stages[k][0]!r} there" if k < len(now.stages) else f"ends after {len(now.stages)}"
            raise ValueError(f"data.stages: {here} has begun, the config {found}: put it back, {_WAY_OUT}")
        _, length, new_mix = now.stages[k]
        if _without_zeros(new_mix) != _without_zeros(mix):
            raise ValueError(
                f"data.stages: {here} has begun with the mix {_without_zeros(mix)}, the config has "
                f"{_without_zeros(new_mix)}: put it back, and change the mix in a new stage after it, {_WAY_OUT}"
            )
        over = start + samples <= samples_done
        if over and length != samples:
            raise ValueError(
                f"data.stages: {here} is over, after {samples * saved.context_length:,} tokens, the config gives it "
                f"{length * now.context_length:,}: put its length back, and add tokens in a new stage after it, "
                f"{_WAY_OUT}"
            )
        if not over and start + length < samples_done:
            raise ValueError(
                f"data.stages: {here} would end {(samples_done - start - length) * now.context_length:,} tokens before "
                f"the point where the run resumes: give it at least {(samples_done - start) * now.context_length:,} "
                f"tokens, {_WAY_OUT}"
            )
        start += samples
    kept = [name for name in saved.sources if name in drawn]
    for name in kept:
        if name not in now.sources:
            raise ValueError(f"data.sources: {name!r} has been read and is gone: put it back, {_WAY_OUT}")
        _same_source(name, saved.sources[name], now.sources[name])
    if kept != [name for name in now.sources if name in drawn]:
        raise ValueError(
            f"data.sources: the order of the sources decides the order of samples: keep {', '.join(kept)} in this "
            f"order, {_WAY_OUT}"
        )


def _same(key: str, saved: Any, now: Any) -> None:
    if saved != now:
        raise ValueError(f"{key} is {now}, the run began with {saved}: set it back, {_WAY_OUT}")


def _same_source(name: str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if saved != now:
        raise ValueError(
            f"data.sources: {name!r} now holds {now['tokens']:,} tokens ({now['digest']}), the run has read from "
            f"{saved['tokens']:,} ({saved['digest']}): bring back its files (of the embedded documentation: the "
            f"versions of Python and of the packages), tokenizer and data.held_out, {_WAY_OUT}"
        )


def _without_zeros(mix: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in sorted(mix.items()) if count}
