"""Names of levels, there and back, and what is said of wrong ones."""

import pytest

from lightning_danube.quantization.levels import FULL, Level, parse_level, parse_levels


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("gguf:Q4_K_M", Level("gguf", "Q4_K_M", embeddings=True)),
        ("gguf:Q2_K+linear+imatrix", Level("gguf", "Q2_K", imatrix=True)),
        ("gguf:F16+cache-q4_0", Level("gguf", "F16", embeddings=True, cache="q4_0")),
        ("bitsandbytes:int8", Level("bitsandbytes", "int8")),
        ("bitsandbytes:nf4+embeddings+double", Level("bitsandbytes", "nf4", embeddings=True, double=True)),
        ("hqq:3/64", Level("hqq", "3/64")),
        ("rounding:2/16+embeddings", Level("rounding", "2/16", embeddings=True)),
    ],
)
def test_a_level_is_named_as_it_is_written(text: str, level: Level) -> None:
    assert parse_level(text) == level
    assert level.name == text


def test_what_is_written_otherwise_is_the_same_level() -> None:
    assert parse_level("gguf:q4_k") == parse_level("gguf:Q4_K").__class__("gguf", "Q4_K", embeddings=True)
    assert parse_level("bitsandbytes:fp4+double+embeddings").name == "bitsandbytes:fp4+embeddings+double"
    assert parse_level("hqq:4/64").group == (4, 64)
    assert FULL.name == "full"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q4_K_M", "a level is <method>:<type>, such as gguf:Q4_K_M"),
        ("ggfu:Q4_K_M", "did you mean gguf:…"),
        ("gguf:Q4_K_N", "did you mean Q4_K_"),
        ("bitsandbytes:int4", "bitsandbytes has int8, nf4, fp4"),
        ("hqq:5/64", "bits are one of 2, 3, 4, 8"),
        ("hqq:4", "takes <bits>/<group>"),
        ("gguf:F16+cache-q3", "no option 'cache-q3' for gguf:F16, only linear, imatrix, cache-q8_0, cache-q4_0"),
        ("bitsandbytes:int8+double", "no option 'double' for bitsandbytes:int8, only embeddings"),
        ("rounding:4/64+imatrix", "no option 'imatrix'"),
        ("gguf:F16+cache-q8_0+cache-q4_0", "an option appears twice"),
        ("hqq:4/64+embeddings+embeddings", "an option appears twice"),
    ],
)
def test_a_wrong_level_is_one_line_that_helps(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"level .*") as caught:
        parse_level(text)
    assert message in str(caught.value)


def test_levels_are_some_and_different() -> None:
    with pytest.raises(ValueError, match=r"model\.levels is empty"):
        parse_levels([])
    with pytest.raises(ValueError, match=r"model\.levels has hqq:4/64 twice"):
        parse_levels(["hqq:4/64", "hqq:8/64", "hqq:4/64"])
