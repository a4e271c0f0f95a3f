"""The questions of an evaluation: a list of parts, each with one or a few rows of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_danube.evaluation.academic_tasks import AcademicTask, academic_tasks
from lightning_danube.evaluation.asking import Part
from lightning_danube.evaluation.parts.academic import AcademicQuestions
from lightning_danube.evaluation.parts.chat import ChatOptions, chat_questions
from lightning_danube.evaluation.parts.needles import NeedleOptions, make_needles
from lightning_danube.evaluation.parts.passages import FUNCTIONS, RetrievalOptions, passage_questions
from lightning_danube.evaluation.parts.perplexity import text_rows
from lightning_danube.files import default_cache_dir
from lightning_danube.inspection.shown import ShownSource
from lightning_danube.options import options
from lightning_danube.text.corpora import Source, local_files
from lightning_danube.tokens.chat_template import end_ids
from lightning_danube.weights.tokenizers import tokenizer_of


class EvaluationData(LightningDataModule):
    """The questions of an evaluation, for `Evaluation`. Only the benchmarks that are given are run.

    Args:
        tokenizer: "danube-small", "mistral", a directory, a hub id, or a model, whose tokenizer is then used.
        tasks: academic benchmarks, by their names in the lm-evaluation-harness.
        directory: directory of the academic benchmarks' files, with the hub's layout:
            `<directory>/allenai/ai2_arc/ARC-Challenge/test.jsonl`. If not given, the files come from the hub.
        limit: most questions of an academic benchmark, chosen by the seed.
        mt_bench, wildbench: chat benchmarks. Scores need `lightning_danube.callbacks.Judge`; without it, only the
            answers are written.
        retrieval: questions to be answered from passages.
        texts: source → place of its running text, for the perplexity.
        text_rows: most rows of `context_length` tokens from each source of running text; the first rows are used.
        needle: needles in haystacks.
        context_length: tokens of a row of text, and most tokens of a haystack.
        seed: seed of every random choice.
        cache_dir: directory of the embedded texts.

    Raises:
        ValueError: an argument is wrong; the message names the key.
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        tasks: Sequence[str] = (),
        directory: str | None = None,
        limit: int | None = None,
        mt_bench: ChatOptions | None = None,
        wildbench: ChatOptions | None = None,
        retrieval: RetrievalOptions | None = None,
        texts: dict[str, Source] | None = None,
        text_rows: int = 32,
        needle: NeedleOptions | None = None,
        context_length: int = 512,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("limit", limit), ("text_rows", text_rows)):
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}: it must be at least 1")
        if context_length < 2:
            raise ValueError(f"data.context_length is {context_length}: it must be at least 2")
        self.directory = None if directory is None else Path(directory).expanduser()
        if self.directory is not None and not self.directory.is_dir():
            raise ValueError(f"data.directory: there is no directory {directory}")
        self.tasks: list[AcademicTask] = academic_tasks(tasks)
        if not any((tasks, mt_bench, wildbench, retrieval, texts, needle)):
            raise ValueError("data: nothing is asked: give tasks, mt_bench, wildbench, retrieval, texts or needle")
        self.limit, self.seed = limit, seed
        self.mt_bench = None if mt_bench is None else options(ChatOptions, mt_bench, "data.mt_bench")
        self.wildbench = None if wildbench is None else options(ChatOptions, wildbench, "data.wildbench")
        self.retrieval = None if retrieval is None else options(RetrievalOptions, retrieval, "data.retrieval")
        self.needle = None if needle is None else options(NeedleOptions, needle, "data.needle")
        self.texts = {name: options(Source, source, f"data.texts.{name}") for name, source in (texts or {}).items()}
        self.text_rows, self.context_length = text_rows, context_length
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.tokenizer_name, self.tokenizer = tokenizer_of(tokenizer)
        self.vocab_size = len(self.tokenizer)
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
