"""Who gets which sample: replicas, micro-batches, workers and starting points never change a step's samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_danube.pretraining.curriculum import Curriculum, SampleKey, Stage
from lightning_danube.pretraining.data import CurriculumData, CurriculumSampler
from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Filters
from lightning_danube.tokens.shards import SPLITS
from lightning_danube.training.contract import IGNORE_INDEX

STAGES = [Stage("a", 5_000, {"web": 0.9, "wiki": 0.1}), Stage("b", 3_000, {"web": 0.5, "wiki": 0.5})]


def curriculum() -> Curriculum:
    return Curriculum(STAGES, {"web": 90, "wiki": 40}, context_length=16, batch_samples=24, seed=5)


def steps(micro_batch_size: int, replicas: int, start: int = 0) -> list[list[SampleKey]]:
    """Samples of each optimizer step, over all replicas, in the order in which they are dealt."""
    run = curriculum()
    samplers = [
        list(CurriculumSampler(run, micro_batch_size=micro_batch_size, replicas=replicas, replica=r, start=start))
        for r in range(replicas)
    ]
    per_step = run.batch_samples // (micro_batch_size * replicas)
    assert len(samplers[0]) % per_step == 0
    return [
        [SampleKey(*key) for k in range(first, first + per_step) for sampler in samplers for key in sampler[k].tolist()]
        for first in range(0, len(samplers[0]), per_step)
    ]


@pytest.mark.parametrize(("micro_batch_size", "replicas"), [(24, 1), (1, 1), (3, 2), (2, 4), (1, 24)])
def test_a_steps_samples_do_not_depend_on_micro_batch_or_replicas(micro_batch_size: int, replicas: int) -> None:
    run = curriculum()
    everything = run.samples(0, run.total_samples)
    expected = [everything[i : i + 24] for i in range(0, len(everything), 24)]
    assert steps(micro_batch_size, replicas) == expected
    assert steps(micro_batch_size, replicas, start=5 * 24) == expected[5:]


def test_the_length_is_the_whole_runs_wherever_it_starts() -> None:
    run = curriculum()
    lengths = {len(CurriculumSampler(run, micro_batch_size=6, replicas=2, replica=0, start=s)) for s in (0, 24, 240)}
    assert lengths == {run.total_samples // 12}


@pytest.fixture
def data(tiny: Path) -> Callable[..., CurriculumData]:
    def make(**options: Any) -> CurriculumData:
        arguments: dict[str, Any] = {
            "sources": {name: Source(str(tiny / f"{name}.jsonl")) for name in ("web", "wiki")},
            "stages": STAGES,
            "context_length": 16,
            "batch_tokens": 16 * 24,
            "micro_batch_size": 6,
            "held_out": 0.05,
            "cache_dir": str(tiny / "cache"),
            "processes": 1,
            "tokenizer": "danube-small",
        }
        module = CurriculumData(**arguments | options)
        module.prepare_data()
        module.setup("fit")
        return module

    return make


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_hold_the_rows_of_their_keys(data: Callable[..., CurriculumData], workers: int) -> None:
    module = data(workers=workers)
    batches = list(module.train_dataloader())
    keys = [key for batch in batches for key in batch["keys"]]
    assert keys == module.curriculum.samples(0, module.curriculum.total_samples)
    for batch in batches[::7]:
        for row, key in enumerate(batch["keys"]):
            tokens = module.train_streams[("web", "wiki")[key.source]].row(key.row, 16).astype(np.int64)
            assert batch["input_ids"][row].tolist() == tokens[:-1].tolist()
            assert batch["labels"][row].tolist() == tokens[1:].tolist()
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["input_ids"].is_contiguous() and batch["labels"].is_contiguous()


@pytest.mark.medium
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_id_stops_the_run_by_name(data: Callable[..., CurriculumData], workers: int) -> None:
    module = data(workers=workers)
    key = module.curriculum[module.curriculum.total_samples // 2]
    name, token = ("web", "wiki")[key.source], key.row * 16 + 5
    shard = module.shards[name].directory / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[content.find(module.train_streams[name].read(0, 1000).tobytes()) + 2 * token + 1] |= 0x80
    shard.write_bytes(content)
    module.setup("fit")
    seen = 0
    # The message is the whole of it, also from a loader process: the command line tells it in one line.
    message = rf"\S+train-00000\.arrow is damaged: token {token:,} of it is \d+, the vocabulary has 4096: delete \S+ .*"
    with pytest.raises(ValueError, match=f"^{message}$"):
        for batch in module.train_dataloader():
            seen += len(batch["keys"])
    assert 0 < seen <= module.curriculum.total_samples // 2


def test_held_out_rows_are_counted_once_each(data: Callable[..., CurriculumData]) -> None:
    module = data(validation_rows=1000)
    for loader, (name, stream) in zip(module.val_dataloader(), module._validation.items(), strict=True):
        labels = torch.cat([batch["labels"].flatten() for batch in loader])
        counted = labels[labels != IGNORE_INDEX]
        assert counted.tolist() == stream.read(1, len(stream)).tolist()
        assert module.evaluation_tokens(1000)[name] == len(stream) - 1


def test_document_ids_change_after_each_end(data: Callable[..., CurriculumData]) -> None:
    module = data(document_masks=True)
    batch = next(iter(module.train_dataloader()))
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        expected, current = [], 0
        for token in ids.tolist():
            expected.append(current)
            current += token == module.tokenizer.eos_id
        assert documents.tolist() == expected


def test_the_unigram_baseline_is_a_unigrams_loss(data: Callable[..., CurriculumData]) -> None:
    module = data(validation_rows=1000)
    stream = module.shards["web"].tokens("train")
    counts: dict[int, int] = {}
    for token in stream.read(0, len(stream)).tolist():
        counts[token] = counts.get(token, 0) + 1
    held_out = module._validation["web"]
    total = len(stream) + module.vocab_size  # plus one for each piece
    nats = [-np.log((counts.get(token, 0) + 1) / total) for token in held_out.read(1, len(held_out)).tolist()]
    # Both are sums of a few thousand float64 logarithms.
    assert module.unigram_losses()["web"] == pytest.approx(float(np.mean(nats)), rel=1e-12)


def test_the_rows_that_are_shown_are_the_first_training_rows(data: Callable[..., CurriculumData], tiny: Path) -> None:
    module = data(document_masks=True)
    shown = {one.name: one for one in module.shown_sources(3, 1000)}
    for name, stream in module.train_streams.items():
        assert (shown[name].read, shown[name].complete) == (300, True)
        assert shown[name].tokens == sum(module.shards[name].counts(split).tokens for split in SPLITS)
        for number, example in enumerate(shown[name].examples):
            assert [token.id for token in example.tokens] == stream.row(number, 16).tolist()
            assert [token.marked for token in example.tokens] == [False, *[True] * 16]
    looked = CurriculumData(
        {"web": Source(str(tiny / "web.jsonl"))},
        [Stage("one", 16 * 24, {"web": 1.0})],
        context_length=16,
        batch_tokens=16 * 24,
        cache_dir=str(tiny / "elsewhere"),
    )
    assert [one.complete for one in looked.shown_sources(1, 10)] == [False]
    assert not (tiny / "elsewhere").exists()  # looking leaves nothing behind


def test_documents_left_out_are_shown_with_rule_and_place(tiny: Path) -> None:
    file = tiny / "bad.jsonl"
    file.write_text('{"text": "too short"}\n{"words": 1}\n' + '{"text": "a river runs"}\n' * 3)
    module = CurriculumData(
        {"web": Source(str(file))},
        [Stage("one", 16 * 24, {"web": 1.0})],
        context_length=16,
        batch_tokens=16 * 24,
        cache_dir=str(tiny / "cache"),
        filters=Filters(min_words=3),
        deduplicate="exact",
    )
    (shown,) = module.shown_sources(1, 1000)
    assert shown.left_out == {"no such column": 1, "filter: too few words": 1, "duplicates (exact)": 2}
    assert any(place.startswith(f"{file}, row 1: filter") for place in shown.places)
    assert shown.warnings[0].startswith(f"fit stops at {file}, row 2: data.sources.web.on_bad_row: skip")
