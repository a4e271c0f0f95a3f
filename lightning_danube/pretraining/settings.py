"""The settings of a pre-training run, without Lightning and without PyTorch.

The verb `plan` needs only these settings. `CurriculumData` and `Pretraining` add the code that trains.
"""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

from lightning_danube.files import default_cache_dir
from lightning_danube.model.config import ActivationCheckpointing, DecoderConfig, DecoderShape
from lightning_danube.options import Length, check_processes, options, parse_tokens
from lightning_danube.pretraining.continued_weights import ContinuedWeights
from lightning_danube.pretraining.curriculum import LONGEST_NAME, Stage, check_stages, stage_samples, stages_in_tokens
from lightning_danube.terminal import amount
from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Deduplicate, Filters, Quality
from lightning_danube.tokens.foreign.listing import listing_directory
from lightning_danube.tokens.shards import ShardFacts
from lightning_danube.tokens.tokenizer import MISTRAL, DocumentTokenizer
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.weights.lora import Lora
from lightning_danube.weights.tokenizers import document_tokenizer


@dataclass(frozen=True)
class PretrainingSettings:
    """The arguments of `Pretraining` and their defaults. `Pretraining` explains the arguments."""

    learning_rate: LearningRate
    _: KW_ONLY
    vocab_size: int
    context_length: int
    batch_tokens: int
    total_tokens: int
    tokenizer: DocumentTokenizer | None = None
    decoder: DecoderShape | str | None = None
    weights: str | None = None
    lora: Lora | None = None
    optimizer: AdamW = AdamW()  # noqa: RUF009  (frozen)
    activation_checkpointing: ActivationCheckpointing = False
    compile_blocks: bool | None = None
    float8: bool = False

    def __post_init__(self) -> None:
        rate = options(LearningRate, self.learning_rate, "model.learning_rate")
        rate.check(parse_tokens(self.total_tokens))
        object.__setattr__(self, "learning_rate", rate)
        object.__setattr__(self, "lora", None if self.lora is None else options(Lora, self.lora, "model.lora"))
        if self.decoder is None and self.weights is None:
            raise ValueError(
                "the model has no shape: give model.decoder for random weights, or model.weights for trained ones"
            )
        if self.lora is not None:
            self._check_lora()

    def _check_lora(self) -> None:
        if self.weights is None:
            raise ValueError(
                "model.lora is given, and model.weights names no weights to adapt: name them, or leave lora out"
            )
        optimizer = type(options(AdamW, self.optimizer, "model.optimizer"))
        if optimizer is not AdamW:
            raise ValueError(
                f"model.optimizer is {optimizer.__name__}, which trains whole matrices: use AdamW for lora"
            )
        for name in ("compile_blocks", "float8"):
            if getattr(self, name):
                raise ValueError(
                    f"model.{name} is for whole matrices, not for those of an adapter: leave it or lora out"
                )

    @property
    def config(self) -> DecoderConfig:
        """The complete config of the decoder.

        Raises:
            ValueError: no preset has that name, or the data do not fit the weights.
        """
        if (continued := self.continuation) is not None:
            return continued.config
        assert self.shape is not None
        return self.shape.with_data(self.vocab_size, self.context_length)

    @property
    def shape(self) -> DecoderShape | None:
        """The shape that the configuration states.

        Raises:
            ValueError: no preset has that name.
        """
        if self.decoder is None:
            return None
        try:
            shape = DecoderConfig.preset(self.decoder) if isinstance(self.decoder, str) else self.decoder
        except ValueError as error:
            raise ValueError(f"model.decoder: {error}") from None
        return options(DecoderShape, shape, "model.decoder")

    @cached_property
    def continuation(self) -> ContinuedWeights | None:
        """What the run takes over from trained weights; None for random weights.

        Raises:
            ValueError: the data or the stated shape do not fit the weights.
        """
        if self.weights is None:
            return None
        return ContinuedWeights.of(self.weights, self.shape, self.tokenizer, self.context_length)


class CurriculumSettings:
    """Documents of several sources, mixed in stages.

    Args:
        sources: name → source. The order numbers the sources in logs and tables.
        stages: the curriculum, in order.
        tokens: tokens of the whole run, if stages have their lengths as shares of it.
        context_length: tokens a training row predicts.
        batch_tokens: tokens of one optimizer step over all devices and accumulated micro-batches ("1.18M" or 4096).
        micro_batch_size: rows on a device at once; the accumulation follows from `micro_batch_size` and `batch_tokens`.
        tokenizer: "mistral" (Danube3's 32,000 pieces), "danube-small" (few pieces, for models of a few million
            parameters), a directory that the verb `tokenizer` or transformers has written, a hub id, or a model. On the
            command line the default is that of `model.weights`.
        new_tokens: texts that become new tokens, with the ids after the tokenizer's last one.
        seed: of the order of rows.
        held_out: share of each source's documents kept for validation, chosen by a hash of the text.
        validation_rows: rows of each source for `validate` and for validation in `fit`; `test` takes all rows.
        max_epochs: largest allowed number of epochs over a source. Repeating a text up to about four times costs little
            (Muennighoff et al. 2023, arXiv 2305.16264).
        document_masks: tokens attend only to their own document, not to the other documents packed in the row.
        workers: loader processes. 0 reads in the training process, which is fast enough for shards on a local disk.
        cache_dir: directory for the shards.
        processes: processes that tokenize; all cores by default.
        deduplicate: "exact" drops documents whose text occurred earlier in the same source, "near" also documents that
            share about four fifths of their five-word shingles with an earlier document. Sources are not compared with
            each other.
        filters: rules for prose that every document of a source must pass (`{}` for the defaults).
        decontaminate: jsonl or parquet files of evaluation sets. Documents that share 13 consecutive words with a text
            of these files are dropped, and counted for each file.

    Raises:
        ValueError: an argument is wrong; the message names the config key.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        stages: list[Stage],
        *,
        context_length: int,
        batch_tokens: int | str,
        tokens: Length | None = None,
        micro_batch_size: int = 8,
        tokenizer: str = MISTRAL,
        new_tokens: list[str] | None = None,
        seed: int = 0,
        held_out: float = 0.01,
        validation_rows: int = 64,
        max_epochs: float = 4.0,
        document_masks: bool = False,
        workers: int = 0,
        cache_dir: str | None = None,
        processes: int | None = None,
        deduplicate: Deduplicate = "none",
        filters: Filters | None = None,
        decontaminate: list[str] | None = None,
    ) -> None:
        super().__init__()  # of the data module that inherits from these settings
        sources = {name: options(Source, source, f"data.sources.{name}") for name, source in sources.items()}
        stages = [options(Stage, stage, f"data.stages[{number}]") for number, stage in enumerate(stages)]
        filters = None if filters is None else options(Filters, filters, "data.filters")
        numbers = {"context_length": context_length, "micro_batch_size": micro_batch_size}
        for name, value in {**numbers, "validation_rows": validation_rows}.items():
            if value < 1:
                raise ValueError(f"data.{name} is {value}: it must be at least 1")
        if not max_epochs > 0:
            raise ValueError(f"data.max_epochs is {max_epochs}: give a number above 0")
        if not 0 < held_out < 1:
            raise ValueError(f"data.held_out is {held_out}: give a share between 0 and 1, such as 0.01")
        for name in sources:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"a source is called {name!r}: use letters, digits, - and _")
            if len(name.encode()) > LONGEST_NAME:
                raise ValueError(
                    f"a source is called {name[:20]!r}… ({len(name)} letters): its folders have that name, "
                    f"so give at most {LONGEST_NAME} letters"
                )
        check_stages(stages, list(sources))
        stages = stages_in_tokens(stages, tokens)
        self.sources, self.stages = sources, stages
        self.context_length = context_length
        self.batch_tokens = parse_tokens(batch_tokens, "data.batch_tokens")
        if self.batch_tokens % context_length:
            near = max(1, round(self.batch_tokens / context_length)) * context_length
            raise ValueError(
                f"data.batch_tokens is {self.batch_tokens}, not a multiple of data.context_length ({context_length}): "
                f"{near} would be"
            )
        self.batch_samples = self.batch_tokens // context_length
        self.micro_batch_size = micro_batch_size
        self.seed, self.held_out = seed, held_out
        self.validation_rows, self.max_epochs = validation_rows, max_epochs
        self.document_masks, self.workers = document_masks, workers
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        if processes is not None:
            check_processes(processes, "data.processes", least=1)
        check_processes(workers, "data.workers")
        self.processes = processes
        self.quality = Quality(deduplicate, filters, tuple(decontaminate or ()))
        self.tokenizer = document_tokenizer(tokenizer, new_tokens or ())
        self.vocab_size = self.tokenizer.vocab_size
        # Computed from the stages alone, so that the schedule does not wait for the data.
        self.total_tokens = context_length * sum(
            stage_samples(stage, context_length, self.batch_samples) for stage in stages
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.total_tokens // self.batch_tokens

    def shards_directories(self) -> dict[str, Path]:
        """Returns the directory of each source's shards, which may not exist yet."""
        return {name: self.shards_directory(name) for name in self.sources}

    def shards_directory(self, name: str) -> Path:
        """Returns the directory of one source's shards, or of the listing of its token files. It may not exist yet."""
        source = self.sources[name]
        if source.has_tokens:
            return listing_directory(name, source, self.tokenizer, self.held_out, self.cache_dir)
        return self.shard_facts(name).directory()

    def shard_facts(self, name: str) -> ShardFacts:
        """Returns what decides the shards of one source."""
        source = self.sources[name]
        return ShardFacts(name, source, self.tokenizer, self.held_out, self.quality, self.cache_dir)

    def accumulation(self, replicas: int) -> int:
        """Returns the micro-batches of one optimizer step on each of `replicas` data-parallel replicas.

        Raises:
            ValueError: the rows of a step do not divide evenly.
        """
        held = replicas * self.micro_batch_size
        if self.batch_samples % held:
            fits = [
                size
                for size in range(1, min(self.batch_samples, 4096) + 1)
                if self.batch_samples % (replicas * size) == 0
            ]
            whole = max(1, round(self.batch_samples / replicas)) * replicas * self.context_length
            numbers = (
                f"data.micro_batch_size = {_listed(fits)} would"
                if fits
                else f"no data.micro_batch_size would, a multiple of {replicas} rows does: data.batch_tokens = {whole}"
            )
            raise ValueError(
                f"a step of {self.batch_samples} rows (data.batch_tokens / data.context_length) does not divide into "
                f"{amount(replicas, 'device')} × micro-batch of {amount(self.micro_batch_size, 'row')}: {numbers}"
            )
        return self.batch_samples // held


def step_layout(replicas: int, accumulation: int, micro_batch_size: int, context_length: int) -> str:
    """Returns the parts of an optimizer step, such as "1 device × 2 accumulation steps × micro-batch of 8 rows of 256".

    Args:
        replicas: devices that hold a copy of the model, and read rows of their own.
        accumulation: micro-batches of an optimizer step on each replica.
        micro_batch_size: rows of a micro-batch.
        context_length: tokens of a row.
    """
    return (
        f"{amount(replicas, 'device')} × {amount(accumulation, 'accumulation step')} × micro-batch of "
        f"{amount(micro_batch_size, 'row')} of {context_length:,}"
    )


def _listed(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers[-6:]]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " or " + shown[-1]
