"""Reads labelled texts from files and data sets, and divides them into splits.

A row without a usable text or label is returned as a `BadRow`, which the caller may refuse or skip. The split of a text
depends only on the text's content and a seed, not on its place in a file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning_danube.options import options
from lightning_danube.text.corpora import DOCUMENTATION, Source, local_files
from lightning_danube.text.objects import read_objects
from lightning_danube.text.quality import text_hash
from lightning_danube.text.reading import BadRow, id_of, listed, read_rows, text_of

PACKAGES = f"{DOCUMENTATION}packages"
"""The embedded data set: documentation of installed packages. The label is the package."""
PACKAGE_SOURCES = ("web", "academic")


@dataclass(frozen=True)
class LabelledTexts:
    """A place of labelled texts.

    Args:
        path: "documentation:packages" (the embedded set), a file, a directory or a glob of files (jsonl, csv, tsv,
            parquet; plain, .gz or .zst), a directory written by `datasets` `save_to_disk`, of one split or of several,
            or a hub id such as "stanfordnlp/imdb".
        name, split, revision: configuration, split and commit of a hub data set. The default split has the name of the
            role.
    """

    path: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def named(cls, role: str, given: str | Mapping[str, str]) -> LabelledTexts:
        """Returns the place that a config gives for a role: a path, or a mapping of the options.

        The mapping is not typed as this class, because the command-line parser would then read a path as a config file.

        Raises:
            ValueError: the mapping has other options, or no path.
        """
        return options(cls, given, f"data.{role}")

    def texts(self, role: str) -> Source:
        """Returns this place as a source of documents, which finds the files."""
        return Source(self.path, name=self.name, split=self.split or role, revision=self.revision)


class LabelledText(NamedTuple):
    """A text, its label (None if it is to be predicted), its file, its row from 1 on, and its column `id` if any."""

    text: str
    label: str | None
    file: str
    row: int
    id: str | int | None = None

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.row}"


def read_labelled_texts(
    role: str, source: LabelledTexts, text_column: str, label_column: str | None, cache_dir: Path
) -> Iterator[LabelledText | BadRow]:
    """Yields all rows of a source, in a fixed order.

    Args:
        role: train, validation, test or predict; used in messages and as the split of a hub data set.
        text_column: the column that holds the text, or a pattern of several columns, such as "{title} {abstract}".
        label_column: the column that holds the label; None if labels are not needed. Where the data set declares names
            for the numbers of its classes (`ClassLabel` of `datasets`), the label is the name.

    Raises:
        ValueError: the source cannot be opened, has no row, or its first row does not have the columns.
    """
    first = True
    for file, row, values in _rows(role, source, cache_dir):
        where = f"{file}, row {row}"
        if first and isinstance(values, Mapping):
            first = False
            _check_columns(values, text_column, label_column, where)
        if isinstance(values, BadRow):
            yield values
            continue
        text = text_of(values, text_column, file, row, where)
        if isinstance(text, BadRow):
            yield text
        elif not text.strip():
            yield BadRow(file, row, "empty text", f"{where}: column {text_column!r} is empty")
        elif label_column is None:
            yield LabelledText(text, None, file, row, id_of(values))
        else:
            label = _label(values.get(label_column), label_column, file, row)
            yield label if isinstance(label, BadRow) else LabelledText(text, label, file, row, id_of(values))


def _rows(role: str, source: LabelledTexts, cache_dir: Path) -> Iterator[tuple[str, int, Any]]:
    texts = source.texts("test" if role == "predict" else role)
    if texts.is_documentation:
        if source.path != PACKAGES:
            raise ValueError(f"data.{role}: {source.path} has no labels: the embedded set with labels is {PACKAGES}")
        yield from _documentation_of_packages(role, cache_dir)
        return
    yield from read_objects(role, texts, cache_dir, called=f"data.{role}", class_names=True)


def _documentation_of_packages(role: str, cache_dir: Path) -> Iterator[tuple[str, int, Any]]:
    for name in PACKAGE_SOURCES:
        (file,) = local_files(role, Source(DOCUMENTATION + name), cache_dir)
        for row, values in read_rows(file):
            package = values["origin"].partition(":")[0]
            # The heading of a text contains the module's path, which would reveal the label.
            text = re.sub(rf"\b{re.escape(package)}\b", "package", values["text"], flags=re.IGNORECASE)
            yield file, row, {"text": text, "label": package}


def _check_columns(values: Mapping[str, Any], text_column: str, label_column: str | None, where: str) -> None:
    wanted = re.findall(r"\{([^{}]+)\}", text_column) if "{" in text_column else [text_column]
    for option, names in (("text_column", wanted), ("label_column", [label_column] if label_column else [])):
        for name in names:
            if name not in values:
                there = listed(values)
                raise ValueError(f"{where}: there is no column {name!r}, only {there}: name it with data.{option}")


_WHOLE_NUMBER = re.compile(r"(-?\d+)\.0+")
_TRUTH = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}


def _label(value: Any, column: str, file: str, row: int) -> str | BadRow:
    """Returns a label as a word. A number or truth value is the same word as a text (csv) and as a value (jsonl)."""
    where = f"{file}, row {row}"
    if value is None or (isinstance(value, str) and not value.strip()):
        return BadRow(file, row, "no label", f"{where}: column {column!r} is empty")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        word = value.strip()
        try:
            word.encode()
        except UnicodeEncodeError:
            message = f"{where}: column {column!r} holds half a surrogate pair, which is not a word"
            return BadRow(file, row, "no label", message)
        number = _WHOLE_NUMBER.fullmatch(word)
        return number[1] if number else _TRUTH.get(word, word)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    kind = type(value).__name__
    return BadRow(file, row, "no label", f"{where}: column {column!r} holds {kind}, no word and no whole number")


def ordered(labels: Sequence[str]) -> list[str]:
    """Returns the labels in the order of the class numbers: by value if all are whole numbers, else alphabetically."""
    unique = sorted(set(labels))
    # Longer numbers are names; Python reads no number of more than some thousand digits.
    if all(re.fullmatch(r"-?\d{1,100}", label) for label in unique):
        return sorted(unique, key=int)  # "01" and "1" stay in alphabetical order
    return unique


def same_text(text: str) -> str:
    """Returns a key that is equal for two texts that differ only in case and white space."""
    return " ".join(text.split()).casefold()


def stratified(
    texts: Sequence[LabelledText], count: int, *, seed: int, stream: str, leave_one: bool = False
) -> list[int]:
    """Returns the numbers of `count` texts, stratified by class (largest remainder), in the order of the texts.

    Args:
        stream: the purpose of the choice, so that two choices with one seed differ.
        leave_one: never take all texts of a class.
    """
    members: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        assert text.label is not None
        members.setdefault(text.label, []).append(number)
    ideal = {label: count * len(numbers) / len(texts) for label, numbers in members.items()}
    takes = {label: int(ideal[label]) for label in members}
    by_remainder = sorted(members, key=lambda label: (takes[label] - ideal[label], label))
    for label in by_remainder[: count - sum(takes.values())]:
        takes[label] += 1
    chosen: list[int] = []
    for label, numbers in members.items():
        most = len(numbers) - 1 if leave_one else len(numbers)
        ranked = sorted(numbers, key=lambda number: text_hash(f"{seed}/{stream}/{same_text(texts[number].text)}"))
        chosen += ranked[: min(takes[label], most)]
    return sorted(chosen)


def split_off(
    texts: Sequence[LabelledText], share: float, *, seed: int, stream: str
) -> tuple[list[LabelledText], list[LabelledText]]:
    """Splits a share off each class. Returns the rest and the share; copies of a text stay together."""
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        first.setdefault(same_text(text.text), number)
    unique = [texts[number] for number in first.values()]
    chosen = stratified(unique, round(share * len(unique)), seed=seed, stream=stream, leave_one=True)
    taken = {same_text(unique[number].text) for number in chosen}
    rest = [text for text in texts if same_text(text.text) not in taken]
    return rest, [text for text in texts if same_text(text.text) in taken]


def most_frequent(texts: Sequence[LabelledText], count: int) -> set[str]:
    """Returns the most frequent labels; equally frequent labels are taken in alphabetical order."""
    counts = Counter(str(text.label) for text in texts)
    return set(sorted(counts, key=lambda label: (-counts[label], label))[:count])
