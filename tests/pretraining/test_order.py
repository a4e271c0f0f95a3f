import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_danube.pretraining.curriculum import Curriculum, Stage
from lightning_danube.pretraining.mixture import whole_counts
from lightning_danube.pretraining.order import OrderFacts, check_order, stream_identity
from lightning_danube.tokens.token_sequence import TokenSequence
from tests.token_files import sequence_in_memory

STAGES = [Stage("first", 40_960, {"web": 75, "wiki": 25}), Stage("second", 20_480, {"web": 50, "wiki": 50})]
ROWS = {"web": 300, "wiki": 90, "code": 70}
HALF, END = 20 * 16, 40 * 16  # samples: inside the first stage, at its end


def curriculum(stages: list[Stage], rows: dict[str, int]) -> Curriculum:
    return Curriculum(stages, rows, context_length=64, batch_samples=16, seed=0)


def facts(stages: list[Stage], rows: dict[str, int] = ROWS) -> OrderFacts:
    spans = curriculum(stages, rows).spans
    return OrderFacts(
        seed=0,
        context_length=64,
        batch_samples=16,
        stages=[
            (stage.name, span.samples, whole_counts({name: stage.mix.get(name, 0.0) for name in rows}))
            for stage, span in zip(stages, spans, strict=True)
        ],
        sources={name: {"tokens": count * 64 + 1, "digest": f"{name}{count}"} for name, count in rows.items()},
    )


def test_nothing_changed_is_accepted() -> None:
    check_order(facts(STAGES), facts(STAGES), HALF)


@pytest.mark.parametrize(
    ("stages", "rows", "done"),
    [
        ([STAGES[0]], ROWS, HALF),  # the future is gone
        ([STAGES[0], Stage("other", 99_000, {"code": 1})], ROWS, END),  # another future, right at the boundary
        ([Stage("first", 81_920, {"web": 75, "wiki": 25}), STAGES[1]], ROWS, HALF),  # the present stage is longer
        ([Stage("first", HALF * 64, {"web": 75, "wiki": 25}), STAGES[1]], ROWS, HALF),  # it ends right here
        ([Stage("first", 40_960, {"web": 0.75, "wiki": 0.25, "code": 0}), STAGES[1]], ROWS, HALF),  # the same shares
        ([*STAGES, Stage("third", 10_240, {"new": 1})], {"new": 50, **ROWS}, END + 16),  # a source that joins
        (STAGES, {"web": 300, "wiki": 90}, END + 16),  # one that nothing was drawn from leaves
        (STAGES, {**ROWS, "code": 71}, END + 16),  # or changes
        ([Stage("anything", 5_000, {"code": 1})], {"code": 5}, 0),  # nothing has begun
    ],
)
def test_what_lies_ahead_may_change_and_the_past_stays(stages: list[Stage], rows: dict[str, int], done: int) -> None:
    check_order(facts(STAGES), facts(stages, rows), done)
    before, after = curriculum(STAGES, ROWS), curriculum(stages, rows)

    def past(run: Curriculum) -> list[tuple[int, str, int, int]]:
        return [(key.stage, run.sources[key.source], key.epoch, key.row) for key in run.samples(0, done)]

    assert past(before) == past(after)


@pytest.mark.parametrize(
    ("changed", "done", "message"),
    [
        (replace(facts(STAGES), seed=1), HALF, "data.seed is 1, the run began with 0: set it back"),
        (replace(facts(STAGES), context_length=32), HALF, "data.context_length is 32, the run began with 64"),
        (replace(facts(STAGES), batch_samples=8), HALF, "data.batch_tokens is 512, the run began with 1024"),
        (
            facts([Stage("renamed", 40_960, {"web": 75, "wiki": 25}), STAGES[1]]),
            HALF,
            "stage 'first' (number 1) has begun, the config has 'renamed' there: put it back",
        ),
        (facts([STAGES[0]]), END + 16, "stage 'second' (number 2) has begun, the config ends after 1"),
        (
            facts([Stage("first", 40_960, {"web": 74, "wiki": 26}), STAGES[1]]),
            16,
            "stage 'first' (number 1) has begun with the mix {'web': 3, 'wiki': 1}, the config has "
            "{'web': 37, 'wiki': 13}",
        ),
        (
            facts([Stage("first", 81_920, {"web": 75, "wiki": 25}), STAGES[1]]),
            END,
            "stage 'first' (number 1) is over, after 40,960 tokens, the config gives it 81,920",
        ),
        (
            facts([Stage("first", 10_240, {"web": 75, "wiki": 25}), STAGES[1]]),
            HALF,
            "would end 10,240 tokens before the point where the run resumes: give it at least 20,480 tokens",
        ),
        (
            facts(STAGES, {**ROWS, "wiki": 91}),
            HALF,
            "'wiki' now holds 5,825 tokens (wiki91), the run has read from 5,761 (wiki90)",
        ),
        (facts(STAGES, {"wiki": 90, "web": 300}), HALF, "keep web, wiki in this order"),
        (
            replace(facts(STAGES), sources={"web": facts(STAGES).sources["web"]}),
            HALF,
            "'wiki' has been read and is gone",
        ),
    ],
)
def test_a_changed_past_is_refused_with_its_key(changed: OrderFacts, done: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_order(facts(STAGES), changed, done)
    assert "or begin a new run without --ckpt_path" in str(caught.value)


def stream(*segments: Any) -> TokenSequence:
    return sequence_in_memory(segments, 977)


def test_a_source_is_told_by_its_tokens_not_by_its_files() -> None:
    tokens = np.arange(500_000, dtype=np.uint16) % 977
    whole = stream(tokens)
    parts = stream(tokens[:1000], tokens[1000:])
    assert stream_identity(whole) == stream_identity(parts)
    changed = np.roll(tokens, 1)
    assert stream_identity(stream(changed)) != stream_identity(whole)
    assert stream_identity(stream(tokens[:-1])) != stream_identity(whole)
    short = stream(tokens[:5])
    assert stream_identity(short)["tokens"] == 5


@pytest.mark.parametrize("size", [5, 1024, 1025, 3000, 255 * 1024 + 3, 500_000])
def test_a_changed_first_or_last_token_is_another_source(size: int) -> None:
    tokens = np.arange(size, dtype=np.uint16) % 977
    before = stream_identity(stream(tokens))
    for place in (0, -1):
        changed = tokens.copy()
        changed[place] += 1
        after = stream_identity(stream(changed))
        assert after["tokens"] == before["tokens"] and after["digest"] != before["digest"], place
    # 16 and 32 bits hold the same tokens.
    assert stream_identity(stream(tokens.astype(np.uint32))) == before


def test_a_changed_last_token_of_a_source_is_refused() -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    changed = tokens.copy()
    changed[-1] = 0
    saved, now = (
        replace(facts(STAGES), sources={**facts(STAGES).sources, "web": stream_identity(stream(one))})
        for one in (tokens, changed)
    )
    check_order(saved, saved, HALF)
    with pytest.raises(ValueError, match=r"data\.sources: 'web' now holds 5,000 tokens"):
        check_order(saved, now, HALF)
