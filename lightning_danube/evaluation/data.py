"""The questions of an evaluation: a list of parts, each with one or a few rows of the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from lightning_danube.evaluation.asking import Part
from lightning_danube.evaluation.parts.academic import AcademicQuestions
from lightning_danube.evaluation.parts.chat import chat_questions
from lightning_danube.evaluation.parts.needles import make_needles
from lightning_danube.evaluation.parts.passages import passage_questions
from lightning_danube.evaluation.parts.perplexity import text_rows
from lightning_danube.evaluation.settings import FUNCTIONS, QuestionSettings
from lightning_danube.inspection.shown import ShownSource
from lightning_danube.text.corpora import Source, local_files
from lightning_danube.tokens.chat_template import end_ids
from lightning_danube.training.planned_data import TokenizedModule


class EvaluationData(QuestionSettings, TokenizedModule):
    """The questions of an evaluation, for `Evaluation`. `QuestionSettings` explains the arguments."""

    def initialize(self) -> None:
        self.parts: list[Part] = []

    def prepare_data(self) -> None:
        needed = [*self.texts.values()]
        if self.needle is not None:
            needed.append(self.needle.haystack)
        if self.retrieval is not None and self.retrieval.path == FUNCTIONS:
            needed.append(Source("documentation:wiki"))
        for source in needed:
            if source.is_documentation:
                local_files(source.path, source, self.cache_dir)

    def setup(self, stage: str) -> None:
        """Reads and encodes all questions except the academic ones, which the harness reads itself.

        Raises:
            ValueError: a file cannot be read, or a row is not a question; the message names file and row.
        """
        if self.parts:
            return
        ends = end_ids(self.tokenizer)
        parts: list[Part] = [AcademicQuestions(task, self.directory, self.limit, self.seed) for task in self.tasks]
        for name, source in self.texts.items():
            parts.append(text_rows(name, source, self.text_rows, self.context_length, self.tokenizer, self.cache_dir))
        if self.needle is not None:
            parts += make_needles(self.needle, self.context_length, self.seed, self.tokenizer, self.cache_dir)
        if self.retrieval is not None:
            parts.append(passage_questions(self.retrieval, self.tokenizer, ends, self.seed, self.cache_dir))
        if self.mt_bench is not None:
            parts.append(chat_questions("mt_bench", self.mt_bench, self.tokenizer, ends, self.seed, self.cache_dir))
        if self.wildbench is not None:
            parts.append(chat_questions("wildbench", self.wildbench, self.tokenizer, ends, self.seed, self.cache_dir))
        self.parts = parts

    def shown_sources(self, examples: int, rows: int) -> Iterator[ShownSource]:
        """Yields what `inspect` shows of each part. The parts have their own limits, so `rows` limits nothing."""
        self.prepare_data()
        self.setup("test")
        for part in self.parts:
            yield part.shown(examples, self.tokenizer)

    def test_dataloader(self) -> DataLoader[int]:
        """Returns a loader of part numbers. Lightning would convert and move the contents of the parts themselves."""
        return DataLoader(PartNumbers(len(self.parts)), batch_size=None)


@dataclass(frozen=True)
class PartNumbers(Dataset[int]):
    """The numbers of the parts of an evaluation, from 0."""

    parts: int

    def __len__(self) -> int:
        return self.parts

    def __getitem__(self, number: int) -> int:
        return number
