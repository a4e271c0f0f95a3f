"""The file of a study, and what is said of wrong ones."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.making.pages import FENCE, read
from lightning_danube.cli.configs import resolved_config
from lightning_danube.studies.design import read_design
from lightning_danube.studies.facts import check_search, check_variants, facts_of, facts_table
from lightning_danube.studies.scaling import SIZE

ROOT = Path(__file__).resolve().parents[2]
STUDY: dict[str, Any] = {
    "name": "heads",
    "base": "BASE",
    "baseline": "mha",
    "metric": "val_loss.web",
    "seeds": [1, 2],
    "variants": {"mha": {"model.init_args.decoder.num_key_value_heads": 8}, "gqa": {}},
}


SEARCH = {"variants": "gone", "baseline": "gone", "search": {"x": {"low": 1, "high": 8}}, "trials": 5}


def write(tmp_path: Path, **changes: Any) -> str:
    (tmp_path / "base.yaml").write_text("name: x\n")
    study = {**STUDY, "base": str(tmp_path / "base.yaml"), **changes}
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({key: value for key, value in study.items() if value != "gone"})
    )
    return str(tmp_path / "study.yaml")


def test_what_a_run_of_a_variant_sets(tmp_path: Path) -> None:
    design = read_design(write(tmp_path, set={"trainer.max_steps": 10}))
    assert design.overrides(design.variants["gqa"], 2) == {"seed_everything": 2, "trainer.max_steps": 10}
    assert design.overrides(design.variants["mha"], 1)["model.init_args.decoder.num_key_value_heads"] == 8


def test_a_run_may_build_on_one_of_the_same_seed(tmp_path: Path) -> None:
    design = read_design(write(tmp_path, set={"model.init_args.weights": "runs/studies/base/runs/gqa-seed{seed}"}))
    assert design.overrides({}, 3)["model.init_args.weights"] == "runs/studies/base/runs/gqa-seed3"


def test_the_page_of_studies_quotes_a_study(tmp_path: Path) -> None:
    """The example is a file that can be copied: configs/studies/attention.yaml with two of its variants."""
    (example,) = (block[2] for block in FENCE.finditer(read("docs/studies.md")) if block[1] == "yaml")
    (tmp_path / "study.yaml").write_text(example, "utf-8")
    shown, whole = read_design(str(tmp_path / "study.yaml")), read_design("studies/attention")
    assert shown.variants.keys() == {"mha", "mqa"} and shown.variants.items() <= whole.variants.items()
    assert replace(shown, variants=whole.variants, also=whole.also) == whole


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "a\nb", " ", 5, "x" * 300])
def test_a_study_stays_in_the_folder_of_studies(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"study.yaml: name is .* so give a plain name"):
        read_design(write(tmp_path, name=name))


def test_a_study_holds_no_key(tmp_path: Path) -> None:
    hidden: list[dict[str, Any]] = [{"set": {"data.path": "https://me:secret@host"}}]
    hidden.append({"variants": {"mha": {"x": ["?key=secret"]}, "gqa": {}}})
    for changes in hidden:
        with pytest.raises(ValueError, match=r"study.yaml: (set|mha): .* holds a key or a password") as refused:
            read_design(write(tmp_path, **changes))
        assert "secret" not in str(refused.value)


def test_a_study_is_another_one_when_what_is_compared_changes(tmp_path: Path) -> None:
    first = read_design(write(tmp_path)).digest()
    assert read_design(write(tmp_path, seeds=[1, 2, 3], also=["seconds"])).digest() == first
    assert read_design(write(tmp_path, metric="val_loss.wiki")).digest() != first
    assert read_design(write(tmp_path, law=False, better="lower", set={})).digest() == first
    assert read_design(write(tmp_path, set={"trainer.max_steps": 10})).digest() != first
    file = write(tmp_path)
    (tmp_path / "base.yaml").write_text("name: y\n")
    assert read_design(file).digest() != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": "x"}, "'metrics' is not a key of a study: did you mean 'metric'"),
        ({"baseline": "gone"}, "baseline missing: a study needs"),
        ({"baseline": "mqa"}, r"baseline 'mqa' is none of the variants \(gqa, mha\)"),
        ({"variants": {"mha": {}}}, "one variant alone is compared with nothing"),
        ({"variants": [1]}, "variants is not a mapping"),
        ({"variants": {"mha": {}, "g/a": {}}}, "'g/a' names a directory"),
        (
            {"variants": {"mha": {"seed_everything": 3}, "gqa": {}}},
            "mha sets seed_everything, which is what seeds is for",
        ),
        ({"variants": {"mha": "x", "gqa": {}}}, "mha is not a mapping of dotted keys"),
        ({"seeds": []}, r"seeds is \[\]: give a list"),
        ({"seeds": [1, 1]}, "seeds has one twice"),
        ({"better": "more"}, "better is 'more': say lower or higher"),
        ({"verb": "predict"}, "verb is 'predict'"),
        ({"equal": {"flops": 0}}, "equal has 'flops': there are parameters, tokens, tokens_by_source"),
        ({"equal": {"tokens": 2}}, "equal.tokens is 2: give the share"),
        ({"base": "nowhere.yaml"}, "base: there is no config file nowhere.yaml"),
        ({"search": {"x": [1, 2]}, "trials": 3}, "a study has variants, which are compared, or search"),
        (SEARCH | {"trials": "gone"}, "trials is 0: it must be a whole number of at least 1, or left out where each"),
        ({"law": True}, "a study has a baseline, which variants are compared with, or a law"),
        ({"law": "yes", "baseline": "gone"}, "law is 'yes': say true"),
        (SEARCH | {"trials": -1}, "trials is -1"),
        (SEARCH | {"search": {"x": [1]}}, r"search\.x is \[1\]: give a list of at least two values"),
        (SEARCH | {"search": {"x": {"low": 1}}}, r"search\.x is \{'low': 1\}: give a list"),
        (SEARCH | {"search": {"x": {"low": 2, "high": 1}}}, r"search\.x goes from 2 to 1"),
        (SEARCH | {"search": {"x": {"low": 0, "high": 1, "log": True}}}, r"search\.x begins at 0"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_design(write(tmp_path, **changes))
    assert "study.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_facts_of_a_config() -> None:
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    facts = facts_of(config)
    assert facts["parameters"] == 1_115_008
    # Stages end at whole batches of 2,048.
    assert facts["tokens"] == 1_001_472
    assert sum(facts["tokens_by_source"].values()) == pytest.approx(1_001_472)
    assert facts["tokens_by_source"]["web"] == pytest.approx(600_064 * 0.906 + 270_336 * 0.817 + 131_072 * 0.516)
    assert facts_of({"data": {}, "model": {}}) == {"parameters": None, "tokens": None, "tokens_by_source": None}
    table = facts_table({"one": facts, "two": facts_of({"data": {}, "model": {}})})
    assert "1,115,008" in table and "–" in table


def test_a_variant_that_no_run_would_take_is_named(tmp_path: Path) -> None:
    base = str(ROOT / "configs" / "quickstart.yaml")
    variants = {"good": {"trainer.max_steps": 2}, "bad": {"model.init_args.decoder.num_heads": 2}}
    design = read_design(write(tmp_path, base=base, baseline="good", variants=variants))
    with pytest.raises(ValueError, match=r"variant bad: .*num_heads") as caught:
        check_variants(design, resolved_config)
    assert "\n" not in str(caught.value)
    fine = read_design(write(tmp_path, base=base, baseline="a", variants={"a": {}, "b": {"trainer.max_steps": 2}}))
    assert check_variants(fine, resolved_config)["b"]["parameters"] == 1_115_008


def test_each_value_of_a_search_is_tried_before_the_first_run(tmp_path: Path) -> None:
    search = {"a": [1, 2, 3], "b": {"low": 4, "high": 5}}
    design = read_design(write(tmp_path, **(SEARCH | {"search": search})))
    tried: list[list[str]] = []

    def take(options: Sequence[str], refused: Sequence[str] = ()) -> dict[str, Any]:
        tried.append([options[options.index(key) + 1] for key in ("--a", "--b")])
        if tried[-1] == refused:
            raise ValueError("no")
        return {}

    check_search(design, take)
    assert tried == [["1", "4"], ["2", "4"], ["3", "4"], ["1", "5"]]
    for refused, message in ((["1", "4"], "the first setting: no"), (["1", "5"], "the setting b=5: no")):
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_search(design, partial(take, refused=refused))


def test_a_variant_may_change_what_all_variants_set(tmp_path: Path) -> None:
    design = read_design(write(tmp_path, set={"trainer.max_steps": 10}))
    assert design.overrides({"trainer.max_steps": 20}, 1)["trainer.max_steps"] == 20


def test_a_study_in_the_other_direction_is_another_one(tmp_path: Path) -> None:
    first = read_design(write(tmp_path)).digest()
    assert read_design(write(tmp_path, better="higher")).digest() != first
    assert read_design(write(tmp_path, equal={"tokens": 0})).digest() != first


def test_a_grid_has_every_combination(tmp_path: Path) -> None:
    search = {"rate": [1, 2, 3], "rank": [4, 8]}
    design = read_design(write(tmp_path, **(SEARCH | {"search": search, "trials": "gone"})))
    found = [(one["rate"], one["rank"]) for one in design.grid()]
    assert sorted(found) == [(rate, rank) for rate in (1, 2, 3) for rank in (4, 8)]
    assert design.settings == 6
    sampled = read_design(write(tmp_path, **(SEARCH | {"search": search, "trials": 5})))
    assert sampled.grid() == [] and sampled.settings == 5


def test_a_law_reads_sizes_and_tokens_of_its_runs(tmp_path: Path) -> None:
    design = read_design(write(tmp_path, law=True, baseline="gone", also=["steps", SIZE]))
    assert design.metrics == ("val_loss.web", "steps", "parameters_without_embedding", "tokens")
    assert read_design(write(tmp_path)).metrics == ("val_loss.web",)
