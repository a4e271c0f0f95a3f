"""The settings of an evaluation, without Lightning and without PyTorch.

A wrong setting is refused before anything large is imported. `EvaluationData` and `Evaluation` add the code that asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_danube.evaluation.academic_tasks import AcademicTask, academic_tasks
from lightning_danube.files import default_cache_dir
from lightning_danube.options import options
from lightning_danube.text.corpora import DOCUMENTATION, Source
from lightning_danube.weights.loading import check_dtype

FUNCTIONS = f"{DOCUMENTATION}functions"
"""The embedded data set: questions that quote the documentation of a function of the standard library, and ask for the
function's name."""


@dataclass(frozen=True)
class ChatOptions:
    """Options of a chat benchmark.

    Args:
        path: the benchmark's questions. MT-Bench: rows with question_id, category and turns. WildBench: rows as in
            its data set on the hub, "allenai/WildBench", with id, conversation_input and checklist.
        references: MT-Bench's reference answers for the judge: rows with question_id and choices, in its authors'
            format.
        name, split: configuration and split of a data set on the hub ("v2" and "test" for WildBench).
        limit: most questions, chosen by the seed.
        keep: directory for `<benchmark>-answers.jsonl` and `<benchmark>-judgements.jsonl`, written line by line. A
            later run reuses answers and judgements that were made with the same settings.
        new_tokens: most tokens of an answer.
    """

    path: str
    references: str | None = None
    name: str | None = None
    split: str = "train"
    limit: int | None = None
    keep: str = "runs/chat-answers"
    new_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("limit", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")


@dataclass(frozen=True)
class NeedleOptions:
    """A sentence with a number in a long text, and at the text's end a question for the number.

    Args:
        lengths: tokens of the whole prompt; powers of two up to the context if not given.
        depths: places of the sentence, as the share of the text before the sentence.
        haystack: the text around the sentence.
        trials: sentences at each length and depth.
    """

    lengths: Sequence[int] | None = None
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    haystack: Source = Source("documentation:wiki")  # noqa: RUF009  (frozen)
    trials: int = 4

    def __post_init__(self) -> None:
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"data.needle.depths is {list(self.depths)}: give shares from 0 to 1")
        if self.trials < 1:
            raise ValueError(f"data.needle.trials is {self.trials}: it must be at least 1")


@dataclass(frozen=True)
class RetrievalOptions:
    """Options of the questions about passages.

    Args:
        path: "documentation:functions" (the embedded data set), or rows with `question`, `answers` (one text or a list
            of accepted texts) and, unless there is a corpus, `passages` (a list of texts).
        corpus: rows with `text`; each question gets the most similar texts.
        passages: number of texts that a question gets from the corpus.
        limit: most questions, chosen by the seed.
        new_tokens: most tokens of an answer.
    """

    path: str = FUNCTIONS
    corpus: str | None = None
    passages: int = 3
    limit: int | None = None
    new_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("passages", "limit", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.retrieval.{name} is {value}: it must be at least 1")


class QuestionSettings:
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
        self.tokenizer_given = tokenizer
        super().__init__()  # of the data module that inherits from these settings


@dataclass(frozen=True)
class EvaluationSettings:
    """The arguments of `Evaluation` and their defaults. `Evaluation` explains the arguments.

    Raises:
        ValueError: an argument is wrong; the message names the key.
    """

    weights: str
    dtype: str | None = None
    places: int = 8192
    chat_template: bool = False

    def __post_init__(self) -> None:
        if self.places < 1:
            raise ValueError(f"model.places is {self.places}: it must be at least 1")
        if self.dtype is not None:
            check_dtype(self.dtype, "model.dtype")
