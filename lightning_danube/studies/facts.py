"""Reads facts from each variant's config before anything runs, to check that what should be equal is equal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_danube.studies.design import Design, Overrides
from lightning_danube.terminal import text_table

Facts = dict[str, Any]
"""parameters and tokens as numbers, tokens_by_source by name; None where a config does not say."""


Resolver = Callable[[Sequence[str]], Mapping[str, Any]]
"""Returns the whole configuration that the options of a trainer's verb stand for, and raises a ValueError if they are
refused."""


def command_of(design: Design, values: Overrides, seed: int, *more: str) -> list[str]:
    """Returns the command line for one run of a variant, or of a search's setting, with one seed."""
    return [sys.executable, "-m", "lightning_danube", design.verb, *override_options(design, values, seed), *more]


def override_options(design: Design, values: Overrides, seed: int) -> list[str]:
    """Returns the options of a run: its configuration and the overrides of its variant."""
    options = ["--config", design.base]
    for key, value in design.overrides(values, seed).items():
        options += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return options


def check_variants(design: Design, resolve: Resolver) -> dict[str, Facts]:
    """Parses each variant's config, and returns variant → facts.

    Raises:
        ValueError: a variant's config is refused, or facts that should be equal differ.
    """
    facts = {
        variant: facts_of(_resolved(design, f"variant {variant}", values, resolve))
        for variant, values in design.variants.items()
    }
    check_equal(design, facts)
    return facts


def check_search(design: Design, resolve: Resolver) -> None:
    """Parses the config of a search with each value of its lists and each end of its ranges, not with all combinations.

    Raises:
        ValueError: a config is refused.
    """
    choices = {
        key: among if isinstance(among, list) else [among["low"], among["high"]] for key, among in design.search.items()
    }
    first = {key: values[0] for key, values in choices.items()}
    _resolved(design, "the first setting", first, resolve)
    for key, values in choices.items():
        for value in values[1:]:
            _resolved(design, f"the setting {key}={value}", {**first, key: value}, resolve)


def _resolved(design: Design, what: str, values: Overrides, resolve: Resolver) -> Mapping[str, Any]:
    try:
        return resolve(override_options(design, values, design.seeds[0]))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def check_equal(design: Design, facts: Mapping[str, Facts]) -> None:
    """Checks the facts that the study requires to be equal.

    Raises:
        ValueError: such a fact differs between variants.
    """
    for fact, tolerance in design.equal.items():
        _check_equal(fact, tolerance, {variant: one[fact] for variant, one in facts.items()})


def facts_of(config: Mapping[str, Any]) -> Facts:
    data = config["data"].get("init_args") or {}
    model = config["model"].get("init_args") or {}
    tokens = by_source = None
    if data.get("stages"):
        from lightning_danube.options import parse_tokens
        from lightning_danube.pretraining.curriculum import Stage, stage_samples, stages_in_tokens

        stages = stages_in_tokens([Stage(**stage) for stage in data["stages"]], data.get("tokens"))
        length = data["context_length"]
        batch = parse_tokens(data["batch_tokens"]) // length
        lengths = [length * stage_samples(stage, length, batch) for stage in stages]
        tokens = sum(lengths)
        by_source = dict.fromkeys(data["sources"], 0.0)
        for stage, count in zip(stages, lengths, strict=True):
            for source, share in stage.mix.items():
                by_source[source] += count * share / sum(stage.mix.values())
    return {"parameters": _parameters(model, data), "tokens": tokens, "tokens_by_source": by_source}


def _parameters(model: Mapping[str, Any], data: Mapping[str, Any]) -> int | None:
    shape = model.get("decoder")
    if shape is None:
        return None
    from lightning_danube.model import PRESETS, DecoderConfig
    from lightning_danube.weights.tokenizers import tokenizer_of

    if isinstance(shape, str):
        return PRESETS[shape].parameters
    _, tokenizer = tokenizer_of(data["tokenizer"])
    given = {key: value for key, value in shape.items() if value is not None}
    return DecoderConfig(**{**given, "vocab_size": len(tokenizer)}).parameters


def _check_equal(fact: str, tolerance: float, values: Mapping[str, Any]) -> None:
    unknown = [variant for variant, value in values.items() if value is None]
    if unknown:
        raise ValueError(f"equal.{fact}: the config of {', '.join(unknown)} does not say: leave it out")
    rows: dict[str, Mapping[str, float]] = {fact: values}
    if fact == "tokens_by_source":
        sources = dict.fromkeys(source for one in values.values() for source in one)
        rows = {
            f"tokens of {source}": {variant: one.get(source, 0.0) for variant, one in values.items()}
            for source in sources
        }
    for what, by_variant in rows.items():
        least, most = min(by_variant.values()), max(by_variant.values())
        if most - least > tolerance * max(most, 1):
            shown = ", ".join(f"{variant} {value:,.0f}" for variant, value in by_variant.items())
            raise ValueError(
                f"equal.{fact}: {what} differ by {(most - least) / most:.2%}, more than {tolerance:.2%} ({shown}): "
                "change the variants, or say that they may"
            )


def facts_table(facts: Mapping[str, Facts]) -> str:
    """Returns a table of the known facts of each variant. `check_equal` runs before."""
    sources = dict.fromkeys(source for one in facts.values() for source in one["tokens_by_source"] or ())
    header = ["variant", "parameters", "tokens", *sources]
    rows = []
    for variant, one in facts.items():
        by_source = one["tokens_by_source"] or {}
        numbers = [one["parameters"], one["tokens"], *(by_source.get(source) for source in sources)]
        rows.append([variant, *("–" if number is None else f"{number:,.0f}" for number in numbers)])
    return text_table(header, rows)
