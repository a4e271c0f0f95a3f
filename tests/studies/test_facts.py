"""Facts of variants that have to be equal, read from their configurations before anything runs."""

from typing import Any

import pytest

from lightning_danube.studies.design import Design
from lightning_danube.studies.facts import Facts, check_equal, facts_of


def facts(parameters: int | None = 1000, tokens: int = 500, **by_source: float) -> Facts:
    return {"parameters": parameters, "tokens": tokens, "tokens_by_source": by_source or None}


def check(equal: dict[str, float], **variants: Facts) -> None:
    check_equal(Design("heads", "base", "loss", equal=equal), variants)


def test_facts_may_differ_by_the_tolerance_and_no_more() -> None:
    check({"parameters": 0.01}, a=facts(1000), b=facts(990), c=facts(995))
    with pytest.raises(ValueError, match=r"equal\.parameters: parameters differ by 1\.10%, more than 1\.00%"):
        check({"parameters": 0.01}, a=facts(1000), b=facts(995), c=facts(989))
    check({"tokens": 0}, a=facts(tokens=500), b=facts(tokens=500))
    with pytest.raises(ValueError, match=r"tokens differ by 0\.20%, more than 0\.00% \(a 500, b 499\)"):
        check({"tokens": 0}, a=facts(tokens=500), b=facts(tokens=499))


def test_facts_that_need_not_be_equal_may_differ() -> None:
    check({"tokens": 0}, a=facts(1000), b=facts(2000))


def test_each_source_is_compared_and_a_missing_one_has_no_tokens() -> None:
    check({"tokens_by_source": 0}, a=facts(web=300.0, wiki=200.0), b=facts(wiki=200.0, web=300.0))
    with pytest.raises(ValueError, match=r"tokens of wiki differ by 5\.00%"):
        check({"tokens_by_source": 0.01}, a=facts(web=300.0, wiki=200.0), b=facts(web=300.0, wiki=190.0))
    with pytest.raises(ValueError, match=r"tokens of code differ by 100\.00%"):
        check({"tokens_by_source": 0.01}, a=facts(web=300.0), b=facts(web=300.0, code=9.0))


def test_a_fact_that_a_variant_does_not_state_is_named() -> None:
    with pytest.raises(ValueError, match=r"equal\.parameters: the config of b does not say: leave it out"):
        check({"parameters": 0}, a=facts(1000), b=facts(None))


def test_stages_end_at_whole_steps_and_shares_have_any_unit() -> None:
    stages: list[dict[str, Any]] = [
        {"name": "one", "tokens": 100, "mix": {"web": 3, "wiki": 1}},
        {"name": "two", "tokens": "0.1K", "mix": {"wiki": 0.5}},
    ]
    data = {"stages": stages, "context_length": 8, "batch_tokens": 64, "sources": {"web": {}, "wiki": {}}}
    found = facts_of({"data": {"init_args": data}, "model": {"init_args": {"decoder": "danube3-500m"}}})
    # Each stage is rounded up to two steps of 64 tokens.
    assert found == {"parameters": 513_590_784, "tokens": 256, "tokens_by_source": {"web": 96.0, "wiki": 160.0}}
