"""A made-up world whose facts are all known, so that the facts a model has learned can be counted.

People, companies and events have attributes. Each statement of an attribute ends in one word, its value, which the
words before it ask for. `world:clean` states values like an encyclopaedia. `world:noisy` is like the web: sloppy, with
clutter, and a tenth of its statements is wrong. A third of the subjects occurs only in `world:clean`, a third only in
`world:noisy`, a third in both. Everything is drawn from fixed seeds, so the world never changes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_danube.files import new_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORLD = "world"
"""Name of the tokenizer, which has one token per word. The sources are named "world:<role>"."""
ROLES = ("clean", "noisy")
GROUPS = ("clean", "noisy", "both")
"""The sources that state the facts of a subject."""
SUBJECTS = {"person": 72, "company": 24, "event": 24}
WRONG = 0.1
"""Share of statements in `noisy` that state a wrong value."""
DOCUMENTS = {"clean": 24_000, "noisy": 40_000}

_VALUES = {"city": 40, "year": 80, "profession": 30, "employer": 40, "product": 30}
_ATTRIBUTES: dict[str, dict[str, tuple[str, list[str]]]] = {
    # kind → attribute → (kind of value, wordings). {} is the subject; the value follows the wording.
    "person": {
        "birthplace": (
            "city",
            ["{} was born in the city of", "the birthplace of {} is", "{} grew up in", "the home town of {} is"],
        ),
        "birth year": (
            "year",
            [
                "{} was born in the year",
                "the birth year of {} is",
                "{} came into the world in",
                "the life of {} began in",
            ],
        ),
        "profession": (
            "profession",
            ["{} works as a", "the profession of {} is", "{} earned a living as a", "people know {} as a"],
        ),
        "employer": (
            "employer",
            ["{} is employed by", "the employer of {} is", "{} works for the firm", "{} joined the firm"],
        ),
    },
    "company": {
        "seat": (
            "city",
            ["{} has its seat in", "the seat of {} is", "the offices of {} are in", "{} is based in the city of"],
        ),
        "founding year": (
            "year",
            ["{} was founded in the year", "the founding year of {} is", "{} opened in", "the history of {} began in"],
        ),
        "product": ("product", ["{} is a maker of", "the product of {} is", "{} sells", "customers buy from {} the"]),
    },
    "event": {
        "place": (
            "city",
            ["{} took place in", "the place of {} was", "people came for {} to", "{} was held in the city of"],
        ),
        "date": (
            "year",
            ["{} happened in the year", "the year of {} is", "{} is dated to", "people remember {} from"],
        ),
    },
}
_SLOPPY = ["lol {} {attribute} :", "{} ( {attribute} )", "did you know {} {attribute} =", "wow {} {attribute} was"]
_CLUTTER = tuple(
    """
    click here to read more about this page share it with your friends sign up for the letter today best offers free
    shipping on all orders log in to leave a comment next post previous post tags views likes reply report home about
    contact terms privacy subscribe now new deals top ten lists you will not believe what came next follow us
    """.split()  # noqa: SIM905  (a text)
)
_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstv" for vowel in "aeio")
_FINALS = ("n", "r", "s", "l", "th", "m", "x", "nd")


@dataclass(frozen=True)
class Subject:
    """A person, company or event with facts.

    Args:
        name: two words.
        kind: person, company or event.
        group: the sources that state its facts, one of GROUPS.
        values: attribute → its true value, one word.
    """

    name: str
    kind: str
    group: str
    values: dict[str, str]


@dataclass(frozen=True)
class Question:
    """A fact as a text to complete. The training text never states this fact in the wording of the question.

    Args:
        prompt: the words before the answer.
        answer: one word.
        candidates: all values of the answer's kind, including the answer.
        commonest: the most frequent value of this attribute, the best guess without knowledge of the subject.
        group: one of GROUPS.
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...]
    commonest: str
    group: str


@dataclass(frozen=True)
class World:
    """All subjects with their facts, and all possible values.

    Args:
        subjects: in a fixed order.
        values: kind of value → its words.
    """

    subjects: tuple[Subject, ...]
    values: dict[str, tuple[str, ...]]

    def questions(self) -> list[Question]:
        """Returns one question for each fact."""
        counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for subject in self.subjects:
            for attribute, value in subject.values.items():
                counts[subject.kind, attribute][value] += 1
        return [
            Question(
                _wording(subject, attribute, asked=True),
                value,
                self.values[_ATTRIBUTES[subject.kind][attribute][0]],
                counts[subject.kind, attribute].most_common(1)[0][0],
                subject.group,
            )
            for subject in self.subjects
            for attribute, value in subject.values.items()
        ]

    def documents(self, role: str) -> Iterator[str]:
        """Yields the texts of a source.

        Args:
            role: one of ROLES.
        """
        generator = random.Random(f"{role} documents")
        known = [subject for subject in self.subjects if subject.group in (role, "both")]
        for _ in range(DOCUMENTS[role]):
            yield self._clean(generator, known) if role == "clean" else self._noisy(generator, known)

    def _clean(self, generator: random.Random, known: list[Subject]) -> str:
        """Returns all facts of one subject, in random order."""
        subject = generator.choice(known)
        attributes = generator.sample(list(subject.values), len(subject.values))
        return " ".join(
            f"{_wording(subject, attribute, generator)} {subject.values[attribute]} ." for attribute in attributes
        )

    def _noisy(self, generator: random.Random, known: list[Subject]) -> str:
        """Returns three statements about random subjects, surrounded by clutter."""
        parts = [_clutter(generator)]
        for _ in range(3):
            subject = generator.choice(known)
            attribute = generator.choice(list(subject.values))
            value = subject.values[attribute]
            if generator.random() < WRONG:
                others = self.values[_ATTRIBUTES[subject.kind][attribute][0]]
                value = generator.choice([word for word in others if word != value])
            wording = _wording(subject, attribute, generator, sloppy=True)
            parts += [f"{wording} {value}", _clutter(generator)]
        return " ".join(parts)


def _clutter(generator: random.Random) -> str:
    return " ".join(generator.choices(_CLUTTER, k=generator.randint(3, 9)))


def _wording(
    subject: Subject,
    attribute: str,
    generator: random.Random | None = None,
    *,
    sloppy: bool = False,
    asked: bool = False,
) -> str:
    """Returns a statement without its value.

    Each fact has one wording for its question. The texts never use this wording for this fact.
    """
    wordings = _ATTRIBUTES[subject.kind][attribute][1]
    if sloppy or (asked and subject.group == "noisy"):
        wordings = [wording.replace("{attribute}", attribute) for wording in _SLOPPY]
    digest = hashlib.blake2b(f"{subject.name}/{attribute}".encode(), digest_size=4).digest()
    kept = int.from_bytes(digest) % len(wordings)
    if asked:
        return wordings[kept].format(subject.name)
    assert generator is not None
    return generator.choice([wording for place, wording in enumerate(wordings) if place != kept]).format(subject.name)


@lru_cache(maxsize=1)
def the_world() -> World:
    generator = random.Random("a world of facts")
    taken: set[str] = set(_CLUTTER)

    def word() -> str:
        while True:
            found = "".join(generator.choices(_SYLLABLES, k=generator.randint(2, 3))) + generator.choice(_FINALS)
            if found not in taken:
                taken.add(found)
                return found

    values = {
        kind: tuple(str(1900 + number) if kind == "year" else word() for number in range(count))
        for kind, count in _VALUES.items()
    }
    firsts, lasts = [word() for _ in range(24)], [word() for _ in range(24)]
    names = generator.sample([f"{first} {last}" for first in firsts for last in lasts], sum(SUBJECTS.values()))
    subjects = []
    for kind, count in SUBJECTS.items():
        for number in range(count):
            facts = {attribute: generator.choice(values[of]) for attribute, (of, _) in _ATTRIBUTES[kind].items()}
            subjects.append(Subject(names.pop(), kind, GROUPS[number % len(GROUPS)], facts))
    return World(tuple(subjects), values)


def write_world(cache_dir: Path) -> dict[str, Path]:
    """Returns role → jsonl file of its documents. Writes missing files."""
    folder = cache_dir / "world" / _identity()
    files = {role: folder / f"{role}.jsonl" for role in ROLES}
    for role, file in files.items():
        if not file.is_file():
            with new_file(file) as partial, partial.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps({"text": text}) + "\n" for text in the_world().documents(role))
    return files


def _identity() -> str:
    """Returns a hash of this source file: nothing else determines the texts, so no cache holds those of another world.

    A changed comment makes them anew, which takes some seconds.
    """
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def world_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each word of the world."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    world = the_world()
    words = [*_CLUTTER, "."]
    for attributes in _ATTRIBUTES.values():
        for attribute, (_, wordings) in attributes.items():
            for wording in [*wordings, *_SLOPPY]:
                words += wording.replace("{attribute}", attribute).replace("{}", "").split()
    words += [word for subject in world.subjects for word in subject.name.split()]
    words += [word for group in world.values.values() for word in group]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
