"""Reads the file that describes a study: the base run, what differs between its variants, and what is compared."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from lightning_danube.outside.names import plain_name
from lightning_danube.outside.secrets import secret_in
from lightning_danube.studies.scaling import SIZE, TOKENS
from lightning_danube.terminal import name_meant
from lightning_danube.yaml_files import config_file, read_config

Overrides = Mapping[str, Any]
"""Dotted key of a run's config → value."""
FACTS = ("parameters", "tokens", "tokens_by_source")
"""Facts that a study can require to be equal in all variants."""


@dataclass(frozen=True)
class Design:
    """A study as a YAML file describes it.

    Args:
        name: results are kept under `<runs>/studies/<name>`.
        base: the config of the run: a name, or a path relative to the current directory.
        metric: the metric to compare: a dotted key of `summary.json` such as val_loss.web (see `trials.number_of`).
        variants: name → the options that the variant sets.
        baseline: the variant that all others are compared with.
        law: used instead of a baseline; true fits a scaling law to variants that differ in size and tokens.
        search: used instead of variants: dotted key → values to search: a list, or {low: …, high: …}. log: true
            searches on a logarithmic scale. Between whole numbers only whole numbers are tried.
        trials: number of settings that a search tries, each with all seeds. Without it, all combinations are tried, and
            each key needs a list.
        better: whether lower or higher is better.
        seeds: each variant runs once with each seed.
        also: other keys of `summary.json` that the table shows.
        set: options for all variants. In texts here and in variants, {seed} stands for the run's seed.
        equal: facts that variants must share, and the relative difference allowed: {parameters: 0.01, tokens: 0}.
        verb: fit, or test for tasks that do not train.
    """

    name: str
    base: str
    metric: str
    variants: Mapping[str, Overrides] = field(default_factory=dict)
    baseline: str = ""
    law: bool = False
    search: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 0
    better: Literal["lower", "higher"] = "lower"
    seeds: tuple[int, ...] = (1, 2, 3)
    also: tuple[str, ...] = ()
    set: Overrides = field(default_factory=dict)
    equal: Mapping[str, float] = field(default_factory=dict)
    verb: Literal["fit", "test"] = "fit"

    def overrides(self, values: Overrides, seed: int) -> dict[str, Any]:
        """Returns all options set in one run of a variant, or of a setting that a search tries."""
        merged = {**self.set, **values}
        filled = {
            key: value.replace("{seed}", str(seed)) if isinstance(value, str) else value
            for key, value in merged.items()
        }
        return {"seed_everything": seed, **filled}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Returns the keys of all metrics that the study reads from a run."""
        return tuple(dict.fromkeys([self.metric, *self.also, *((SIZE, TOKENS) if self.law else ())]))

    def grid(self) -> list[dict[str, Any]]:
        """Returns all settings of a grid search; empty if the search samples."""
        if not self.search or self.trials:
            return []
        return [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]

    @property
    def settings(self) -> int:
        """Returns how many settings a search tries."""
        return self.trials or len(self.grid())

    def digest(self) -> str:
        """Returns a hash that differs where results must not share a table. Seeds and the metrics shown may change."""
        free = ("seeds", "also", "variants", "trials")
        # Defaults are left out, so that a key added later does not change the hash of old studies.
        defaults = {one.name: one.default for one in fields(self)} | {"search": {}, "set": {}, "equal": {}}
        compared = {key: value for key, value in asdict(self).items() if key not in free and value != defaults[key]}
        compared["base"] = read_config(self.base)
        return hashlib.sha256(json.dumps(compared, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_design(file: str) -> Design:
    """Reads a study's file.

    Raises:
        ValueError: the file is missing, no YAML, or describes no study; the message names the file and the key.
    """
    raw = read_config(file)
    known = [one.name for one in fields(Design)]
    for key in raw:
        if key not in known:
            raise ValueError(f"{file}: {key!r} is not a key of a study: {name_meant(key, known)}")
    kind = ("search",) if raw.get("search") else ("variants",) if raw.get("law") else ("variants", "baseline")
    needed = ("name", "base", "metric", *kind)
    missing = [key for key in needed if raw.get(key) in (None, "", {}, 0)]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing: a study needs {', '.join(needed)}")
    if raw.get("law") and raw.get("baseline"):
        raise ValueError(f"{file}: a study has a baseline, which variants are compared with, or a law: leave one out")
    if raw.get("search") and (raw.get("variants") or raw.get("baseline") or raw.get("law") or raw.get("equal")):
        raise ValueError(f"{file}: a study has variants, which are compared, or search: leave one of them out")
    raw = {**raw, "seeds": _seeds(file, raw.get("seeds", [1, 2, 3])), "also": tuple(raw.get("also") or ())}
    raw["set"] = raw.get("set") or {}
    raw["equal"] = raw.get("equal") or {}
    for key in ("variants", "search"):
        if not isinstance(raw.setdefault(key, {}), dict):
            raise ValueError(f"{file}: {key} is not a mapping of names to what is set in each")
    raw["variants"] = {str(name): values or {} for name, values in raw["variants"].items()}
    design = Design(**raw)
    _check(file, design)
    return design


def _seeds(file: str, seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{file}: seeds is {seeds!r}: give a list of whole numbers, such as [1, 2, 3]")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{file}: seeds has one twice: {seeds}")
    return tuple(seeds)


def _check(file: str, design: Design) -> None:
    plain_name(design.name, f"{file}: name")
    for name in (design.name, *design.variants):
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{file}: {name!r} names a directory: use letters, digits, . - and _")
    if design.search:
        _check_search(file, design)
    elif type(design.law) is not bool:
        raise ValueError(f"{file}: law is {design.law!r}: say true, or leave it out")
    elif not design.law and design.baseline not in design.variants:
        raise ValueError(f"{file}: baseline {design.baseline!r} is none of the variants ({', '.join(design.variants)})")
    elif len(design.variants) < 2:
        raise ValueError(f"{file}: one variant alone is compared with nothing: add another")
    if design.better not in ("lower", "higher"):
        raise ValueError(f"{file}: better is {design.better!r}: say lower or higher")
    if design.verb not in ("fit", "test"):
        raise ValueError(f"{file}: verb is {design.verb!r}: say fit or test")
    for name, values in {"set": design.set, **design.variants}.items():
        if not isinstance(values, dict):
            raise ValueError(f"{file}: {name} is not a mapping of dotted keys to values")
        for key, value in values.items():
            if secret_in(json.dumps(value, default=str, ensure_ascii=False)):
                raise ValueError(
                    f"{file}: {name}: {key} holds a key or a password, and a study keeps and shows what it sets: give "
                    "it in an environment variable (SECURITY.md)"
                )
        if "seed_everything" in values:
            raise ValueError(f"{file}: {name} sets seed_everything, which is what seeds is for")
    for fact, tolerance in design.equal.items():
        if fact not in FACTS:
            raise ValueError(f"{file}: equal has {fact!r}: there are {', '.join(FACTS)}")
        if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not 0 <= tolerance < 1:
            raise ValueError(f"{file}: equal.{fact} is {tolerance!r}: give the share by which it may differ, from 0 on")
    try:
        config_file(design.base)
    except ValueError as error:
        raise ValueError(f"{file}: base: {error}") from None


def _check_search(file: str, design: Design) -> None:
    for key, values in design.search.items():
        if isinstance(values, list) and len(values) > 1:
            continue
        known = {"low", "high", "log"}
        if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= known:
            raise ValueError(
                f"{file}: search.{key} is {values!r}: give a list of at least two values, or {{low: …, high: …}} with "
                "log: true where steps are factors"
            )
        low, high = values["low"], values["high"]
        if isinstance(low, str) or isinstance(high, str) or not low < high:
            raise ValueError(
                f"{file}: search.{key} goes from {low!r} to {high!r}: give two numbers, the lower one first"
            )
        if values.get("log") and not low > 0:
            raise ValueError(f"{file}: search.{key} begins at {low!r}, where there are no factors: begin above 0")
    ranges = [key for key, values in design.search.items() if not isinstance(values, list)]
    if type(design.trials) is not int or design.trials < bool(ranges):
        raise ValueError(
            f"{file}: trials is {design.trials!r}: it must be a whole number of at least 1, or left out where each key "
            "of the search has a list"
        )
