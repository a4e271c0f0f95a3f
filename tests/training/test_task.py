"""What a checkpoint says of its decoder, and what a task makes of it."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.training.optim import AdamW, LearningRate, Muon
from lightning_danube.training.task import DecoderTask
from tests.ranks import on_ranks
from tests.tiny_models import CONFIG, VARIANTS
from tests.training.test_position import trainer


def task_of(config: DecoderConfig) -> DecoderTask:
    return DecoderTask(Decoder(config), LearningRate(peak=1e-3, final=0.0, warmup=0), AdamW())


@pytest.mark.parametrize("config", [CONFIG, *VARIANTS.values()])
def test_a_decoder_takes_its_own_checkpoint(config: DecoderConfig) -> None:
    task_of(config).on_load_checkpoint({"decoder_config": config.facts()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 7}, r"another decoder than the config: sliding_window 7 \(here None\): set what differs"),
        ({"qk_norm": True}, r"another decoder than the config: qk_norm True \(here None\): set what differs"),
        ({"hidden_size": 128, "head_dim": None}, r"hidden_size 128 \(here 64\), head_dim 32 \(here 16\): set what"),
    ],
)
def test_another_decoder_is_refused_by_what_differs(changes: dict[str, Any], message: str) -> None:
    other = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        task_of(CONFIG).on_load_checkpoint({"decoder_config": other.facts()})


def test_the_only_step_of_a_run_has_the_peak_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of a step is that of its end, and so the rate of the only step would be the final one."""
    task = task_of(CONFIG)
    for batch, total, rates in ((100, 100, [1e-3]), (100, 200, [5e-4, 0.0])):
        monkeypatch.setattr(task, "length_in_tokens", partial(tuple, (batch, total)))
        assert [task._rate_of_step(step) for step in range(total // batch)] == pytest.approx(rates)


def test_a_run_that_does_not_fit_into_the_memory_is_warned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, gradients and the two moments of AdamW, for each process of the machine."""
    task = task_of(CONFIG)
    needed = 2 * 4 * 4 * CONFIG.parameters
    root, gpu = SimpleNamespace(root_device=torch.device("cpu")), SimpleNamespace(root_device=torch.device("cuda"))
    for there, strategy, local_rank, warns in (
        (needed - 1, root, 0, True),
        (needed, root, 0, False),
        (1, root, 1, False),  # rank zero has said it
        (1, gpu, 0, False),
    ):
        monkeypatch.setattr("lightning_danube.training.task.usable_memory", lambda there=there: there)
        task._trainer = SimpleNamespace(strategy=strategy, local_rank=local_rank, num_devices=2)  # type: ignore[assignment]
        task._warn_of_memory()
        said = capsys.readouterr().err
        assert said.startswith("warning: weights, gradients and optimizer take ") == warns == bool(said)


# --- private parts of Lightning ---------------------------------------------------------------------------------------


def test_a_module_without_a_trainer_says_so_in_a_private_attribute() -> None:
    assert LightningModule()._trainer is None


def test_checkpoints_count_micro_batches_where_a_resume_restates_them() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    state = trainer.fit_loop.state_dict()
    progress = state["epoch_loop.batch_progress"]
    steps = state["epoch_loop.automatic_optimization.optim_progress"]
    assert steps["optimizer"]["step"]["total"]["completed"] == 0
    for counts in (progress["total"], progress["current"]):
        assert {"ready", "started", "processed", "completed"} <= counts.keys()


# --- the parts of a step ----------------------------------------------------------------------------------------------


def task_under(**facts: Any) -> DecoderTask:
    """A task under a trainer that is made up; its run has ten steps of 100 tokens."""
    task = task_of(CONFIG)
    task._trainer = trainer(**facts)
    return task


def test_a_step_has_the_rate_of_its_last_token() -> None:
    task = task_under()
    task.learning_rate = LearningRate(peak=1e-2, final=1e-3, warmup=300)
    found = task.configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(task.learning_rate.at((step + 1) * 100, 1000))
        optimizer.step()
        scheduler.step()


def test_the_settings_of_the_config_replace_those_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    task = task_under()
    task.learning_rate = LearningRate(peak=1e-2, final=1e-3, warmup=300)
    task.optimizer_settings = AdamW(betas=(0.5, 0.6), weight_decay=0.3)
    found = task.configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    schedulers = [SimpleNamespace(scheduler=scheduler)]
    task._trainer = trainer(optimizers=[optimizer], lr_scheduler_configs=schedulers, is_global_zero=True)
    for group in optimizer.param_groups:  # as they are after a checkpoint was loaded
        group.update(lr=123.0, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler.last_epoch = 4
    task.on_train_start()
    assert [(group["betas"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ((0.5, 0.6), 0.3),
        ((0.5, 0.6), 0.0),
    ]
    rate = task.learning_rate.at(500, 1000)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate])
    said = f"the learning rate of step 5 is {rate:.4g}; the config before gave it 123\n"
    assert capsys.readouterr().out == said
    task.on_train_start()
    assert capsys.readouterr().out == ""  # nothing has changed


def test_each_micro_batch_of_each_replica_has_its_own_dropout() -> None:
    seeds: dict[tuple[int, int, int], int] = {}
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            task = task_under()
            for replica in (0, 1):
                task._trainer = trainer(distributed_sampler_kwargs={"num_replicas": 2, "rank": replica})
                for micro_batch in (0, 1, 12):
                    for _ in range(2):  # a resumed run draws the same
                        task.seed_dropout(micro_batch)
                        drawn = seeds.setdefault((seed, replica, micro_batch), torch.initial_seed())
                        assert drawn == torch.initial_seed()
    assert len(set(seeds.values())) == len(seeds) == 12


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 0.5), (1e9, None), (0.0, None), (None, None)])
def test_gradients_are_clipped_by_their_global_norm(limit: float | None, expected: float | None) -> None:
    task = task_under()
    optimizer = task.optimizer_settings.build(task, lr=0.1)
    for parameter in task.parameters():
        parameter.grad = torch.randn_like(parameter)

    def norm() -> float:
        return math.hypot(*(float(each.grad.norm()) for each in task.parameters() if each.grad is not None))

    before = norm()
    task._losses = [torch.tensor(1.0)]
    task.configure_gradient_clipping(optimizer, limit, "norm")
    assert norm() == pytest.approx(before if expected is None else expected, rel=1e-4)
    assert float(task._gradient_norm or 0) == pytest.approx(before, rel=1e-4)


def test_a_step_has_the_mean_loss_of_its_micro_batches() -> None:
    task = task_under()
    optimizer = task.optimizer_settings.build(task, lr=0.1)
    for losses, mean in (([1.0, 2.0, 6.0], 3.0), ([5.0], 5.0)):
        task._losses += [torch.tensor(loss) for loss in losses]
        task.configure_gradient_clipping(optimizer, 1.0)
        assert task._step_loss is not None and float(task._step_loss) == mean


def test_ranks_decide_together_which_step_is_bad() -> None:
    """The loss of one rank is fine, that of the other is not. No rank waits at a barrier."""

    def work(rank: int) -> None:
        asked: list[list[float]] = []

        def verdict(loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
            asked.append([float(loss), float(norm)])
            return loss > 8

        task = task_under(world_size=2)
        optimizer: Any = task.optimizer_settings.build(task, lr=0.1)
        task.decoder.lm_head.weight.grad = torch.zeros_like(task.decoder.lm_head.weight)
        loss = torch.tensor(17.0 if rank else 3.0)
        task.step_verdict, task._losses = verdict, [loss]
        task.configure_gradient_clipping(optimizer, 1.0)
        assert asked == [[10.0, 0.0]] and float(optimizer.found_inf) == 1
        assert task._step_loss is not None and float(task._step_loss) == 10.0
        assert float(loss) == (17.0 if rank else 3.0), "the loss of a micro-batch stays"

    on_ranks(work)


# --- evaluation -------------------------------------------------------------------------------------------------------


def held_out(task: DecoderTask, *batches: Any) -> float:
    task.on_validation_epoch_start()
    for number, batch in enumerate(batches):
        task.validation_step({**batch, "source": "web"}, number)
    (name,) = task._evaluation_means
    assert name == "loss/held_out_web"
    return float(task._evaluation_means[name].compute())


def test_packed_documents_have_the_held_out_loss_that_they_have_alone() -> None:
    task = task_of(CONFIG).double().eval()
    texts = [torch.randint(0, CONFIG.vocab_size, (1, length)) for length in (6, 9, 2)]
    alone: list[Any] = [{"input_ids": text[:, :-1], "labels": text[:, 1:]} for text in texts]
    lengths = [text.shape[1] - 1 for text in texts]
    packed = {
        "input_ids": torch.cat([one["input_ids"] for one in alone], 1),
        "labels": torch.cat([one["labels"] for one in alone], 1),
        "document_ids": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    with torch.no_grad():
        # The same sums of float64, in another order.
        assert held_out(task, packed) == pytest.approx(held_out(task, *alone), rel=1e-12)


def test_a_held_out_loss_is_a_mean_over_tokens() -> None:
    task = task_of(CONFIG)
    for rows in ([(6.0, 3), (8.0, 1), (0.0, 0)], [(9.0, 2)]):
        task.on_validation_epoch_start()
        for total, count in rows:
            task.update_mean("x", torch.tensor(total), torch.tensor(count))
        expected = sum(total for total, _ in rows) / sum(count for _, count in rows)
        assert float(task._evaluation_means["x"].compute()) == pytest.approx(expected)


def test_tokens_behind_a_held_out_loss_are_those_of_its_batches() -> None:
    """Of all sources, and only where all rows were measured, not the few of the curve."""
    task = task_of(CONFIG)
    task.log_dict = lambda means, logger: None  # type: ignore[method-assign, assignment, misc]
    task.trainer = SimpleNamespace(loggers=[], global_step=0)  # type: ignore[assignment]
    task.on_validation_epoch_start()
    for name, count in (
        ("loss/held_out_web", 3.0),
        ("loss/held_out_web", 4.0),
        ("loss/held_out_wiki", 5.0),
        ("x", 9.0),
    ):
        task.update_mean(name, torch.tensor(1.0), torch.tensor(count))
    task.on_validation_epoch_end()
    assert task.run_facts.held_out_counts == {"web": 7, "wiki": 5}
    task.curve.is_brief = True
    task.on_validation_epoch_start()
    task.update_mean("held_out/web", torch.tensor(1.0), torch.tensor(2.0))
    task.on_validation_epoch_end()
    assert task.run_facts.held_out_counts == {"web": 7, "wiki": 5}


def test_a_predicted_row_has_its_mean_loss() -> None:
    task: Any = task_of(CONFIG).eval()
    words = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=words))
    ids = torch.randint(0, CONFIG.vocab_size, (3, 8))
    labels = ids.roll(-1, 1).clone()
    labels[0, 5:] = labels[1] = -100
    batch: Any = {"input_ids": ids, "labels": labels, "source": "web", "rows": [4, -1, 6]}
    with torch.no_grad():
        rows = task.predict_step(batch, 0)
        logits = task.decoder(ids)
    assert [(row["source"], row["row"], row["tokens"]) for row in rows] == [("web", 4, 5), ("web", 6, 8)]
    for row, number in zip(rows, (0, 2), strict=True):
        expected = torch.nn.functional.cross_entropy(logits[number], labels[number])
        assert row["loss"] == pytest.approx(float(expected), rel=1e-5)  # float32
        assert list(row) == ["source", "row", "tokens", "loss", "text"]
        last = row["tokens"]
        assert row["text"] == words.decode([*ids[number, :last].tolist(), int(labels[number, last - 1])])


def test_a_predicted_example_says_where_it_is_from() -> None:
    task: Any = task_of(CONFIG).eval()
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=SimpleNamespace(decode=str)))
    ids = torch.randint(0, CONFIG.vocab_size, (2, 8))
    origins = [{"file": "a.jsonl", "row": 7, "id": "x"}, {"file": "a.jsonl", "row": 9}]
    batch: Any = {"input_ids": ids, "labels": ids, "source": "talk", "rows": [0, 1], "origins": origins}
    with torch.no_grad():
        rows = task.predict_step(batch, 0)
    assert [{key: row[key] for key in ("file", "row", "id") if key in row} for row in rows] == origins


# --- going on ---------------------------------------------------------------------------------------------------------


def progress(ready: int, completed: int) -> dict[str, Any]:
    counts = {"ready": ready, "started": ready, "processed": ready, "completed": completed}
    steps = {"optimizer": {"step": {"total": {"completed": 6}}}}
    batches = {"total": {**counts}, "current": {**counts}}
    loop = {"epoch_loop.batch_progress": batches, "epoch_loop.automatic_optimization.optim_progress": steps}
    return {"loops": {"fit_loop": loop}}


def resumed(task: DecoderTask, **changes: Any) -> dict[str, Any]:
    """The task resumes from its own checkpoint, apart from the changes."""
    task._trainer = trainer(
        precision_plugin=None,
        state=SimpleNamespace(fn="fit"),
        accumulate_grad_batches=4,
        global_step=0,
        is_global_zero=True,
    )
    checkpoint: dict[str, Any] = {"loggers": []}
    facts = {"decoder_config": CONFIG.facts(), "seed": task._seed, "global_step": 6}
    states: dict[str, Any] = {"optimizer_states": [{}], "lr_schedulers": [{}]}
    checkpoint |= {**facts, **states, **progress(12, 11), **changes}
    task.on_load_checkpoint(checkpoint)
    return checkpoint


def test_a_resume_counts_micro_batches_of_the_present_size() -> None:
    """Two micro-batches a step before, four now. The last batch was not over when the checkpoint was written."""
    found = resumed(task_of(CONFIG))["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert found["total"] == {"ready": 24, "started": 24, "processed": 24, "completed": 23} == found["current"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_states": []}, "the checkpoint has no optimizer_states: no run can resume from it"),
        ({"lr_schedulers": []}, "the checkpoint has no lr_schedulers: no run can resume from it"),
        ({"global_step": 3}, "says that it is of step 3, its optimizer has done 6"),
    ],
)
def test_a_checkpoint_that_was_changed_does_not_begin_anew_in_silence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resumed(task_of(CONFIG), **changes)


def test_a_checkpoint_of_another_seed_or_optimizer_is_refused() -> None:
    task = task_of(CONFIG)
    with pytest.raises(ValueError, match=rf"seed_everything is {task._seed}, the run began with {task._seed + 1}"):
        resumed(task, seed=task._seed + 1)
    saved: dict[str, Any] = {}
    task.optimizer_settings, task._trainer = Muon(), trainer(loggers=[])
    task.on_save_checkpoint(saved)
    resumed(task, optimizer=saved["optimizer"])
    task.optimizer_settings = AdamW()
    with pytest.raises(ValueError, match=r"trained with Muon, model\.optimizer is AdamW"):
        resumed(task, optimizer=saved["optimizer"])
    resumed(task, optimizer="AdamW")


def test_a_checkpoint_that_does_not_name_its_optimizer_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints of earlier versions do not."""
    task = task_of(CONFIG)
    resumed(task, optimizer="AdamW")
    assert capsys.readouterr().err == ""
    resumed(task, optimizer=None)
    told = "warning: the checkpoint does not say which optimizer it is of, so AdamW could not be compared\n"
    assert capsys.readouterr().err == told
