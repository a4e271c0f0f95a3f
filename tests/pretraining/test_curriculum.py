import math
from collections import Counter

import pytest

from lightning_danube.options import parse_tokens
from lightning_danube.pretraining.curriculum import Curriculum, Stage, stages_in_tokens, tokens_of_stages

STAGES = [
    Stage("first", 40_000, {"web": 90.6, "wiki": 9.4}),
    Stage("second", 25_000, {"web": 81.7, "wiki": 18.3}),
    Stage("third", 9_000, {"wiki": 48.4, "web": 51.6}),
]
ROWS = {"web": 300, "wiki": 20}


def curriculum(**changes: object) -> Curriculum:
    arguments = {"context_length": 64, "batch_samples": 16, "seed": 0, **changes}
    return Curriculum(STAGES, ROWS, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        (1024, 1024),
        ("1024", 1024),
        ("1_000", 1000),
        (1e6, 1_000_000),
        ("700k", 700_000),
        ("1.18M", 1_180_000),
        ("4.6T", 4_600_000_000_000),
    ],
)
def test_tokens_are_read_as_people_write_them(written: int | str, tokens: int) -> None:
    assert parse_tokens(written) == tokens


@pytest.mark.parametrize("written", ["", "lots", -5, 0, "-1M", "1.5X", float("nan"), float("inf"), "0.0001"])
def test_what_is_no_number_of_tokens_is_refused(written: int | str) -> None:
    with pytest.raises(ValueError, match=r"tokens of stage 'x' is .*: give tokens such as"):
        Stage("x", written, {"web": 1})


def stages(*tokens: int | str) -> list[Stage]:
    return [Stage(f"s{number}", length, {"web": 1}) for number, length in enumerate(tokens)]


def test_stages_may_be_shares_of_the_run() -> None:
    lengths = [stage.tokens for stage in stages_in_tokens(stages("60 %", "26.875 %", "13.125 %"), "1600K")]
    assert lengths == [960_000, 430_000, 210_000]  # the quickstart's
    assert [stage.tokens for stage in stages_in_tokens(stages("90 %", 500), 5000)] == [4500, 500]
    assert stages_in_tokens(STAGES, None) == STAGES == stages_in_tokens(STAGES, 74_000)
    section = {
        "stages": [{"name": "a", "tokens": "25 %", "mix": {"x": 1}}, {"name": "b", "tokens": "75 %", "mix": {"x": 1}}]
    }
    assert tokens_of_stages(section | {"tokens": "4K"}) == [1000, 3000]


@pytest.mark.parametrize(
    ("lengths", "tokens", "message"),
    [
        (
            (1000, "20 %"),
            None,
            r"data\.stages\.1\.tokens is '20 %', a share of the run: also give the tokens of the run",
        ),
        (("60 %", "30 %"), 1000, r"data\.tokens is 1000, and the stages take 90 % of it: with tokens '40 %', the last"),
        (("60 %", "50 %"), "1K", r"data\.tokens is 1K, and the stages take 110 % of it: with tokens '40 %', the last"),
        (("60 %", 500), 1000, r"take 110 % of it: with tokens 400, the last stage 's1' would end the run"),
        (("60 %", "50 %", 10), 1000, r"take 111 % of it: their shares have to add up to 100 %"),
        (
            (600, 1000),
            200,
            r"take 800 % of it: give the stages shares, such as 37\.5 % / 62\.5 %, or leave data\.tokens out",
        ),
        (("100 %",), "many", r"data\.tokens is 'many': give a positive number of tokens"),
    ],
)
def test_stages_that_are_not_the_run_are_refused(
    lengths: tuple[int | str, ...], tokens: int | str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stages_in_tokens(stages(*lengths), tokens)


def test_stages_end_with_whole_steps() -> None:
    spans = curriculum().spans
    assert [span.samples for span in spans] == [
        math.ceil(tokens / (64 * 16)) * 16 for tokens in (40_000, 25_000, 9_000)
    ]
    assert curriculum().total_steps * 16 == spans[-1].stop == curriculum().total_samples


def test_shares_of_every_stage_are_met_within_one_sample() -> None:
    run = curriculum()
    for span, stage in zip(run.spans, STAGES, strict=True):
        keys = run.samples(span.start, span.stop)
        seen = Counter(run.sources[key.source] for key in keys)
        for name, share in stage.mix.items():
            assert abs(seen[name] - span.samples * share / 100) < 1
            assert seen[name] == span.samples_by_source[name]


def test_a_pass_is_finished_before_the_next_begins_also_across_stages() -> None:
    run = curriculum()
    visits: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for key in run.samples(0, run.total_samples):
        visits[key.source].append((key.epoch, key.row))
    for source, size in enumerate(ROWS.values()):
        for begin in range(0, len(visits[source]), size):
            one_pass = visits[source][begin : begin + size]
            assert {epoch for epoch, _ in one_pass} == {begin // size}
            assert len({row for _, row in one_pass}) == len(one_pass)
    assert run.passes()["wiki"] == len(visits[1]) / 20


def test_a_sample_does_not_depend_on_where_reading_starts() -> None:
    run = curriculum()
    everything = run.samples(0, run.total_samples)
    assert [run[i] for i in range(run.total_samples)] == everything
    assert run.samples(617, 900) == everything[617:900]
    assert run.keys(617, 900).tolist() == [list(key) for key in everything[617:900]]
    assert run.samples(900, 900) == []


def test_a_longer_future_does_not_change_the_past() -> None:
    longer = Curriculum(
        [*STAGES[:2], Stage("third", 90_000, {"wiki": 1.0})], ROWS, context_length=64, batch_samples=16, seed=0
    )
    past = curriculum().spans[1].stop
    assert longer.samples(0, past) == curriculum().samples(0, past)


def test_the_papers_run_needs_no_memory_and_no_time() -> None:
    """The 4B's 6T tokens: a sample in the last stage is as cheap as the first, and the shares stay exact."""
    stages = [
        Stage("1", "4.6T", {"web": 90.6, "rest": 9.4}),
        Stage("2", "1.35T", {"web": 81.7, "rest": 18.3}),
        Stage("3", "0.05T", {"web": 51.6, "rest": 48.4}),
    ]
    run = Curriculum(stages, {"web": 10**9, "rest": 10**7}, context_length=8192, batch_samples=144, seed=0)
    assert run.total_tokens == pytest.approx(6e12, rel=1e-6)
    assert run[run.total_samples - 1].stage == 2
    for span, stage in zip(run.spans, stages, strict=True):
        assert abs(span.samples_by_source["web"] - span.samples * stage.mix["web"] / 100) < 1


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({}, "stage 's' has an empty mix"),
        ({"web": -1.0, "wiki": 2.0}, "gives source 'web' the share -1.0: shares are finite and not negative"),
        ({"web": float("nan")}, "gives source 'web' the share nan"),
        ({"web": float("inf")}, "gives source 'web' the share inf"),
        ({"web": 0.0, "wiki": 0.0}, "all shares of stage 's' are 0"),
    ],
)
def test_impossible_mixes_are_refused(mix: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage("s", 1000, mix)


def test_unknown_source_is_answered_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="stage 's' mixes the unknown source 'wikis': did you mean 'wiki'"):
        Curriculum([Stage("s", 1000, {"wikis": 1})], ROWS, context_length=64, batch_samples=1, seed=0)
    with pytest.raises(ValueError, match=r"unknown source 'xyz': data\.sources has web, wiki"):
        Curriculum([Stage("s", 1000, {"xyz": 1})], ROWS, context_length=64, batch_samples=1, seed=0)


def test_stage_lists_that_make_no_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.stages is empty"):
        Curriculum([], ROWS, context_length=64, batch_samples=1, seed=0)
    with pytest.raises(ValueError, match="two stages are called 'first'"):
        Curriculum([STAGES[0], STAGES[0]], ROWS, context_length=64, batch_samples=1, seed=0)
    # A file system would refuse the checkpoint at the end of the stage.
    with pytest.raises(ValueError, match=r"^a stage is called 'ssssssssssssssssssss'… \(300 letters\)"):
        Curriculum([Stage("s" * 300, 1000, {"web": 1})], ROWS, context_length=64, batch_samples=1, seed=0)


def orders(run: Curriculum) -> dict[tuple[str, int], list[int]]:
    """(source, pass) → rows in the order in which they are read."""
    found: dict[tuple[str, int], list[int]] = {}
    for key in run.samples(0, run.total_samples):
        found.setdefault((run.sources[key.source], key.epoch), []).append(key.row)
    return found


def test_each_pass_source_and_seed_has_an_order_of_its_own() -> None:
    stages = [Stage("only", 64 * 600, {"web": 1, "wiki": 1})]

    def run(seed: int) -> Curriculum:
        return Curriculum(stages, {"web": 100, "wiki": 100}, context_length=64, batch_samples=8, seed=seed)

    rows = [order for seed in (0, 1) for order in orders(run(seed)).values()]
    assert len(rows) == 12 and len(set(map(tuple, rows))) == 12
    assert all(sorted(order) == list(range(100)) for order in rows)


def test_passes_are_counted_up_to_the_end_of_each_stage() -> None:
    run = curriculum()
    taken = {name: 0 for name in ROWS}
    for number, span in enumerate(run.spans, start=1):
        for name, samples in span.samples_by_source.items():
            taken[name] += samples
        assert run.passes_after(number) == {name: taken[name] / rows for name, rows in ROWS.items()}
    assert run.passes() == run.passes_after(3) and run.passes_after(0) == {"web": 0.0, "wiki": 0.0}


def test_a_border_between_stages_belongs_to_the_later_one() -> None:
    run = curriculum()
    first, second, third = run.spans
    borders = (0, first.stop - 1, first.stop, second.stop - 1, second.stop, third.stop)
    assert [run.stage_index(sample) for sample in borders] == [0, 0, 1, 1, 2, 2]
    assert [run[sample].stage for sample in borders[:-1]] == [0, 0, 1, 1, 2]
    assert run.described(run[first.stop])["stage"] == "second"


def test_the_samples_of_a_run_are_the_same_in_every_version() -> None:
    """A run is resumed by a later version of this program. Both stages have ties: of shares, remainders, deadlines."""
    stages = [
        Stage("one", 64 * 8, {"a": 1, "b": 1, "c": 2}),
        Stage("two", 64 * 8, {"c": 0.25005, "b": 0.25005, "a": 0.4999}),
    ]
    run = Curriculum(stages, {"a": 5, "b": 3, "c": 4}, context_length=64, batch_samples=8, seed=7)
    assert [tuple(key) for key in run.samples(0, 16)] == [
        (0, 2, 0, 0), (0, 0, 0, 2), (0, 1, 0, 2), (0, 2, 0, 2), (0, 2, 0, 1), (0, 0, 0, 0), (0, 1, 0, 1), (0, 2, 0, 3),
        (1, 0, 0, 1), (1, 1, 0, 0), (1, 2, 1, 2), (1, 0, 0, 4), (1, 0, 0, 3), (1, 1, 1, 1), (1, 2, 1, 1), (1, 0, 1, 0),
    ]  # fmt: skip
