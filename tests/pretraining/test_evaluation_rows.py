"""Held-out rows: what they hold, how the ranks share them, and the losses and sizes that are measured on them."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from lightning_danube.model import DecoderShape
from lightning_danube.pretraining import Pretraining
from lightning_danube.pretraining import data as data_module
from lightning_danube.pretraining.curriculum import Stage
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.training.contract import IGNORE_INDEX
from lightning_danube.training.optim import LearningRate

Data = Callable[..., CurriculumData]


@pytest.fixture
def data(small_data: Data) -> Data:
    """Data with long rows, all of which are validated."""

    def make(**options: Any) -> CurriculumData:
        sizes = {"context_length": 100, "batch_tokens": 800, "micro_batch_size": 4, "validation_rows": 1000}
        stages = [Stage("a", 5_000, {"web": 0.9, "wiki": 0.1})]
        return small_data(**{"stages": stages, **sizes, **options})

    return make


def small_task(module: CurriculumData, **options: Any) -> Pretraining:
    torch.manual_seed(0)
    shape = DecoderShape(32, 64, 2, 4, 2, initializer_range=0.2)
    facts = {name: getattr(module, name) for name in ("vocab_size", "context_length", "batch_tokens", "total_tokens")}
    return Pretraining(LearningRate(1e-3, 1e-4, 0), decoder=shape, **facts, **options)


def documents_of(ids: list[int], end: int) -> list[slice]:
    """The places of each document of a row; an end token belongs to its document."""
    behind = [place + 1 for place, token in enumerate(ids) if token == end]
    return [slice(start, stop) for start, stop in pairwise(sorted({0, *behind, len(ids)}))]


@torch.no_grad()
def test_a_masked_validation_loss_is_that_of_single_documents(data: Data) -> None:
    module = data(document_masks=True, validation_rows=3)
    task = small_task(module).double().eval()
    for loader in module.val_dataloader():
        (batch,) = loader
        total, count = task.sum_of_losses(batch)
        losses = []
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            for place in documents_of(ids.tolist(), module.tokenizer.eos_id):
                logits = task.decoder(ids[None, place])[0]
                losses.append(functional.cross_entropy(logits, labels[place], reduction="sum"))
        assert count == 300 and len(losses) > 5, "without several documents in a row there is nothing to mask"
        # Rotations are in float32, and a document begins at another position when it is alone.
        assert float(total) == pytest.approx(float(sum(losses)), rel=1e-7)
        batch.pop("document_ids")
        assert float(task.sum_of_losses(batch)[0]) != pytest.approx(float(total), rel=1e-4)


def test_without_masks_a_row_is_one_text(data: Data) -> None:
    batch = next(iter(data().val_dataloader()[0]))
    assert "document_ids" not in batch


def test_the_unigram_loss_is_measured_on_the_rows_of_the_validation(data: Data) -> None:
    module = data(validation_rows=2, context_length=20, batch_tokens=160)
    losses = module.unigram_losses()
    for name, loader in zip(module.sources, module.val_dataloader(), strict=True):
        labels = torch.cat([batch["labels"].flatten() for batch in loader])
        assert len(labels) == 40
        stream = module.shards[name].tokens("train")
        counts = Counter(stream.read(0, len(stream)).tolist())
        total = len(stream) + module.vocab_size
        nats = [np.log(total / (counts[token] + 1)) for token in labels.tolist()]
        assert losses[name] == pytest.approx(float(np.mean(nats)), rel=1e-12)


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
@pytest.mark.parametrize("verb", ["val", "test", "predict"])
def test_all_ranks_get_equally_many_batches_and_each_row_comes_once(
    data: Data, monkeypatch: pytest.MonkeyPatch, replicas: int, verb: str
) -> None:
    module = data(context_length=30, batch_tokens=240, micro_batch_size=2, validation_rows=5)
    sizes: list[list[list[int]]] = []
    rows: list[list[int]] = []
    for replica in range(replicas):
        monkeypatch.setattr(data_module, "replicas_of", lambda trainer, replica=replica: (replicas, replica))
        loaders = getattr(module, f"{verb}_dataloader")()
        batches = [[batch["rows"] for batch in loader] for loader in loaders]
        sizes.append([[len(batch) for batch in loader] for loader in batches])
        rows += [[row for batch in loader for row in batch] for loader in batches]
    assert all(size == sizes[0] for size in sizes)
    for number, name in enumerate(module.sources):
        found = sorted(row for one in rows[number :: len(module.sources)] for row in one if row >= 0)
        stream = module.shards[name].tokens("validation")
        expected = -(-(len(stream) - 1) // 30)
        assert expected > 6
        assert found == list(range(min(expected, 5) if verb == "val" else expected))


def test_an_empty_row_counts_no_token(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    module = data(validation_rows=3)
    monkeypatch.setattr(data_module, "replicas_of", lambda trainer: (2, 1))
    (batch,) = list(module.val_dataloader()[0])
    assert batch["rows"] == [1, -1]
    assert (batch["labels"][1] == IGNORE_INDEX).all() and (batch["labels"][0] != IGNORE_INDEX).all()
    assert batch["source"] == "web"


@pytest.mark.parametrize("limit", [1, 3, None])
def test_sizes_are_those_of_the_predicted_tokens(data: Data, limit: int | None) -> None:
    module = data()
    tokens, sizes = module.evaluation_tokens(limit), module.evaluation_bytes(limit)
    for name in module.sources:
        stream = module.shards[name].tokens("validation")
        predicted = stream.read(1, len(stream))[: None if limit is None else 100 * limit]
        assert tokens[name] == len(predicted)
        # Special tokens have no text.
        text = str(module.tokenizer.hf.decode([token for token in predicted.tolist() if token > 2]))
        assert sizes[name] == len(text.encode())


def test_the_test_set_is_the_held_out_split_and_shares_no_row_with_training(data: Data) -> None:
    module = data()
    for loader, name in zip(module.test_dataloader(), module.sources, strict=True):
        held_out = module.shards[name].tokens("validation")
        labels = torch.cat([batch["labels"].flatten() for batch in loader])
        assert labels[labels != IGNORE_INDEX].tolist() == held_out.read(1, len(held_out)).tolist()
        kept, learned = (
            {tuple(ids[place]) for place in documents_of(ids, module.tokenizer.eos_id)}
            for ids in (one.read(0, len(one)).tolist() for one in (held_out, module.train_streams[name]))
        )
        assert len(kept) > 5 and len(learned) > 100 and not kept & learned


def test_options_of_the_task_reach_the_decoder_and_the_optimizer(data: Data) -> None:
    from lightning_danube.training.optim import AdamW

    module = data()
    plain, other = small_task(module), small_task(module, activation_checkpointing=True, optimizer=AdamW(eps=1e-3))
    assert not plain.decoder.activation_checkpointing and other.decoder.activation_checkpointing
    assert (plain.optimizer_settings, other.optimizer_settings) == (AdamW(), AdamW(eps=1e-3))
    assert (plain.config.vocab_size, plain.config.max_position_embeddings) == (4096, 100)
    assert plain.length_in_tokens() == (800, 5600)


def test_a_training_loss_is_the_mean_over_tokens_and_is_kept_without_its_graph(small_data: Data) -> None:
    module = small_data()
    task = small_task(module)
    batch = next(iter(module.train_dataloader()))
    loss = task.training_step(batch, 0)
    expected = functional.cross_entropy(task.decoder(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
    # float32 logits of order 1.
    assert loss.requires_grad and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (kept,) = task._losses
    assert not kept.requires_grad and kept.item() == loss.item()


def test_dropout_is_seeded_for_each_micro_batch(small_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task(small_data())
    seeded: list[int] = []
    monkeypatch.setattr(task, "seed_dropout", seeded.append)
    monkeypatch.setattr(task, "sum_of_losses", lambda batch: (torch.tensor(6.0), torch.tensor(3)))
    nothing: Any = None
    assert task.training_step(nothing, 7).item() == 2.0 and seeded == []
    task.config = SimpleNamespace(attention_dropout=0.1)  # type: ignore[assignment]
    task.training_step(nothing, 7)
    assert seeded == [7]
