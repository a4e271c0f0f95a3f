"""The settings of an evaluation of quantization, without Lightning and without PyTorch.

A wrong setting is refused before anything large is imported. `TextWindows` and `QuantizationEvaluation` add the code
that measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_danube.files import default_cache_dir
from lightning_danube.options import options, parse_tokens
from lightning_danube.quantization.levels import Level, parse_levels
from lightning_danube.text.corpora import Source


class WindowSettings:
    """The beginning of a text, in windows of one or several lengths.

    A token is predicted from the tokens before it in its window. A window begins with the bos token if there is one.
    How tokens are counted:

    * without `stride`, as in llama.cpp's perplexity program: windows do not overlap, and the second half of each
      window counts;
    * with `stride`, windows slide by `stride` tokens, and the last `stride` tokens of each window count. Every token
      counts once, with the longest context that a window can hold.

    Args:
        text: the source of the text; each of its documents ends with the eos token.
        tokenizer: "danube-small", "mistral", a model, a directory or a hub id.
        held_out: take only the documents that `CurriculumData` with this share keeps out of training.
        context_lengths: lengths of a window in tokens. Everything is measured at the first length; the other lengths
            show how perplexity depends on it.
        stride: number of tokens by which windows slide.
        max_tokens: how much of the text is read ("16K"); the whole text if not given.
        calibration_tokens: number of tokens after the measured text, for methods that calibrate on text; none counts.
        cloze_questions: number of questions. In each, the model has to tell the true continuation from three false
            ones, which are taken from other places of the text.
        cache_dir: where the embedded texts are kept.

    Raises:
        ValueError: an argument is wrong, or the text is too short.
    """

    def __init__(
        self,
        text: Source,
        tokenizer: str,
        *,
        held_out: float | None = None,
        context_lengths: list[int] = [512],  # noqa: B006  (the parser shows it)
        stride: int | None = None,
        max_tokens: int | str | None = "16K",
        calibration_tokens: int | str = "16K",
        cloze_questions: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        if not context_lengths or min(context_lengths) < 4 or len(set(context_lengths)) < len(context_lengths):
            raise ValueError(
                f"data.context_lengths is {context_lengths}: name different numbers of at least 4 tokens, such as [512]"
            )
        if stride is not None and not 1 <= stride < min(context_lengths):
            raise ValueError(
                f"data.stride is {stride}: it must be at least 1 and below the shortest of data.context_lengths "
                f"({min(context_lengths)}), or left out"
            )
        if held_out is not None and not 0 < held_out < 1:
            raise ValueError(f"data.held_out is {held_out}: give a share between 0 and 1, or leave it out")
        if cloze_questions < 0:
            raise ValueError(f"data.cloze_questions is {cloze_questions}: it must be at least 0")
        self.text, self.held_out = options(Source, text, "data.text"), held_out
        self.context_lengths, self.stride = list(context_lengths), stride
        self.max_tokens = None if max_tokens is None else parse_tokens(max_tokens, "data.max_tokens")
        self.calibration_tokens = parse_tokens(calibration_tokens, "data.calibration_tokens")
        self.cloze_questions = cloze_questions
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.tokenizer_given = tokenizer
        super().__init__()  # of the data module that inherits from these settings


@dataclass(frozen=True)
class QuantizationSettings:
    """The arguments of `QuantizationEvaluation` and their defaults. `QuantizationEvaluation` explains the arguments.

    Raises:
        ValueError: a level is unknown.
    """

    weights: str
    levels: list[str]
    cost: bool = True
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        parse_levels(self.levels)

    @property
    def parsed_levels(self) -> list[Level]:
        return parse_levels(self.levels)
