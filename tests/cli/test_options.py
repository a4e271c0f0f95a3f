"""Values against the signatures of the classes that take them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import pytest

from lightning_danube.cli.options import BEFORE, Reader, Refusal, Typed


@dataclass(frozen=True)
class Part:
    size: int
    share: float = 0.5
    kind: Literal["round", "square"] = "round"


class Base:
    pass


class Whole(Base):
    def __init__(
        self, part: Part | str, names: list[str], pair: tuple[float, float] = (0, 1), on: bool = False
    ) -> None:
        self.part, self.names, self.pair, self.on = part, names, pair, on


class Other(Base):
    def __init__(self, names: Sequence[str] = (), **kwargs: Any) -> None:
        self.names, self.more = names, kwargs


HERE = __name__
WHOLE: dict[str, Any] = {"class_path": f"{HERE}.Whole", "init_args": {"part": {"size": 3}, "names": ["a"]}}


def read(hint: Any, value: Any, **options: Any) -> Any:
    return Reader(**options).value(hint, value, ("x",))


@pytest.mark.parametrize(
    ("hint", "typed", "value"),
    [
        (int, "3", 3),
        (float, "1e-3", 1e-3),
        (bool, "true", True),
        (str, "123", "123"),
        (int | str, "4", 4),
        (int | str, "4K", "4K"),
        (int | None, "null", None),
        (str | None, "~", None),
        (str | None, "# ", "# "),  # a comment of YAML, and as a separator a text
        (str | None, "\n", "\n"),
        (list[int], "[1, 2]", [1, 2]),
        (tuple[float, float], "[0.9, 0.95]", [0.9, 0.95]),
        (dict[str, float], "{a: 1}", {"a": 1.0}),
        (Literal["a", 2], "2", 2),
        (Part, "{size: 3}", {"size": 3}),
    ],
)
def test_text_of_a_command_line_gets_its_type(hint: Any, typed: str, value: Any) -> None:
    found = read(hint, Typed(typed))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("hint", "value", "path", "reason"),
    [
        (int, "x", "x", "expected a whole number, not x"),
        (int, 2.5, "x", "expected a whole number, not 2.5"),
        (int, True, "x", "expected a whole number, not True"),
        (int | None, [1], "x", r"expected a whole number or null, not \[1\]"),
        (str, 5, "x", "expected text, not 5"),
        (float, float, "x", "expected a number, not "),
        (tuple[float, float], [1], "x", r"expected a list of 2 values, not \[1\]"),
        (list[int], {"a": 1}, "x", "expected a list, not "),
        (dict[str, int], {"a": "b"}, "x.a", "expected a whole number, not b"),
        (Part, 3, "x", "expected a mapping of the options of Part, not 3: --x.size 3 sets its size$"),
        (Part, "1e-3", "x", "expected a mapping of the options of Part, not 1e-3: --x.size 1e-3 sets its size$"),
        (Part | None, [3], "x", r"expected a mapping of the options of Part or null, not \[3\]$"),
        (Part, {}, "x", "'size' is missing from Part"),
        (Part, {"size": 1, "kind": "flat"}, "x.kind", "expected one of 'round', 'square', not flat"),
        (Part | str, {"sise": 1}, "x", "'sise' is not an option of Part: did you mean 'size'"),
        (Base, {"class_path": f"{HERE}.Hole"}, "x", f"there is no class 'Hole' in {HERE}"),
        (Base, {"class_path": "nowhere.Whole"}, "x", "the class 'nowhere.Whole' cannot be imported"),
        (Base, {"class_path": f"{HERE}.Part"}, "x", f"{HERE}.Part is not a subclass of Base"),
        (Base, {"class_path": "Wole"}, "x", "there is no Base called 'Wole': did you mean Whole"),
        (Base, {"size": 3}, "x", "'size' is an option of a class, and none is named: give --x with a class first"),
        (Base, WHOLE | {"on": "maybe"}, "x.on", "expected true or false, not maybe"),
    ],
)
def test_what_is_wrong_is_said_of_the_innermost_option(hint: Any, value: Any, path: str, reason: str) -> None:
    with pytest.raises(Refusal, match=reason) as caught:
        read(hint, value)
    assert ".".join(caught.value.shown) == path


def test_objects_are_made_of_what_was_read() -> None:
    whole = read(Base, WHOLE | {"on": Typed("true")}, make=True)
    assert (whole.part, whole.names, whole.on) == (Part(3), ["a"], True)
    assert read(Base, "Other", make=True).names == ()


@dataclass(frozen=True)
class Round(Part):
    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}: give 1 or more")
        if self.share > self.size:
            raise ValueError("a share above the size")


def test_a_dataclass_checks_its_values_where_they_are_read() -> None:
    for value in ({"size": 0}, {"class_path": f"{HERE}.Round", "init_args": {"size": 0}}):
        for how in ({"check": True}, {"make": True}):
            with pytest.raises(Refusal, match=r"^is 0: give 1 or more") as caught:
                read(Round, value, **how)
            assert (caught.value.path, caught.value.goes_on) == (("x", "size"), True)
    with pytest.raises(Refusal, match=r"^a share above the size") as caught:
        read(Round | str, {"size": 1, "share": 2}, check=True)
    assert (caught.value.path, caught.value.goes_on) == (("x",), False)
    assert read(Round, {"size": 0}) == {"size": 0}  # neither checked nor made
    assert read(Round, {"size": "${number}", "share": 5}, check=True) == {"size": "${number}", "share": 5.0}


def test_classes_that_are_open_say_how_a_class_of_ones_own_is_named() -> None:
    from lightning_danube.training.optim import AdamW

    of_ones_own = r"\(docs/pretraining\.md, An optimizer or a schedule of your own\)"
    for hint, value, message in (
        (AdamW, Typed("SGD"), f"expected AdamW or Muon, or your own subclass of AdamW .* {of_ones_own}, not SGD"),
        (
            AdamW,
            "torch.optim.SGD",
            f"torch.optim.SGD is not a subclass of AdamW: write a subclass of AdamW {of_ones_own}",
        ),
    ):
        with pytest.raises(Refusal) as caught:
            read(hint, value, open_to=[AdamW])
        assert re.fullmatch(message, caught.value.reason), caught.value.reason


def test_options_of_the_class_before_count_if_the_new_class_has_them() -> None:
    other = read(Base, {"class_path": "Other", BEFORE: WHOLE["init_args"]}, make=True)
    assert (other.names, other.more) == (["a"], {})


def test_what_is_not_known_here_is_left_to_the_parser() -> None:
    assert read(timedelta, "3 days") == "3 days" and read(Any, 3) == 3
    assert read(int, "${seed}") == "${seed}"
    assert read(Base, {"class_path": "Other", "init_args": {"anything": 1}})["init_args"] == {"anything": 1}


def test_facts_of_the_data_are_not_stated_for_a_model() -> None:
    reader = Reader(taken={"size": "data.size"})
    with pytest.raises(Refusal, match=r"'size' is taken from data\.size: leave it out here"):
        reader.value(Part, {"size": 3}, ("model", "part"))
    assert reader.value(Part, {"share": 1}, ("model", "part")) == {"share": 1.0}
    assert reader.value(Part, {"size": 3}, ("data", "part")) == {"size": 3}


class Derived(Whole):
    def __init__(self, extra: int = 0, **kwargs: Any) -> None:
        super().__init__(names=["fixed"], **kwargs)
        self.extra = extra


def test_a_flag_overrides_the_configuration_and_both_the_options_of_the_class_before() -> None:
    given = {"part": {"size": 3}, "names": ["a"], "on": False, "pair": [1, 2]}
    value = {
        "class_path": f"{HERE}.Whole",
        "init_args": given,
        "on": Typed("true"),
        BEFORE: {"on": False, "pair": [8, 9]},
    }
    whole = read(Base, value, make=True)
    assert whole.on is True and whole.pair == [1.0, 2.0]


def test_options_of_a_base_class_count_but_those_that_the_class_gives_itself() -> None:
    found = read(Base, {"class_path": f"{HERE}.Derived", "part": {"size": 3}, "on": True}, make=True)
    assert (found.part, found.names, found.on) == (Part(3), ["fixed"], True)
    with pytest.raises(Refusal, match="'names' is not an option of Derived"):
        read(Base, {"class_path": f"{HERE}.Derived", "part": {"size": 3}, "names": ["mine"]})
    with pytest.raises(Refusal, match="'part' is missing from Derived"):
        read(Base, {"class_path": f"{HERE}.Derived", "extra": 1})


def test_large_whole_numbers_keep_their_last_digit() -> None:
    largest = 2**63 - 1  # as a float, this is one more
    assert read(int, largest) == read(int, Typed(str(largest))) == largest


def test_a_subclass_of_a_subclass_is_named_without_its_module() -> None:
    found = read(Base, {"class_path": "Derived", "part": {"size": 3}, "on": True}, make=True)
    assert isinstance(found, Derived)
