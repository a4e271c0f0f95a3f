"""Options as users write them in YAML, on the command line and in Python."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from lightning.fabric.connector import _convert_precision_to_unified_args

from lightning_danube.options import (
    FULL_NAMES,
    PRECISIONS,
    TokensOrShare,
    check_processes,
    full_name,
    options,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        (1, 1),
        ("2.01K", 2010),
        ("4.1K", 4100),
        ("1.005M", 1_005_000),
        ("2.36B", 2_360_000_000),
        ("2.8T", 2_800_000_000_000),
        ("1.5 m", 1_500_000),
        ("1e6", 1_000_000),
        (2.6, 3),
    ],
)
def test_numbers_of_tokens_are_rounded_and_have_decimal_units(written: int | float | str, tokens: int) -> None:
    found = parse_tokens(written)
    assert found == tokens and isinstance(found, int)


@pytest.mark.parametrize("written", [0.4, 0.99, "0.9", "1KB", "1,000", "K", None, True])
def test_less_than_a_token_and_other_text_are_refused(written: Any) -> None:
    with pytest.raises(ValueError, match=r"^limit is .*: give a positive number of tokens"):
        parse_tokens(written, "limit")


@pytest.mark.parametrize("written", [10**30, "1000.1T", "1e400", "9" * 4000])
def test_tokens_that_no_index_can_count_are_refused(written: Any) -> None:
    for read in (parse_tokens, TokensOrShare.parse):
        with pytest.raises(ValueError, match=r"^limit is [^\n]*: (count again|give )"):
            read(written, "limit")
    assert parse_tokens("1000T") == 10**15


@pytest.mark.parametrize(
    ("written", "total", "tokens"),
    [
        ("5 %", 1000, 50),
        ("5%", 1000, 50),
        ("0.5 %", 1000, 5),
        ("33.3 %", 1000, 333),
        ("26.66 %", 100, 27),
        ("100 %", 7, 7),
        ("26.875 %", 1_600_000, 430_000),
        ("0.1 %", 100, 0),
        ("2.5K", 7, 2500),
        (700, 7, 700),
    ],
)
def test_a_part_of_a_run_is_tokens_or_a_share(written: int | str, total: int, tokens: int) -> None:
    assert TokensOrShare.parse(written, "part").of(total) == tokens


def test_a_part_of_a_run_is_whole_steps_and_at_least_one() -> None:
    assert [TokensOrShare.parse(part, "part").steps(1000, 100) for part in ("5 %", "10 %", "10.1 %", 150)] == [
        1,
        1,
        2,
        2,
    ]
    assert TokensOrShare.parse("0.01 %", "part").steps(1000, 100) == 1


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("100.1 %", "part is '100.1 %', more than the whole run: give at most '100 %'"),
        ("0 %", "part is '0 %': give a share above 0, such as '5 %'"),
        ("-5 %", "part is '-5 %': give tokens such as 1048576, 700K, 1.15T, or a share of the run such as '5 %'"),
        (0.025, "part is 0.025: give .* or a share of the run such as '2.5 %'"),
        (0, "part is 0: give tokens"),
        ("5 % 5", "part is '5 % 5': give tokens"),
        ("nan %", "part is 'nan %': give tokens"),
    ],
)
def test_what_is_neither_tokens_nor_a_share_is_refused(written: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TokensOrShare.parse(written, "part")


def test_only_some_parts_of_a_run_may_be_nothing() -> None:
    assert [TokensOrShare.parse(none, "part", zero=True).of(10) for none in (0, "0", "0 %", "0.0 %")] == [0] * 4


@dataclass(frozen=True)
class Part:
    size: int
    names: list[str] = field(default_factory=list)
    share: float = 0.5
    whole: bool = field(default=True, init=False)


def test_options_are_a_dataclass_a_mapping_or_the_first_option() -> None:
    part = Part(3)
    assert options(Part, part, "data.part") is part
    assert options(Part, {"size": 3, "share": 0.1}, "data.part") == Part(3, share=0.1)
    assert options(Part, "3", "data.part") == Part("3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "data.part has no size: the options are size, names, share"),
        ({"share": 1}, "data.part has no size"),
        ({"size": 1, "nmes": []}, "data.part has the option 'nmes': did you mean 'names'?"),
        ({"size": 1, "xyzzy": 0}, "data.part has the option 'xyzzy': the options are size, names, share"),
        ({"size": 1, "whole": False}, "data.part has the option 'whole'"),
        (3, "data.part is 3: give a mapping with the options size, names, share"),
    ],
)
def test_a_wrong_option_is_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        options(Part, given, "data.part")


@pytest.mark.filterwarnings("ignore:.* is supported for historical reasons")
@pytest.mark.parametrize("precision", [*PRECISIONS, 16, 32, 64])
def test_precisions_have_lightnings_full_names(precision: Any) -> None:
    if precision == "null":
        return
    assert full_name(precision) == _convert_precision_to_unified_args(precision)
    assert full_name(full_name(precision)) == full_name(precision)
    assert str(precision) not in FULL_NAMES or full_name(precision) in PRECISIONS


def test_more_processes_than_the_cores_can_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, most in ((2, 64), (64, 256), (None, 64)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        for number in (0, 1, most):
            check_processes(number, "data.workers")
        for number in (-1, most + 1, 10**30):
            shown = rf"^data.workers is {number}: give 0 to {most}, as this machine has {cores or 1} cores$"
            with pytest.raises(ValueError, match=shown):
                check_processes(number, "data.workers")
    with pytest.raises(ValueError, match=r"^data.processes is 0: give 1 to 64"):
        check_processes(0, "data.processes", least=1)
