"""Makes questions with answers, and textbook passages, from signatures and first sentences by templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lightning_danube.text.embedded.docstrings import (
    STANDARD_LIBRARY,
    UNREADABLE,
    CollectedDocument,
    Entry,
    Module,
    Parameter,
    digest,
    predicate,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fact:
    """A public entry with a first sentence that no other entry has."""

    entry: Entry
    module: str
    package: str
    sentence: str

    @property
    def name(self) -> str:
        return self.entry.name or self.module

    @property
    def full(self) -> str:
        # The names of functions added from C include the package already.
        inside = self.entry.name and not self.entry.name.startswith(f"{self.package}.")
        return f"{self.module}.{self.entry.name}" if inside else self.name

    @property
    def asked(self) -> str:
        """The name to use in a question. Omits the module's path if the name is clear without it."""
        if not self.entry.name or self.full == self.name:
            return f"`{self.full}`"
        return f"`{self.name}` of {self.package if self.package != STANDARD_LIBRARY else f'the module `{self.module}`'}"

    @property
    def home(self) -> str:
        return "the standard library" if self.package == STANDARD_LIBRARY else f"the package `{self.package}`"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.entry.parameters or ()

    @property
    def is_callable(self) -> bool:
        return self.entry.parameters is not None and self.entry.kind != "property" and len(self.parameters) <= 10

    def fields(self) -> dict[str, str]:
        """Returns the fields that templates can use."""
        does = predicate(self.sentence) or ""
        return {
            **{"name": self.name, "full": self.full, "asked": self.asked, "kind": self.entry.kind},
            **{"module": self.module, "home": self.home},
            **{"sentence": self.sentence, "does": does},
        }


def facts_about_module(module: Module, used: set[bytes]) -> list[Fact]:
    """Returns the facts of a module whose first sentences are not in `used`, and adds these sentences."""
    facts = []
    for entry in module.entries:
        if entry.sentence is None or any(part.startswith("_") for part in entry.name.split(".")):
            continue
        key = digest(entry.sentence.lower())
        if key not in used:
            used.add(key)
            facts.append(Fact(entry, module.name, module.package, entry.sentence))
    return facts


def pick(options: Sequence[T], *key: str) -> T:
    """Returns one of the options, determined by the key alone."""
    return options[int.from_bytes(digest("\0".join(key)), "big") % len(options)]


def worded(variants: str, key: str, **fields: str) -> str:
    """Returns one line of `variants` with its fields filled in. Other variants for one key are picked independently."""
    return pick(variants.strip().split("\n"), key, variants).strip().format(**fields)


def enumerate_in_prose(items: Sequence[str], last: str = "and") -> str:
    """Returns "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def in_backticks(names: Sequence[str], last: str = "and") -> str:
    """Returns "`a`, `b` and `c`"."""
    return enumerate_in_prose([f"`{name}`" for name in names], last)


# --- Questions and answers ----------------------------------------------------------------------------------------


def _ask(fact: Fact, questions: str, answers: str, **more: str) -> str:
    fields = {**fact.fields(), **more}
    return f"Question: {worded(questions, fact.full, **fields)}\nAnswer: {worded(answers, fact.full, **fields)}"


def turns_of(text: str) -> list[tuple[str, str]]:
    """Returns the (question, answer) pairs of a document of `questions_about`."""
    parts = re.split(r"^(?:Question|Answer): ", text, flags=re.MULTILINE)[1:]
    return [(asked.strip(), answered.strip()) for asked, answered in zip(parts[::2], parts[1::2], strict=True)]


def _what(fact: Fact) -> str:
    if predicate(fact.sentence):
        questions = """
            What does {asked} do?
            What does the {kind} {asked} do?
            What is {asked} for?
            Explain in one sentence what {asked} does.
            I came across {asked}. What does it do?
            Summarize the {kind} {asked}."""
        return _ask(fact, questions, "`{name}` {does}.\nIt {does}.\nThe {kind} `{name}` {does}.")
    questions = """
        What is {asked}?
        What does the documentation say about {asked}?
        Describe the {kind} {asked} in one sentence.
        How would you introduce the {kind} {asked}?
        Tell me about {asked}."""
    return _ask(fact, questions, "{sentence}")


def _which(fact: Fact) -> str | None:
    """Asks for the name of the thing that does something. None if the question would contain the name."""
    does = predicate(fact.sentence)
    if not does or len(does) > 160 or not fact.entry.name or fact.name.rpartition(".")[2].lower() in does.lower():
        return None
    questions = """
        Which {kind} of `{module}` {does}?
        Which {kind} in the module `{module}` {does}?
        Name the {kind} of `{module}` that {does}.
        I need a {kind} from `{module}` that {does}. Which one is it?"""
    return _ask(fact, questions, "`{full}`.\nThat is `{name}`.\nYou can use `{full}`.\nThe {kind} `{name}`.")


def _parameters_of(fact: Fact) -> str | None:
    if not fact.is_callable:
        return None
    questions = """
        Which parameters does `{name}` take?
        What are the parameters of `{name}`?
        List the arguments of `{name}`.
        With which arguments can `{name}` be called?"""
    if not fact.parameters:
        return _ask(fact, questions, "`{name}` takes no arguments.\nIt takes none.\nNone.")
    told = [f"`{p.name}`" + (f" (default `{p.default}`)" if p.default else "") for p in fact.parameters]
    return _ask(fact, questions, "It takes {told}.\n`{name}` takes {told}.\n{told}.", told=enumerate_in_prose(told))


def _required(fact: Fact) -> str | None:
    needed = [p.name for p in fact.parameters if not p.optional]
    rest = [p.name for p in fact.parameters if p.optional]
    if not fact.is_callable or not rest:
        return None
    questions = """
        Which arguments of `{name}` are required?
        What must be given when `{name}` is called?
        Which parameters of `{name}` cannot be left out?"""
    if not needed:
        return _ask(
            fact, questions, "None, as {rest} can be left out.\nNone.\nNone of {rest}.", rest=in_backticks(rest)
        )
    answers = """
        Only {needed}.
        {needed}. What can be left out: {rest}.
        {needed} must be given, while {rest} may be left out."""
    return _ask(fact, questions, answers, needed=in_backticks(needed), rest=in_backticks(rest))


def _default_of(fact: Fact) -> str | None:
    having = [p for p in fact.parameters if p.default not in (None, UNREADABLE)]
    if not having or fact.entry.kind == "property":
        return None
    parameter = pick(having, fact.full)
    questions = """
        What is the default of `{parameter}` in `{name}`?
        What is `{parameter}` of `{name}` by default?
        Which value does `{parameter}` of `{name}` have if I leave it out?"""
    answers = "It is `{value}`.\nIts default is `{value}`.\n`{parameter}` is `{value}` by default.\n`{value}`."
    return _ask(fact, questions, answers, parameter=parameter.name, value=parameter.default or "")


def _where(fact: Fact) -> str | None:
    if fact.full == fact.name:
        return None
    questions = """
        In which module is `{name}` defined?
        Where is the {kind} `{name}` of {home} defined?
        Which module holds the {kind} `{name}`?"""
    return _ask(fact, questions, "In `{module}`.\nIt is defined in `{module}`.\nThe module `{module}` defines it.")


def _methods_of(fact: Fact) -> str | None:
    if len(fact.entry.methods) < 2:
        return None
    questions = """
        Name some methods of the class `{name}`.
        Which methods does `{name}` define?
        What can be done with an object of the class `{name}`?"""
    more = ", among others" if len(fact.entry.methods) > 6 else ""
    return _ask(fact, questions, "It has the methods {methods}.", methods=in_backticks(fact.entry.methods[:6]) + more)


def _bases_of(fact: Fact) -> str | None:
    if not fact.entry.bases:
        return None
    questions = "What does the class `{name}` inherit from?\nWhich base classes does `{name}` have?"
    return _ask(fact, questions, "It inherits from {bases}.\n{bases}.", bases=in_backticks(fact.entry.bases))


_DETAILS = (_parameters_of, _required, _default_of, _where, _methods_of, _bases_of)


def questions_about(facts: Sequence[Fact]) -> Iterator[CollectedDocument]:
    """Yields documents of question-answer pairs: what an entry does and one detail of it, or its name."""
    pairs: list[str] = []
    first = facts[0]
    for fact in facts:
        first = first if pairs else fact
        name_asked = _which(fact)
        if name_asked and pick(range(3), fact.full, "which") == 0:
            pairs.append(name_asked)
        else:
            details = [pair for detail in _DETAILS if (pair := detail(fact))]
            pairs += [_what(fact), *([pick(details, fact.full, "detail")] if details else [])]
        if sum(map(len, pairs)) > pick([500, 900, 1300, 1700], first.full, "length") or fact is facts[-1]:
            yield CollectedDocument("\n\n".join(pairs), first.package, first.full)
            pairs = []


# --- Textbook passages --------------------------------------------------------------------------------------------

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_PLURALS = {"class": "classes", "property": "properties", "function": "functions", "method": "methods"}


def passages_about(facts: Sequence[Fact]) -> Iterator[CollectedDocument]:
    """Yields sections on two to six facts of one module. A module with a single fact gets no section."""
    opening = facts[0] if not facts[0].entry.name else None
    rest = list(facts[1:] if opening else facts)
    part = 1
    while len(rest) > 1:
        size = pick([3, 4, 5], rest[0].full, "size")
        size = len(rest) if len(rest) - size < 2 else size
        yield CollectedDocument(
            _passage(rest[:size], opening if part == 1 else None, part), rest[0].package, rest[0].full
        )
        rest = rest[size:]
        part += 1


def _passage(facts: Sequence[Fact], opening: Fact | None, part: int) -> str:
    kinds = {fact.entry.kind for fact in facts}
    names = [fact.name for fact in facts]
    about = ""
    if opening:
        about = worded(
            " The module {does}." if predicate(opening.sentence) else " Its authors describe it so: {sentence}",
            *(opening.full,),
            **opening.fields(),
        )
    fields = {
        **facts[0].fields(),
        **{"about": f" {about}" if about else "", "count": _NUMBERS[len(facts)], "part": str(part)},
        **{"things": _PLURALS[kinds.pop()] if len(kinds) == 1 else "items"},
        **{"names": in_backticks(names), "first": names[0], "second": names[1]},
    }
    title = worded(
        """
        The module `{module}`, part {part}
        Working with `{first}` and `{second}`
        `{first}`, `{second}` and their neighbours
        A closer look at `{module}`, section {part}
        What {home} offers in `{module}`
        Notes on {names}""",
        facts[0].full,
        **fields,
    )
    intro = worded(
        """
        In this section we look at {count} {things} of the module `{module}`, which belongs to {home}.{about}
        The module `{module}` is a part of {home}.{about} We shall meet {count} of its {things}.
        Whoever uses {home} may one day need `{module}`.{about} Here are {count} of its {things}, one by one.
        Let us turn to `{module}`.{about} This section explains {count} {things} of it: {names}.
        There are a number of tools in `{module}`.{about} The following {count} {things} are among them.""",
        facts[0].full,
        **fields,
    )
    paragraphs = [_paragraph(fact, number, len(facts)) for number, fact in enumerate(facts)]
    return "\n\n".join([title, intro, *paragraphs, _closing(facts, fields)])


def _paragraph(fact: Fact, number: int, count: int) -> str:
    if number == 0:
        leads = "We begin with\nThe first to know is\nConsider first\nA good place to start is\nFirst comes"
    elif number < count - 1:
        leads = "Next comes\nThen there is\nClosely related is\nWe go on with\nConsider now\nAnother one is"
    else:
        leads = "Finally, there is\nLast comes\nIt remains to speak of\nThe last one here is\nWe end with"
    if predicate(fact.sentence):
        purposes = """
            It {does}.
            In short, it {does}.
            Its purpose is quickly told: it {does}.
            What does it do? It {does}.
            This {kind} {does}."""
    else:
        purposes = """
            {sentence}
            The documentation introduces it with these words: {sentence}
            In one sentence: {sentence}
            A short description would be this. {sentence}"""
    lead = f"{worded(leads, fact.full)} the {fact.entry.kind} `{fact.name}`."
    return " ".join([lead, worded(purposes, fact.full, **fact.fields()), *_remarks(fact)])


def _remarks(fact: Fact) -> Iterator[str]:
    """Yields sentences about the signature."""
    key = fact.full
    if fact.entry.bases:
        bases = "It is built upon {bases}.\nIt is derived from {bases}.\nIt inherits from {bases}."
        yield worded(bases, key, bases=in_backticks(fact.entry.bases))
    if fact.is_callable:
        yield from _parameter_remarks(fact)
    if fact.entry.returns and re.fullmatch(r"(?!None$)[\w.]+", fact.entry.returns):
        returns = "The result is of type `{returns}`.\nWhat comes back is a `{returns}`.\nIt gives back `{returns}`."
        yield worded(returns, key, returns=fact.entry.returns)
    if len(fact.entry.methods) > 1:
        methods = "Its methods include {methods}.\nSuch an object has, among others, the methods {methods}."
        yield worded(methods, key, methods=in_backticks(fact.entry.methods[:5]))


def _parameter_remarks(fact: Fact) -> Iterator[str]:
    needed = [p.name for p in fact.parameters if not p.optional]
    defaults = [f"`{p.name}` is `{p.default}`" for p in fact.parameters if p.default not in (None, UNREADABLE)]
    if not fact.parameters:
        yield worded("It needs no arguments.\nNo arguments are needed.\nThere is nothing to pass to it.", fact.full)
    if needed:
        needs = """
            The caller has to give {all}.
            Without {any} the call fails.
            What it cannot do without: {all}.
            {all} must be given."""
        yield worded(needs, fact.full, all=in_backticks(needed), any=in_backticks(needed, "or"))
    if defaults:
        told = "Unless told otherwise, {defaults}.\nBy default {defaults}.\nIf nothing else is said, {defaults}."
        yield worded(told, fact.full, defaults=enumerate_in_prose(defaults[:3]))


def _closing(facts: Sequence[Fact], fields: dict[str, str]) -> str:
    calls = [fact for fact in facts if fact.is_callable and fact.parameters]
    told = [f"`{fact.name}` {does}" for fact in facts if (does := predicate(fact.sentence)) and len(does) < 90]
    more = {
        **{"last": facts[-1].name, "any": pick(facts, facts[0].full).name, "told": "; ".join(told[:3])},
        **{"callable": pick(calls, facts[0].full).name if calls else ""},
    }
    closings = """
        Summary: this section treated {names}, all from `{module}`.
        Exercise: Say in your own words how `{first}` differs from `{last}`.
        Exercise: Look up `{any}` and find out what it does with unusual input."""
    if calls:
        closings += """
        Exercise: Write a call of `{callable}` that gives only what must be given.
        Exercises: 1. Write a call of `{callable}`. 2. Say in your own words how `{first}` differs from `{last}`.
        Questions for review: When would you use `{first}`, and when `{last}`? What does one pass to `{callable}`?"""
    if len(told) > 1:
        closings += """
        To sum up: {told}.
        Remember: {told}.
        In this section we have seen that {told}."""
    return worded(closings, facts[0].full, **{**fields, **more})
