"""The data of a pre-training run: sources, their shards, and a loader whose whole state is one integer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_danube.device import usable_cores
from lightning_danube.durations import parse_tokens
from lightning_danube.files import default_cache_dir
from lightning_danube.pretraining.curriculum import Curriculum, SampleKey, Stage, check_stages, stage_samples
from lightning_danube.pretraining.mixture import IntArray, whole_counts
from lightning_danube.pretraining.order import OrderFacts, check_order, stream_identity
from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Deduplicate, Filters, Quality
from lightning_danube.tokens.preparation import Part, open_or_prepare, prepare
from lightning_danube.tokens.shards import TokenShards, TokenStream, shards_directory
from lightning_danube.tokens.tokenizer import MISTRAL
from lightning_danube.training.contract import IGNORE_INDEX
from lightning_danube.training.loaders import ResumableLoader
from lightning_danube.training.replicas import replicas_of
from lightning_danube.weights.tokenizers import document_tokenizer


class CurriculumData(LightningDataModule):
    """Documents of several sources, mixed in stages.

    Args:
        sources: name → source. The order numbers the sources in logs and tables.
        stages: the curriculum, in order.
        context_length: tokens a training row predicts.
        batch_tokens: tokens of one optimizer step over all devices and accumulated micro-batches ("1.18M" or 4096).
        micro_batch_size: rows a device holds at once; accumulation follows from it and `batch_tokens`.
        tokenizer: "mistral" (Danube3's 32,000 pieces), "danube-small" (few pieces, for models of a few million
            parameters), a directory that the verb `tokenizer` or transformers has written, a hub id, or a model.
        seed: of the order of rows.
        held_out: share of each source's documents kept for validation, chosen by a hash of the text.
        validation_rows: rows of each source on which `validate` and validation in `fit` run; `test` takes all.
        max_passes: how often the run may go through a source before this is an error. Repeating a text up to about
            four times costs little (Muennighoff et al. 2023, arXiv 2305.16264).
        document_masks: keep the packed documents of a row from seeing each other.
        workers: loader processes. 0 reads in the training process, which is fast enough for memory-mapped shards.
        cache_dir: where shards are kept.
        processes: how many tokenize; all cores by default.
        deduplicate: "exact" drops documents whose text stood earlier in the same source, "near" also those that share
            about four fifths of their five-word shingles with an earlier one. Sources are not compared with each other.
        filters: rules for prose that every document of a source has to pass (`{}` for the defaults).
        decontaminate: jsonl or parquet files of evaluation sets. Documents that share 13 words in a row with a text of
            them are dropped, and counted for each file.

    Raises:
        ValueError: for every mistake in the above, with the key's name.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        stages: list[Stage],
        context_length: int,
        batch_tokens: int | str,
        micro_batch_size: int = 8,
        tokenizer: str = MISTRAL,
        seed: int = 0,
        held_out: float = 0.01,
        validation_rows: int = 64,
        max_passes: float = 4.0,
        document_masks: bool = False,
        workers: int = 0,
        cache_dir: str | None = None,
        processes: int | None = None,
        deduplicate: Deduplicate = "none",
        filters: Filters | None = None,
        decontaminate: list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"context_length": context_length, "micro_batch_size": micro_batch_size}.items():
            if value < 1:
                raise ValueError(f"data.{name} is {value}: it must be at least 1")
        if not 0 < held_out < 1:
            raise ValueError(f"data.held_out is {held_out}: give a share between 0 and 1, such as 0.01")
        for name in sources:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"a source is called {name!r}: use letters, digits, - and _")
        check_stages(stages, list(sources))
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
        self.validation_rows, self.max_passes = validation_rows, max_passes
        self.document_masks, self.workers = document_masks, workers
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        if processes is not None and processes < 1:
            raise ValueError(f"data.processes is {processes}: it must be at least 1")
        self.processes = processes or usable_cores()
        self.quality = Quality(deduplicate, filters, tuple(decontaminate or ()))
        self.tokenizer = document_tokenizer(tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        # Known from the stages alone, so that the schedule does not wait for the data.
        self.total_tokens = context_length * sum(
            stage_samples(stage, context_length, self.batch_samples) for stage in stages
        )
        self.samples_done = 0
        self.seconds_to_prepare: dict[str, float] = {}

    # --- shards -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """
        Raises:
            ValueError: the trainer is asked for something that the curriculum decides, or the batch does not divide.
        """
        # Known by now, and collecting text can take minutes.
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self._check_trainer()
        self.seconds_to_prepare = self.prepare()

    def prepare(self, part: Part | None = None) -> dict[str, float]:
        """Makes the shards that are missing, or one part of them; the seconds that each source took."""
        return prepare(
            self.sources,
            self.tokenizer,
            held_out=self.held_out,
            quality=self.quality,
            cache_dir=self.cache_dir,
            processes=self.processes,
            part=part,
        )

    def shards_directories(self) -> dict[str, Path]:
        """Where the shards of each source are, or will be."""
        return {name: self.shards_directory(name) for name in self.sources}

    def shards_directory(self, name: str) -> Path:
        """Where the shards of one source are, or will be."""
        return shards_directory(name, self.sources[name], self.tokenizer, self.held_out, self.quality, self.cache_dir)

    def _open(self, name: str) -> TokenShards:
        shards, _ = open_or_prepare(
            name,
            self.sources[name],
            self.tokenizer,
            held_out=self.held_out,
            cache_dir=self.cache_dir,
            processes=self.processes,
            quality=self.quality,
        )
        return shards

    def setup(self, stage: str) -> None:
        """Opens the shards and, for training, lays out the run.

        Raises:
            ValueError: a source is too small for one row or would be repeated too often.
        """
        self.shards = {name: self._open(name) for name in self.sources}
        self._validation = {name: shards.tokens("validation") for name, shards in self.shards.items()}
        for name, stream in self._validation.items():
            if len(stream) < 2:
                documents = self.shards[name].counts("train").documents
                raise ValueError(
                    f"source {name!r} has {documents} documents, none of them held out: raise data.held_out "
                    f"(now {self.held_out})"
                )
        if stage != "fit":
            return
        train = {name: shards.tokens("train") for name, shards in self.shards.items()}
        for name, stream in train.items():
            if not stream.rows(self.context_length):
                raise ValueError(
                    f"source {name!r} has {len(stream)} tokens of training text, fewer than one row of "
                    f"data.context_length + 1 = {self.context_length + 1}"
                )
        self.train_streams = train
        self.curriculum = Curriculum(
            self.stages,
            {name: stream.rows(self.context_length) for name, stream in train.items()},
            context_length=self.context_length,
            batch_samples=self.batch_samples,
            seed=self.seed,
        )
        self._check_passes()
        if self.trainer is not None:
            self.trainer.accumulate_grad_batches = self._accumulation()

    def _check_passes(self) -> None:
        for name, passes in self.curriculum.passes().items():
            if passes > self.max_passes:
                raise ValueError(
                    f"source {name!r} would be read {passes:.1f} times ({len(self.train_streams[name]):,} tokens), "
                    f"more than data.max_passes = {self.max_passes:g}: add text, lower its share or raise it"
                )

    def _check_trainer(self) -> None:
        """Refuses what the curriculum decides and the trainer would decide otherwise."""
        assert self.trainer is not None
        if self.trainer.max_epochs not in (1, -1, None):
            raise ValueError(
                f"trainer.max_epochs is {self.trainer.max_epochs}: a curriculum is one pass; make its stages longer"
            )
        if self.trainer.accumulate_grad_batches not in (1, self._accumulation()):
            raise ValueError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: it follows from "
                "data.batch_tokens and data.micro_batch_size; leave it out"
            )
        if self.trainer.val_check_interval not in (1.0, None):
            raise ValueError(
                f"trainer.val_check_interval is {self.trainer.val_check_interval}: validation comes at the end of each "
                "stage; for more, give lightning_danube.callbacks.CurriculumStages validate_every in tokens"
            )

    def _accumulation(self) -> int:
        return self.accumulation(replicas_of(self.trainer)[0])

    def accumulation(self, replicas: int) -> int:
        """Micro-batches of one optimizer step on each of so many data-parallel replicas.

        Raises:
            ValueError: they do not divide it.
        """
        held = replicas * self.micro_batch_size
        if self.batch_samples % held:
            fits = [size for size in range(1, self.batch_samples + 1) if self.batch_samples % (replicas * size) == 0]
            whole = max(1, round(self.batch_samples / replicas)) * replicas * self.context_length
            numbers = (
                f"data.micro_batch_size = {_listed(fits)} would"
                if fits
                else f"no data.micro_batch_size would, a multiple of {replicas} rows does: data.batch_tokens = {whole}"
            )
            raise ValueError(
                f"a step of {self.batch_samples} rows (data.batch_tokens / data.context_length) does not divide into "
                f"{replicas} device(s) × {self.micro_batch_size} rows: {numbers}"
            )
        return self.batch_samples // held

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {
            "samples": self.trainer.global_step * self.batch_samples,
            "tokenizer": self.tokenizer.identity(),
            "order": asdict(self.order_facts()),
        }

    def order_facts(self) -> OrderFacts:
        """What decides which tokens stand at each position of the run."""
        return OrderFacts(
            seed=self.seed,
            context_length=self.context_length,
            batch_samples=self.batch_samples,
            stages=[
                # In the order of the sources, as the mixture takes them: it decides ties.
                (stage.name, span.samples, whole_counts({name: stage.mix.get(name, 0.0) for name in self.sources}))
                for stage, span in zip(self.stages, self.curriculum.spans, strict=True)
            ],
            sources={name: stream_identity(stream) for name, stream in self.train_streams.items()},
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        made_with = state_dict["tokenizer"]
        if made_with["fingerprint"] != self.tokenizer.fingerprint:
            raise ValueError(
                f"the checkpoint was trained with the tokenizer {made_with['name']!r} ({made_with['fingerprint']}), "
                f"data.tokenizer is {self.tokenizer.name!r} ({self.tokenizer.fingerprint}): use the same one"
            )
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        samples = int(state_dict["samples"])
        if "order" in state_dict:
            check_order(OrderFacts(**state_dict["order"]), self.order_facts(), samples)
        self.samples_done = samples

    # --- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        replicas, replica = replicas_of(self.trainer)
        sampler = CurriculumSampler(
            self.curriculum,
            micro_batch_size=self.micro_batch_size,
            replicas=replicas,
            replica=replica,
            start=self.samples_done,
        )
        rows = TrainingRows(
            [self.train_streams[name] for name in self.curriculum.sources], self.context_length, self._document_end()
        )
        return CurriculumLoader(rows, sampler, self.workers)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluation_loaders(self.validation_rows)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluation_loaders(None)

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluation_loaders(None)

    def _evaluation_loaders(self, limit: int | None) -> list[DataLoader[Any]]:
        """One loader a source. Each replica gets the same number of batches, so that sharded models stay in step."""
        replicas, replica = replicas_of(self.trainer)
        loaders = []
        for name, stream in self._validation.items():
            rows = np.arange(evaluation_rows(stream, self.context_length, limit))
            per_replica = -(-len(rows) // replicas)
            mine = rows[replica::replicas].tolist()
            mine += [-1] * (per_replica - len(mine))
            batches = [mine[i : i + self.micro_batch_size] for i in range(0, len(mine), self.micro_batch_size)]
            dataset = EvaluationBatches(
                name, stream, batches, self.context_length, self.tokenizer.eos_id, self._document_end()
            )
            loaders.append(DataLoader(dataset, batch_size=None))
        return loaders

    def _document_end(self) -> int | None:
        return self.tokenizer.eos_id if self.document_masks else None

    def evaluation_tokens(self, limit: int | None) -> dict[str, int]:
        """Tokens predicted in each source's held-out rows, at most `limit` rows."""
        return {
            name: min(evaluation_rows(stream, self.context_length, limit) * self.context_length, len(stream) - 1)
            for name, stream in self._validation.items()
        }

    def evaluation_bytes(self, limit: int | None) -> dict[str, int]:
        """Returns for each source the UTF-8 bytes of the text that those tokens stand for."""
        return {
            name: len(self.tokenizer.text(self._validation[name].read(1, n + 1)).encode())
            for name, n in self.evaluation_tokens(limit).items()
        }

    def unigram_losses(self) -> dict[str, float]:
        """Nats a token of a unigram model of each source (training counts plus one) on its validation rows.

        What a model has to beat before it can be said to have learned more than how frequent words are.
        """
        losses = {}
        for name, stream in self._validation.items():
            counts = self.shards[name].tokens("train").token_counts(self.vocab_size) + 1
            nats = np.log(counts.sum()) - np.log(counts)
            rows = evaluation_rows(stream, self.context_length, self.validation_rows)
            labels = stream.read(1, min(rows * self.context_length + 1, len(stream)))
            losses[name] = float(nats[labels].mean())
        return losses


def evaluation_rows(stream: TokenStream, context_length: int, limit: int | None) -> int:
    """Rows of a held-out stream, the last one possibly short; at most `limit`."""
    rows = math.ceil((len(stream) - 1) / context_length)
    return rows if limit is None else min(rows, limit)


class CurriculumSampler(Sampler[Any]):
    """Keys of this replica's micro-batches, (rows, 4) each, from sample `start` to the end of the run.

    An optimizer step is a run of consecutive samples; micro-batch after micro-batch is dealt to the replicas in turn.
    So neither the micro-batch nor the number of replicas changes which samples a step holds.
    """

    def __init__(
        self, curriculum: Curriculum, *, micro_batch_size: int, replicas: int, replica: int, start: int = 0
    ) -> None:
        assert start % curriculum.batch_samples == 0, "training starts at an optimizer step"
        assert curriculum.batch_samples % (micro_batch_size * replicas) == 0
        self.curriculum, self.start = curriculum, start
        self.micro_batch_size, self.replicas, self.replica = micro_batch_size, replicas, replica

    def __len__(self) -> int:
        """Micro-batches of the whole run, wherever it starts: the trainer counts those before as done."""
        return self.curriculum.total_samples // (self.micro_batch_size * self.replicas)

    def __iter__(self) -> Iterator[IntArray]:
        stride = self.micro_batch_size * self.replicas
        chunk = stride * max(1, 4096 // stride)
        for begin in range(self.start, self.curriculum.total_samples, chunk):
            keys = self.curriculum.keys(begin, min(begin + chunk, self.curriculum.total_samples))
            for first in range(self.replica * self.micro_batch_size, len(keys), stride):
                yield keys[first : first + self.micro_batch_size]


class TrainingRows(Dataset[Any]):
    """Reads whole micro-batches by key, in any process, and makes tensors of them in the one that trains.

    Between the two they are arrays, ids as small as they are stored, and go through a pipe: a tensor would go through
    shared memory, whose setting up costs a loader process many times what it takes to read the rows.
    """

    def __init__(self, streams: Sequence[TokenStream], context_length: int, document_end: int | None) -> None:
        self.streams, self.context_length, self.document_end = streams, context_length, document_end
        self._pinned = torch.cuda.is_available()

    def __getitems__(self, keys: IntArray) -> tuple[NDArray[Any], IntArray] | ValueError:
        """The rows of the keys, (rows, context + 1), and the keys; or why there are none, for `batch` to raise, as
        an error raised in a loader process would arrive wrapped into its traceback."""
        try:
            return self._read(keys.tolist()), keys
        except ValueError as error:
            return error

    def _read(self, keys: list[list[int]]) -> NDArray[Any]:
        width = self.context_length + 1
        ids = np.empty((len(keys), width), dtype=self.streams[0].dtype)
        for place, (_, source, _, row) in enumerate(keys):
            start = row * self.context_length
            ids[place] = self.streams[source].read(start, start + width)
        if ids.max() >= self.streams[0].vocab_size:
            for _, source, _, row in keys:
                self.streams[source].row(row, self.context_length)
        return ids

    def batch(self, rows: tuple[NDArray[Any], IntArray] | ValueError) -> dict[str, Any]:
        """input_ids and labels, (rows, context), int64, and the keys.

        Raises:
            ValueError: an id is none of the vocabulary, see `TokenStream.row`.
        """
        if isinstance(rows, ValueError):
            raise rows
        ids, keys = rows
        batch = inputs_and_labels(ids, self.document_end, pinned=self._pinned)
        return batch | {"keys": list(map(SampleKey._make, keys.tolist()))}


class CurriculumLoader(ResumableLoader):
    """Training rows, as tensors only in the process that trains."""

    dataset: TrainingRows
    batch_sampler: CurriculumSampler

    def __iter__(self) -> Any:
        rows: Any = super().__iter__() if self.num_workers else map(self.dataset.__getitems__, self.batch_sampler)
        return map(self.dataset.batch, rows)


class EvaluationBatches(Dataset[Any]):
    """Micro-batches of one held-out stream; row -1 and the end of a short last row count nothing."""

    def __init__(
        self,
        source: str,
        stream: TokenStream,
        batches: list[list[int]],
        context_length: int,
        padding: int,
        document_end: int | None,
    ) -> None:
        self.source, self.stream, self.batches, self.context_length = source, stream, batches, context_length
        self.padding, self.document_end = padding, document_end

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        rows = self.batches[number]
        ids = np.full((len(rows), self.context_length + 1), self.padding, dtype=np.int64)
        lengths = np.zeros(len(rows), dtype=np.int64)
        for place, row in enumerate(rows):
            if row >= 0:
                tokens = self.stream.row(row, self.context_length)
                ids[place, : len(tokens)] = tokens
                lengths[place] = len(tokens) - 1
        batch = inputs_and_labels(ids, self.document_end)
        places = torch.arange(self.context_length)
        batch["labels"] = batch["labels"].masked_fill(places >= torch.from_numpy(lengths)[:, None], IGNORE_INDEX)
        return batch | {"source": self.source, "rows": rows}


def inputs_and_labels(ids: NDArray[Any], document_end: int | None, *, pinned: bool = False) -> dict[str, Any]:
    """Both of (rows, context) from (rows, context + 1) ids; pinned if a device is going to copy them."""
    both = torch.empty((2, len(ids), ids.shape[1] - 1), dtype=torch.int64, pin_memory=pinned)
    into = both.numpy()
    into[0], into[1] = ids[:, :-1], ids[:, 1:]
    batch: dict[str, Any] = dict(zip(("input_ids", "labels"), both.unbind(), strict=True))
    if document_end is not None:
        ends = batch["input_ids"] == document_end
        # A document's end belongs to it; what follows is the next one.
        batch["document_ids"] = ends.cumsum(1) - ends.long()
    return batch


def _listed(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers[-6:]]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " or " + shown[-1]
