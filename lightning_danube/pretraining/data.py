"""The data of a pre-training run: sources, their shards, and a loader whose state is one integer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_danube.device import usable_cores
from lightning_danube.inspection.shown import ShownExample, ShownSource, causes_of, fit_stops_at, shown_tokens
from lightning_danube.model.masks import runs_of
from lightning_danube.pretraining.curriculum import Curriculum, SampleKey
from lightning_danube.pretraining.mixture import whole_counts
from lightning_danube.pretraining.order import OrderFacts, check_order, stream_identity
from lightning_danube.pretraining.settings import CurriculumSettings
from lightning_danube.terminal import amount, tell
from lightning_danube.text.corpora import separator_warning
from lightning_danube.tokens.finished_shards import is_finished
from lightning_danube.tokens.foreign.listing import ForeignTokens
from lightning_danube.tokens.preparation import Sample, WorkPart, open_or_prepare, prepare, prepare_sample
from lightning_danube.tokens.shards import SPLITS, TokenShards
from lightning_danube.tokens.token_sequence import TokenSequence
from lightning_danube.tokens.units import CONTAMINATED
from lightning_danube.training.contract import IGNORE_INDEX
from lightning_danube.training.loaders import ResumableLoader, trains_on_gpu
from lightning_danube.training.passes import IntArray
from lightning_danube.training.position import replicas_of


class CurriculumData(CurriculumSettings, LightningDataModule):
    """Documents of several sources, mixed in stages. `CurriculumSettings` explains the arguments."""

    samples_done = 0
    """Samples that the optimizer had consumed at the checkpoint that the run resumes from."""

    seconds_to_prepare: Mapping[str, float] = MappingProxyType({})
    """Source → seconds to make its shards, 0 for existing shards."""

    _identities: dict[str, dict[str, Any]]

    # --- shards -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Checks the trainer, makes the shards that are missing, and compares their sizes with their listings.

        One process of each node does this.

        Raises:
            ValueError: the trainer has an option that the curriculum decides, the batch does not divide, or a shard is
                damaged.
        """
        # Before the shards, because collecting text can take minutes.
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self._check_trainer()
        self.seconds_to_prepare = self.prepare()
        for name, source in self.sources.items():
            if not source.has_tokens:
                self.shard_facts(name).open().check_sizes()

    def prepare(self, part: WorkPart | None = None) -> dict[str, float]:
        """Makes the missing shards, or one part of them. Returns the seconds that each source took."""
        for name, source in self.sources.items():
            if is_finished(source.path) or source.separator is None:
                continue
            if not self.shards_directory(name).exists():
                warning = separator_warning(name, source, self.cache_dir)
                if warning is not None and (part is None or part[0] == 1):
                    tell(f"warning: {warning}")
        return prepare(
            self.sources,
            self.tokenizer,
            held_out=self.held_out,
            quality=self.quality,
            cache_dir=self.cache_dir,
            processes=self.processes or usable_cores(),
            part=part,
        )

    def _open(self, name: str) -> TokenShards | ForeignTokens:
        shards, _ = open_or_prepare(
            name,
            self.sources[name],
            self.tokenizer,
            held_out=self.held_out,
            cache_dir=self.cache_dir,
            processes=self.processes or usable_cores(),
            quality=self.quality,
        )
        return shards

    # --- what `inspect` shows -----------------------------------------------------------------------------------------

    def shown_sources(self, examples: int, rows: int) -> Iterator[ShownSource]:
        for name, source in self.sources.items():
            if source.has_tokens:
                yield self._shown_token_files(name, examples)
                continue
            if is_finished(source.path):
                shown = self._shown_source(name, self._open(name), examples)
                shown.notes.append("finished shards: what was left out when they were made is in their report.json")
                yield shown
                continue
            with tempfile.TemporaryDirectory() as directory:
                sample = prepare_sample(Path(directory) / name, self.shard_facts(name), rows=rows)
                yield self._shown_sample(name, sample, examples)

    def _shown_sample(self, name: str, sample: Sample, examples: int) -> ShownSource:
        unit, account = sample.unit, sample.unit.account
        shown = self._shown_source(name, sample.shards, examples)
        rejected = account["rejected"]
        shown.read, shown.complete = account["read"] + len(rejected), sample.complete
        shown.lengths = unit.lengths.tolist()
        shown.over_limit = ("longer than a row", int((unit.lengths > self.context_length + 1).sum()))
        shown.left_out, shown.places = causes_of([*rejected, *account["removed"]])
        shown.left_out |= {f"filter: {rule}": count for rule, count in account["filtered"].items()}
        if account["contaminated"]:
            shown.left_out[CONTAMINATED] = account["contaminated"]
        if sample.duplicates:
            shown.left_out[f"duplicates ({self.quality.deduplicate})"] = sample.duplicates
        if account["cut"]:
            shown.notes.append(f"long documents were cut: {amount(account['cut'], 'more piece')}")
        if (warning := separator_warning(name, self.sources[name], self.cache_dir)) is not None:
            shown.warnings.append(warning)
        if rejected and self.sources[name].on_bad_row == "error":
            option = f"data.sources.{name}.on_bad_row"
            shown.warnings.append(fit_stops_at(rejected[0], option, shown.kept))
        if sample.complete and sample.shards is not None:
            if len(sample.shards.tokens("validation")) < 2:
                shown.warnings.append(
                    f"fit refuses this source, because none of its documents is held out: raise data.held_out (now "
                    f"{self.held_out})"
                )
            if not sample.shards.tokens("train").rows(self.context_length):
                shown.warnings.append(
                    "fit refuses this source, because its training text is shorter than one row of "
                    f"data.context_length + 1 = {self.context_length + 1} tokens"
                )
        return shown

    def _shown_token_files(self, name: str, examples: int) -> ShownSource:
        files = self._open(name)
        assert isinstance(files, ForeignTokens)
        shown = self._shown_source(name, files, examples)
        shown.notes.append(files.described())
        shown.notes.append("rules for documents (data.filters, deduplicate, decontaminate) do not apply to token files")
        if self.tokenizer.bos_id is not None and not files.facts.begin_token:
            shown.notes.append("documents begin without the begin token, which documents of text sources have")
        if (doubt := files.doubt()) is not None:
            shown.warnings.append(doubt)
        return shown

    def _shown_source(self, name: str, shards: TokenShards | ForeignTokens | None, examples: int) -> ShownSource:
        """Returns the first training rows of a source. `limit` and `lengths` are those of the documents."""
        shown = ShownSource(name, "documents", self.sources[name].path, limit=self.context_length + 1)
        if shards is None:
            return shown
        documents = [shards.counts(split).documents for split in SPLITS]
        known = [number for number in documents if number is not None]
        shown.tokens = sum(shards.counts(split).tokens for split in SPLITS)
        shown.marked_tokens = max(0, shards.counts("train").tokens - 1)
        if len(known) == len(SPLITS):
            shown.kept = shown.read = sum(known)
            shown.notes = [f"held out for validation: {known[-1]:,} of {shown.kept:,}"]
        else:  # token files that list no documents
            shown.unit, shown.kept = "", 1
        stream = shards.tokens("train")
        for row in range(min(examples, -(-len(stream) // self.context_length))):
            ids = stream.row(row, self.context_length)
            if len(ids) < 2:
                break
            batch = inputs_and_labels(ids[None], self._document_end())
            learned = [False, *(batch["labels"][0] != IGNORE_INDEX).tolist()]
            notes = []
            if "document_ids" in batch:
                count = int(batch["document_ids"][0, -1]) + 1
                notes.append(f"{count} documents, each of which sees only its own tokens")
            tokens = shown_tokens(self.tokenizer.hf, [*batch["input_ids"][0].tolist(), int(ids[-1])], learned)
            shown.examples.append(ShownExample(f"row {row + 1} of the training text", tokens, notes))
        return shown

    def setup(self, stage: str) -> None:
        """Opens the shards and, for training, makes the curriculum.

        Raises:
            ValueError: a source is too small for one row, has no held-out document, or would be repeated too often.
        """
        self.shards = {name: self._open(name) for name in self.sources}
        self._validation = {name: shards.tokens("validation") for name, shards in self.shards.items()}
        for name, stream in self._validation.items():
            if len(stream) < 2:
                counts = self.shards[name].counts("train")
                has = f"{counts.tokens} tokens" if counts.documents is None else f"{counts.documents} documents"
                raise ValueError(
                    f"source {name!r} has {has}, none of them held out: raise data.held_out (now {self.held_out})"
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
        self.train_streams, self._identities = train, {}
        self.curriculum = Curriculum(
            self.stages,
            {name: stream.rows(self.context_length) for name, stream in train.items()},
            context_length=self.context_length,
            batch_samples=self.batch_samples,
            seed=self.seed,
        )
        self._check_epochs()

    def _check_epochs(self) -> None:
        for name, epochs in self.curriculum.passes().items():
            if epochs > self.max_epochs:
                raise ValueError(
                    f"source {name!r} would be read for {epochs:.1f} epochs of "
                    f"{len(self.train_streams[name]):,} tokens, more than data.max_epochs = {self.max_epochs:g}: "
                    "add text, lower its share or raise max_epochs"
                )

    def _check_trainer(self) -> None:
        """Refuses trainer options that contradict the curriculum."""
        assert self.trainer is not None
        if self.trainer.max_epochs not in (1, -1, None):
            raise ValueError(
                f"trainer.max_epochs is {self.trainer.max_epochs}: a curriculum is one epoch; make its stages longer"
            )
        if self.trainer.accumulate_grad_batches not in (1, self.accumulation(replicas_of(self.trainer)[0])):
            raise ValueError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: it follows from "
                "data.batch_tokens and data.micro_batch_size; leave it out"
            )
        if self.trainer.val_check_interval not in (1.0, None):
            raise ValueError(
                f"trainer.val_check_interval is {self.trainer.val_check_interval}: validation comes at the end of each "
                "stage; for more, give lightning_danube.callbacks.CurriculumStages validate_every in tokens"
            )

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {
            "samples": self.trainer.global_step * self.batch_samples,
            "tokenizer": self.tokenizer.identity(),
            "order": asdict(self.order_facts()),
        }

    def order_facts(self) -> OrderFacts:
        """Returns the facts that decide which tokens are at each position of the run."""
        # Read once, because every checkpoint holds them.
        self._identities = self._identities or {
            name: stream_identity(stream) for name, stream in self.train_streams.items()
        }
        return OrderFacts(
            seed=self.seed,
            context_length=self.context_length,
            batch_samples=self.batch_samples,
            stages=[
                # In the order of the sources, as in the mixture, because the order decides ties.
                (stage.name, span.samples, whole_counts({name: stage.mix.get(name, 0.0) for name in self.sources}))
                for stage, span in zip(self.stages, self.curriculum.spans, strict=True)
            ],
            sources=self._identities,
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
        return CurriculumLoader(rows, sampler, self.workers, on_gpu=trains_on_gpu(self.trainer))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluation_loaders(self.validation_rows)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluation_loaders(None)

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return self._evaluation_loaders(None)

    def _evaluation_loaders(self, limit: int | None) -> list[DataLoader[Any]]:
        """Returns one loader per source. All replicas get equally many batches, so that sharded models stay in step."""
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
        """Returns for each source the predicted tokens in its held-out rows, in at most `limit` rows."""
        return {
            name: min(evaluation_rows(stream, self.context_length, limit) * self.context_length, len(stream) - 1)
            for name, stream in self._validation.items()
        }

    def evaluation_bytes(self, limit: int | None) -> dict[str, int]:
        """Returns for each source the UTF-8 bytes of the text of its `evaluation_tokens`."""
        return {
            name: len(self.tokenizer.text(self._validation[name].read(1, n + 1)).encode())
            for name, n in self.evaluation_tokens(limit).items()
        }

    def counted_tokens(self) -> dict[str, int]:
        """Returns the number of training tokens behind the unigram loss of a source, for sources that have more."""
        files = {name: shards.facts for name, shards in self.shards.items() if isinstance(shards, ForeignTokens)}
        return {name: facts.counted for name, facts in files.items() if facts.counted < len(self.train_streams[name])}

    def unigram_losses(self) -> dict[str, float]:
        """Returns the loss of a unigram model (training counts plus one) on each source's validation rows.

        The unit is nats/token. A model above this loss has not learned more than the frequencies of tokens.
        """
        losses = {}
        for name, stream in self._validation.items():
            counts = self.shards[name].token_counts("train") + 1
            nats = np.log(counts.sum()) - np.log(counts)
            rows = evaluation_rows(stream, self.context_length, self.validation_rows)
            labels = stream.read(1, min(rows * self.context_length + 1, len(stream)))
            losses[name] = float(nats[labels].mean())
        return losses


def evaluation_rows(stream: TokenSequence, context_length: int, limit: int | None) -> int:
    """Returns the number of rows of a held-out stream, at most `limit`. The last row may be short."""
    rows = math.ceil((len(stream) - 1) / context_length)
    return rows if limit is None else min(rows, limit)


class CurriculumSampler(Sampler[Any]):
    """Yields the keys of this replica's micro-batches, (rows, 4) each, from sample `start` to the end of the run.

    An optimizer step consists of consecutive samples, and the replicas take its micro-batches in turn. So neither the
    micro-batch size nor the number of replicas changes the samples of a step.
    """

    def __init__(
        self, curriculum: Curriculum, *, micro_batch_size: int, replicas: int, replica: int, start: int = 0
    ) -> None:
        assert start % curriculum.batch_samples == 0, "training starts at an optimizer step"
        assert curriculum.batch_samples % (micro_batch_size * replicas) == 0
        self.curriculum, self.start = curriculum, start
        self.micro_batch_size, self.replicas, self.replica = micro_batch_size, replicas, replica

    def __len__(self) -> int:
        """Returns the micro-batches of the whole run, for any `start`: the trainer counts the earlier ones as done."""
        return self.curriculum.total_samples // (self.micro_batch_size * self.replicas)

    def __iter__(self) -> Iterator[IntArray]:
        stride = self.micro_batch_size * self.replicas
        chunk = stride * max(1, 4096 // stride)
        for begin in range(self.start, self.curriculum.total_samples, chunk):
            keys = self.curriculum.keys(begin, min(begin + chunk, self.curriculum.total_samples))
            for first in range(self.replica * self.micro_batch_size, len(keys), stride):
                yield keys[first : first + self.micro_batch_size]


class TrainingRows(Dataset[Any]):
    """Reads whole micro-batches by key, in any process, and converts them to tensors in the training process.

    Loader processes send arrays, with ids in their small stored type, through a pipe. Tensors would go through shared
    memory, whose setup costs a loader process many times as much as reading the rows.
    """

    def __init__(self, streams: Sequence[TokenSequence], context_length: int, document_end: int | None) -> None:
        self.streams, self.context_length, self.document_end = streams, context_length, document_end

    def __getitems__(self, keys: IntArray) -> tuple[NDArray[Any], IntArray] | ValueError:
        """Returns the rows of the keys, (rows, context + 1), and the keys; or the error that `batch` must raise.

        An error raised in a loader process would arrive wrapped in that process's traceback.
        """
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
        """Returns input_ids and labels, (rows, context), int64, and the keys.

        Raises:
            ValueError: an id is not in the vocabulary, see `TokenSequence.row`.
        """
        if isinstance(rows, ValueError):
            raise rows
        ids, keys = rows
        batch = inputs_and_labels(ids, self.document_end)
        return batch | {"keys": list(map(SampleKey._make, keys.tolist()))}


class CurriculumLoader(ResumableLoader):
    """Loads training rows, and converts them to tensors only in the training process."""

    dataset: TrainingRows
    batch_sampler: CurriculumSampler

    def batches(self) -> Iterator[Any]:
        rows: Any = super().batches() if self.num_workers else map(self.dataset.__getitems__, self.batch_sampler)
        return map(self.dataset.batch, rows)


class EvaluationBatches(Dataset[Any]):
    """Micro-batches of one held-out stream. The loss ignores row -1 and the padding of a short last row."""

    def __init__(
        self,
        source: str,
        stream: TokenSequence,
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


def inputs_and_labels(ids: NDArray[Any], document_end: int | None) -> dict[str, Any]:
    """Returns input_ids and labels, (rows, context) each, from (rows, context + 1) ids.

    Args:
        document_end: id that ends a document, to add document_ids and document_runs; None: neither of them.
    """
    both = torch.empty((2, len(ids), ids.shape[1] - 1), dtype=torch.int64)
    into = both.numpy()
    into[0], into[1] = ids[:, :-1], ids[:, 1:]
    batch: dict[str, Any] = dict(zip(("input_ids", "labels"), both.unbind(), strict=True))
    if document_end is not None:
        ends = batch["input_ids"] == document_end
        # The end token belongs to its document; the next document begins after it.
        batch["document_ids"] = ends.cumsum(1) - ends.long()
        batch["document_runs"] = runs_of(batch["document_ids"])
    return batch
