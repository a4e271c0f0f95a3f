"""How a run's text samples are drawn. What they say: tests/pretraining/test_run.py."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_danube.callbacks import TextSamples, samples
from lightning_danube.generation.sampling import Sampling
from lightning_danube.training.task import DecoderTask


@pytest.mark.parametrize(("new_tokens", "generated"), [(3, 3), (48, 5)])
def test_a_sample_is_drawn_as_asked_for_and_ends_with_the_context(
    new_tokens: int, generated: int, trainer: Any, task: DecoderTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of three tokens, in a context of 8."""
    asked = []

    def generate(decoder: Any, prompts: Any, count: int, **options: Any) -> list[list[int]]:
        asked.append((decoder, prompts, count, options))
        return [[450, 8580]]

    monkeypatch.setattr(samples, "generate", generate)
    trainer.strategy = SingleDeviceStrategy("cpu")
    trainer.precision_plugin = SimpleNamespace(forward_context=nullcontext)
    tokenizer = trainer.datamodule.tokenizer
    TextSamples(["The river"], new_tokens, temperature=0.9, top_k=7).on_validation_end(trainer, task)
    ((decoder, (ids,), count, options),) = asked
    assert decoder is task.decoder and count == generated
    assert ids == [1, *tokenizer.hf("The river", add_special_tokens=False).input_ids] and len(ids) == 3
    assert options == {"sampling": Sampling(temperature=0.9, top_k=7), "eos_ids": [tokenizer.eos_id]}
    assert task.run_facts.samples == {"The river": tokenizer.hf.decode([*ids, 450, 8580], skip_special_tokens=True)}


def test_other_validations_draw_no_samples(trainer: Any, task: DecoderTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "generate", lambda *arguments, **options: pytest.fail("drawn"))
    trainer.strategy = SingleDeviceStrategy("cpu")
    for changes in ({"sanity_checking": True}, {"is_global_zero": False}, {"state": SimpleNamespace(fn="validate")}):
        other = SimpleNamespace(**{**vars(trainer), **changes})
        TextSamples(["The river"]).on_validation_end(other, task)  # type: ignore[arg-type]
    assert task.run_facts.samples == {}
