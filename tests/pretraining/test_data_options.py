"""Options of the data reach what they are meant for, and a state is taken up where it was left."""

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
from lightning_danube.pretraining.curriculum import Stage
from lightning_danube.pretraining.data import CurriculumData, TrainingRows
from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Filters, Quality
from lightning_danube.tokens.shards import TokenShards
from lightning_danube.tokens.token_sequence import TokenSequence
from tests.token_files import sequence_in_memory

MakeData = Callable[..., CurriculumData]


class WatchedStream:
    """Tokens that note the process of each read."""

    def __init__(self, stream: TokenSequence, directory: Path) -> None:
        self.stream, self.directory = stream, directory
        self.dtype, self.vocab_size = stream.dtype, stream.vocab_size

    def read(self, start: int, stop: int) -> Any:
        (self.directory / str(os.getpid())).touch()
        return self.stream.read(start, stop)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_read_by_as_many_processes_as_asked_for(small_data: MakeData, tmp_path: Path, workers: int) -> None:
    loader: Any = small_data(workers=workers).train_dataloader()
    directory = tmp_path / "readers"
    directory.mkdir()
    loader.dataset.streams = [WatchedStream(stream, directory) for stream in loader.dataset.streams]
    assert len(list(loader)) > 10
    readers = {int(path.name) for path in directory.iterdir()}
    assert readers == {os.getpid()} if not workers else len(readers) == workers and os.getpid() not in readers


@pytest.mark.parametrize(("processes", "expected"), [(1, 1), (3, 3), (None, usable_cores())])
def test_text_is_tokenized_by_as_many_processes_as_asked_for(
    small_data: MakeData, monkeypatch: pytest.MonkeyPatch, processes: int | None, expected: int
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
    small_data(processes=processes)
    assert asked == [expected] * 3  # all sources once, and each when it is opened


def test_an_id_of_the_vocabularys_size_is_refused_and_the_one_below_is_read() -> None:
    tokens = np.full(40, 99, dtype=np.uint16)
    keys = np.array([[0, 0, 0, 1]])
    stream = sequence_in_memory([tokens], 100, ["web.arrow"])
    rows = TrainingRows([stream], 8, None)
    assert rows.batch(rows.__getitems__(keys))["input_ids"].tolist() == [[99] * 8]
    tokens[16] = 100  # the last label of row 1
    with pytest.raises(ValueError, match="token 16 of it is 100, the vocabulary has 100"):
        rows.batch(rows.__getitems__(keys))
    # The damaged token may be in a source that is not the batch's first.
    fine = sequence_in_memory([np.zeros(40, dtype=np.uint16)], 100, ["wiki.arrow"])
    rows = TrainingRows([fine, stream], 8, None)
    with pytest.raises(ValueError, match=r"web\.arrow is damaged"):
        rows.batch(rows.__getitems__(np.array([[0, 0, 0, 1], [0, 1, 0, 1]])))


def trainer_at(step: int, verb: str = "fit") -> Any:
    return SimpleNamespace(
        global_step=step, state=SimpleNamespace(fn=verb), distributed_sampler_kwargs=None, max_epochs=1,
        accumulate_grad_batches=1, val_check_interval=1.0, strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip


def test_a_resumed_run_begins_behind_the_samples_of_its_steps(small_data: MakeData) -> None:
    before, after = small_data(), small_data()
    before.trainer, after.trainer = trainer_at(5), trainer_at(0)
    state = before.state_dict()
    assert state["samples"] == 5 * 24
    after.load_state_dict(state)
    first = next(iter(after.train_dataloader()))
    assert first["keys"] == before.curriculum.samples(5 * 24, 5 * 24 + 6)
    # A validation of the checkpoint needs no position.
    other = small_data()
    other.trainer = trainer_at(0, "validate")
    other.load_state_dict(state)
    assert other.samples_done == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"data\.seed is 1, the run began with 0"),
        ({"held_out": 0.1}, r"data\.sources: 'web' now holds"),
        ({"tokenizer": "world"}, "was trained with the tokenizer 'danube-small'"),
        ({"stages": [Stage("a", 5_000, {"web": 0.8, "wiki": 0.2})]}, "stage 'a' .* has begun with the mix"),
    ],
)
def test_another_past_is_refused_when_a_state_is_loaded(
    small_data: MakeData, change: dict[str, Any], message: str
) -> None:
    before, after = small_data(), small_data(**change)
    before.trainer = after.trainer = trainer_at(5)
    with pytest.raises(ValueError, match=message):
        after.load_state_dict(before.state_dict())


def test_order_facts_count_a_block_as_the_mixture_does(small_data: MakeData, small_texts: Path) -> None:
    """Of equal remainders the source that stands first in data.sources gets the sample, whatever the mix's order is."""
    sources = {name: Source(str(small_texts / f"{name}.jsonl")) for name in ("web", "wiki")}
    sources["code"] = sources["wiki"]
    mix = {"code": 0.25005, "wiki": 0.4999, "web": 0.25005}
    module = small_data(sources=sources, stages=[Stage("a", 5_000, mix)])
    ((name, samples, counts),) = module.order_facts().stages
    (mixture,) = module.curriculum._mixtures
    assert counts == dict(zip(mixture.sources, mixture.counts.tolist(), strict=True))
    assert counts == {"web": 2501, "wiki": 4999, "code": 2500}
    assert (name, samples) == ("a", module.curriculum.total_samples)


def test_passes_up_to_the_limit_are_allowed(small_data: MakeData) -> None:
    most = max(small_data().curriculum.passes().values())
    small_data(max_epochs=most)
    with pytest.raises(ValueError, match=r"would be read for .* epochs of .* tokens, more than data\.max_epochs"):
        small_data(max_epochs=most * (1 - 1e-9))


def test_rules_for_the_text_reach_the_shards(small_data: MakeData, tmp_path: Path) -> None:
    benchmark = tmp_path / "b.jsonl"
    benchmark.write_text('{"q": "one two three four five six seven eight nine"}')
    rules: dict[str, Any] = {"deduplicate": "exact", "filters": {"min_words": 5}, "decontaminate": [str(benchmark)]}
    module = small_data(**rules)
    assert module.quality == Quality("exact", Filters(min_words=5), (str(benchmark),))
    assert {len({str(one[name]) for one in (module.shards_directories(), small_data().shards_directories())})
            for name in module.sources} == {2}  # fmt: skip
    for name, directory in module.shards_directories().items():
        shards = module.shards[name]
        assert isinstance(shards, TokenShards) and shards.directory == directory
        assert shards.meta["quality"]["deduplicate"] == "exact"


def test_micro_batches_of_a_step_follow_from_its_rows(small_data: MakeData) -> None:
    module = small_data()
    assert [module.accumulation(replicas) for replicas in (1, 2, 4)] == [4, 2, 1]
    assert (module.total_steps, module.total_tokens) == (module.curriculum.total_steps, module.curriculum.total_tokens)
    with pytest.raises(ValueError, match=r"micro_batch_size = 1, 2, 4 or 8 would"):
        module.accumulation(3)


def test_a_tokenizer_of_one_name_with_other_pieces_is_refused(small_data: MakeData) -> None:
    module = small_data()
    module.trainer = trainer_at(5)
    state = module.state_dict()
    state["tokenizer"] = state["tokenizer"] | {"fingerprint": "0"}
    with pytest.raises(
        ValueError, match=r"trained with the tokenizer 'danube-small' \(0\), data\.tokenizer is 'danube"
    ):
        module.load_state_dict(state)
