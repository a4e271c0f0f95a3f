"""Who gets which sample: replicas, micro-batches, workers and starting points never change a step's samples."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_danube.device import usable_cores
from lightning_danube.pretraining import data as data_module
from lightning_danube.pretraining.curriculum import Curriculum, SampleKey, Stage
from lightning_danube.pretraining.data import CurriculumData, CurriculumSampler, TrainingRows
from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Filters, Quality
from lightning_danube.tokens.shards import TokenSequence
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
    message = (
        rf"\S+train-00000\.arrow is damaged: token {token:,} of it is \d+, the vocabulary has 32000: delete \S+ .*"
    )
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


class WatchedStream:
    """Tokens that note the process of each read."""

    def __init__(self, stream: TokenSequence, directory: Path) -> None:
        self.stream, self.directory = stream, directory
        self.dtype, self.vocab_size = stream.dtype, stream.vocab_size

    def read(self, start: int, stop: int) -> Any:
        (self.directory / str(os.getpid())).touch()
        return self.stream.read(start, stop)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_read_by_as_many_processes_as_asked_for(
    data: Callable[..., CurriculumData], tmp_path: Path, workers: int
) -> None:
    loader: Any = data(workers=workers).train_dataloader()
    directory = tmp_path / "readers"
    directory.mkdir()
    loader.dataset.streams = [WatchedStream(stream, directory) for stream in loader.dataset.streams]
    assert len(list(loader)) > 10
    readers = {int(path.name) for path in directory.iterdir()}
    assert readers == {os.getpid()} if not workers else len(readers) == workers and os.getpid() not in readers


@pytest.mark.parametrize(("processes", "expected"), [(1, 1), (3, 3), (None, usable_cores())])
def test_text_is_tokenized_by_as_many_processes_as_asked_for(
    data: Callable[..., CurriculumData], monkeypatch: pytest.MonkeyPatch, processes: int | None, expected: int
) -> None:
    asked = []
    prepare, opened = data_module.prepare, data_module.open_or_prepare

    def note(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            asked.append(options["processes"])
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(data_module, "prepare", note(prepare))
    monkeypatch.setattr(data_module, "open_or_prepare", note(opened))
    data(processes=processes)
    assert asked == [expected] * 3  # all sources once, and each when it is opened


def test_an_id_of_the_vocabularys_size_is_refused_and_the_one_below_is_read() -> None:
    tokens = np.full(40, 99, dtype=np.uint16)
    keys = np.array([[0, 0, 0, 1]])
    stream = TokenSequence([tokens], tokens.dtype, 100, [Path("shards/web.arrow")])
    rows = TrainingRows([stream], 8, None)
    assert rows.batch(rows.__getitems__(keys))["input_ids"].tolist() == [[99] * 8]
    tokens[16] = 100  # the last label of row 1
    with pytest.raises(ValueError, match="token 16 of it is 100, the vocabulary has 100"):
        rows.batch(rows.__getitems__(keys))
    # The damaged token may be in a source that is not the batch's first.
    fine = TokenSequence([np.zeros(40, dtype=np.uint16)], tokens.dtype, 100, [Path("shards/wiki.arrow")])
    rows = TrainingRows([fine, stream], 8, None)
    with pytest.raises(ValueError, match=r"web\.arrow is damaged"):
        rows.batch(rows.__getitems__(np.array([[0, 0, 0, 1], [0, 1, 0, 1]])))


def trainer_at(step: int, verb: str = "fit") -> Any:
    return SimpleNamespace(
        global_step=step, state=SimpleNamespace(fn=verb), distributed_sampler_kwargs=None, max_epochs=1,
        accumulate_grad_batches=1, val_check_interval=1.0,
    )  # fmt: skip


def test_a_resumed_run_begins_behind_the_samples_of_its_steps(data: Callable[..., CurriculumData]) -> None:
    before, after = data(), data()
    before.trainer, after.trainer = trainer_at(5), trainer_at(0)
    state = before.state_dict()
    assert state["samples"] == 5 * 24
    after.load_state_dict(state)
    first = next(iter(after.train_dataloader()))
    assert first["keys"] == before.curriculum.samples(5 * 24, 5 * 24 + 6)
    # A validation of the checkpoint needs no position.
    other = data()
    other.trainer = trainer_at(0, "validate")
    other.load_state_dict(state)
    assert other.samples_done == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"data\.seed is 1, the run began with 0"),
        ({"held_out": 0.1}, r"data\.sources: 'web' now holds"),
        ({"tokenizer": "danube-small"}, "was trained with the tokenizer 'mistral'"),
        ({"stages": [Stage("a", 5_000, {"web": 0.8, "wiki": 0.2}), STAGES[1]]}, "stage 'a' .* has begun with the mix"),
    ],
)
def test_another_past_is_refused_when_a_state_is_loaded(
    data: Callable[..., CurriculumData], change: dict[str, Any], message: str
) -> None:
    before, after = data(), data(**change)
    before.trainer = after.trainer = trainer_at(5)
    with pytest.raises(ValueError, match=message):
        after.load_state_dict(before.state_dict())


def test_order_facts_count_a_block_as_the_mixture_does(data: Callable[..., CurriculumData], tiny: Path) -> None:
    """Of equal remainders the source that stands first in data.sources gets the sample, whatever the mix's order is."""
    sources = {name: Source(str(tiny / f"{name}.jsonl")) for name in ("web", "wiki")}
    sources["code"] = sources["wiki"]
    mix = {"code": 0.25005, "wiki": 0.4999, "web": 0.25005}
    module = data(sources=sources, stages=[Stage("a", 5_000, mix)])
    ((name, samples, counts),) = module.order_facts().stages
    (mixture,) = module.curriculum._mixtures
    assert counts == dict(zip(mixture.sources, mixture.counts.tolist(), strict=True))
    assert counts == {"web": 2501, "wiki": 4999, "code": 2500}
    assert (name, samples) == ("a", module.curriculum.total_samples)


def test_passes_up_to_the_limit_are_allowed(data: Callable[..., CurriculumData]) -> None:
    most = max(data().curriculum.passes().values())
    data(max_passes=most)
    with pytest.raises(ValueError, match=r"would be read .* times .* more than data\.max_passes"):
        data(max_passes=most * (1 - 1e-9))


def test_rules_for_the_text_reach_the_shards(data: Callable[..., CurriculumData], tmp_path: Path) -> None:
    benchmark = tmp_path / "b.jsonl"
    benchmark.write_text('{"q": "one two three four five six seven eight nine"}')
    rules: dict[str, Any] = {"deduplicate": "exact", "filters": {"min_words": 5}, "decontaminate": [str(benchmark)]}
    module = data(**rules)
    assert module.quality == Quality("exact", Filters(min_words=5), (str(benchmark),))
    assert {len({str(one[name]) for one in (module.shards_directories(), data().shards_directories())})
            for name in module.sources} == {2}  # fmt: skip
    for name, directory in module.shards_directories().items():
        assert module.shards[name].directory == directory
        assert module.shards[name].meta["quality"]["deduplicate"] == "exact"


def test_micro_batches_of_a_step_follow_from_its_rows(data: Callable[..., CurriculumData]) -> None:
    module = data()
    assert [module.accumulation(replicas) for replicas in (1, 2, 4)] == [4, 2, 1]
    assert (module.total_steps, module.total_tokens) == (module.curriculum.total_steps, module.curriculum.total_tokens)
    with pytest.raises(ValueError, match=r"micro_batch_size = 1, 2, 4 or 8 would"):
        module.accumulation(3)
