"""What a reading of the text measures, and by what a measurement is kept. Whole runs: test_run.py."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_danube.quantization import measured, task
from lightning_danube.quantization.levels import FULL, parse_level
from lightning_danube.quantization.measured import Content, Cost, MeasuredLevel, save_measured
from lightning_danube.quantization.task import QuantizationEvaluation, _Divergences, _Reading
from tests.quantization.test_text_windows import windows_of
from tests.tiny_models import save_tiny

HQQ, IMATRIX = parse_level("hqq:4/64"), parse_level("gguf:Q4_0+imatrix")

# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("models")
    return [str(save_tiny(directory / str(seed), seed=seed)) for seed in (0, 1)]


@pytest.fixture
def evaluation(models: list[str], tmp_path: Path) -> Callable[..., QuantizationEvaluation]:
    """Makes the task, set up for a run with these facts."""
    (tmp_path / "text.txt").write_text(" ".join(f"the {number} thing" for number in range(400)))

    def make(
        weights: int = 0, precision: str = "32-true", device: str = "cpu", cost: bool = False, **windows: Any
    ) -> QuantizationEvaluation:
        options = {"max_tokens": 640, "calibration_tokens": 64, **windows}
        data = windows_of(models[0], tmp_path / "text.txt", **options)
        made = QuantizationEvaluation(models[weights], [HQQ.name], cost=cost, cache_dir=str(tmp_path / "cache"))
        strategy = SimpleNamespace(root_device=torch.device(device))
        facts = {"datamodule": data, "world_size": 1, "precision": precision, "strategy": strategy}
        made.trainer = SimpleNamespace(**facts)  # type: ignore[assignment]
        made.setup("test")
        return made

    return make


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": 1},
        {"precision": "bf16-true"},
        {"device": "cuda"},
        {"max_tokens": 639},
        {"stride": 8},
        {"context_lengths": [32]},
        {"context_lengths": [64, 32]},
        {"cloze_questions": 8},
    ],
    ids=str,
)
def test_a_measurement_with_another_fact_is_not_found(
    evaluation: Callable[..., QuantizationEvaluation], changed: dict[str, Any]
) -> None:
    assert evaluation()._kept(HQQ) == evaluation()._kept(HQQ)
    assert evaluation(**changed)._kept(HQQ) != evaluation()._kept(HQQ)


def test_each_level_is_kept_for_itself(evaluation: Callable[..., QuantizationEvaluation]) -> None:
    levels = [FULL, HQQ, *map(parse_level, ("hqq:4/32", "rounding:4/64", "hqq:4/64+embeddings", "gguf:Q4_0"))]
    assert len({evaluation()._kept(level) for level in [*levels, IMATRIX]}) == 7


@pytest.mark.parametrize(
    ("level", "package"),
    [
        ("hqq:4/64", "hqq"),
        ("rounding:4/64", "hqq"),
        ("bitsandbytes:nf4", "bitsandbytes"),
        ("gguf:Q4_0", "llama-cpp-python"),
        ("full", "torch"),
    ],
)
def test_another_version_of_the_package_measures_anew(
    evaluation: Callable[..., QuantizationEvaluation], monkeypatch: pytest.MonkeyPatch, level: str, package: str
) -> None:
    found = []
    for changed in (None, package):
        monkeypatch.setattr(task, "version", lambda name, changed=changed: "2.0" if name == changed else "1.0")
        found.append(evaluation()._kept(FULL if level == "full" else parse_level(level)))
    assert found[0] != found[1]


def test_another_format_of_the_file_is_another_file(
    evaluation: Callable[..., QuantizationEvaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluation()._kept(HQQ)
    monkeypatch.setattr(measured, "FORMAT", measured.FORMAT + 1)
    assert evaluation()._kept(HQQ) != before


def test_the_calibration_text_counts_for_levels_that_calibrate(
    evaluation: Callable[..., QuantizationEvaluation],
) -> None:
    shorter, longer = evaluation(), evaluation(calibration_tokens=65)
    assert shorter._kept(IMATRIX) != longer._kept(IMATRIX)
    assert shorter._kept(HQQ) == longer._kept(HQQ)


@pytest.mark.parametrize(
    ("kept", "asked", "found"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"cost": Cost(2.0, 1.0, None)}, True, True),
        ({"cost_reason": "no room"}, True, True),
    ],
)
def test_a_measurement_without_the_cost_that_is_asked_for_is_made_again(
    evaluation: Callable[..., QuantizationEvaluation], kept: dict[str, Any], asked: bool, found: bool
) -> None:
    ones = np.ones((2, 3))
    save_measured(evaluation()._kept(HQQ), MeasuredLevel(Content(8, 8, {}), 1.0, {64: ones}, ones, ones, ones, **kept))
    made = evaluation(cost=asked)
    assert (HQQ in made.reused, HQQ in made._missing) == (found, not found)
    # The full model has no measurement, and a level is compared with the full model.
    assert made._missing[0] == FULL
    assert made._data.passes == (1 if found else 2)


def test_a_level_that_is_new_is_compared_with_the_full_model_anew(
    evaluation: Callable[..., QuantizationEvaluation],
) -> None:
    ones = np.ones((2, 3))
    done = MeasuredLevel(Content(8, 8, {}), 1.0, {64: ones}, ones, ones, ones)
    save_measured(evaluation()._kept(FULL), done)
    made = evaluation()
    assert made.reused == [FULL] and made._missing == [FULL, HQQ] and made._data.passes == 2
    save_measured(made._kept(HQQ), done)
    made = evaluation()
    assert made.reused == [FULL, HQQ] and made._missing == [] and made._data.passes == 0


# --- a reading --------------------------------------------------------------------------------------------------------

VOCABULARY = 11


class Bigrams:
    """A model whose next token depends on the last token alone: (V, V) logits."""

    content = Content(1, 1, {})

    def __init__(self, seed: int) -> None:
        self.table = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def logits(self, ids_BT: Tensor, first: int) -> Tensor:
        return self.table[ids_BT][:, first:]

    def close(self) -> None:
        pass


def read(tmp_path: Path, batches: list[Any]) -> list[MeasuredLevel]:
    """The results of the full model and of a level."""
    divergences = _Divergences(tmp_path / "reference", VOCABULARY)
    results = []
    for seed, level in enumerate((FULL, HQQ)):
        reading = _Reading(level, Bigrams(seed), None, divergences, 0.0, to_compare_with=False)
        for batch in batches:
            reading.read(batch)
        results.append(reading.result())
    return results


def softmax(logits: Tensor) -> Any:
    exponentials = np.exp(logits.double().numpy())
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_each_position_is_compared_with_the_full_model_of_the_same_position(tmp_path: Path) -> None:
    windows = torch.randint(VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(9))
    batches = [{"input_ids": part, "context_length": 12, "first": 6} for part in windows.split(3)]
    shorter = {"input_ids": windows[:, :8], "context_length": 8, "first": 3}
    full, level = read(tmp_path, [*batches, shorter])
    p, q = (softmax(Bigrams(seed).table[windows[:, 6:-1]]) for seed in (0, 1))
    # Float32 beside float64.
    np.testing.assert_allclose(level.divergence, (p * (np.log(p) - np.log(q))).sum(-1), rtol=1e-4)
    assert not full.divergence.any() and full.same_first.all()
    same = p.argmax(-1) == q.argmax(-1)
    assert 0 < same.mean() < 0.5
    assert np.array_equal(level.same_first, same)
    labels = windows[:, 7:, None].numpy()
    np.testing.assert_allclose(level.nats[12], -np.log(np.take_along_axis(q, labels, -1))[..., 0], rtol=1e-4)
    assert level.nats[8].shape == (5, 4)


def test_a_cloze_is_right_if_the_true_answer_is_the_likeliest(tmp_path: Path) -> None:
    questions = torch.randint(VOCABULARY, (40, 4, 9), generator=torch.Generator().manual_seed(9))
    questions[:, :, :5] = questions[:, :1, :5]
    window = {"input_ids": questions[0], "context_length": 9, "first": 4}
    asked = [{"input_ids": part.flatten(0, 1), "choices": 4, "first": 4} for part in questions.split(25)]
    for seed, found in enumerate(read(tmp_path, [window, *asked])):
        logs = np.log(softmax(Bigrams(seed).table))
        right = []
        for choices in questions.tolist():
            likelihoods = [sum(logs[a, b] for a, b in pairwise(ids[4:])) for ids in choices]
            right.append(likelihoods[0] == max(likelihoods))
        assert 0 < sum(right) < 40
        assert found.cloze.tolist() == right


def test_the_full_models_answers_are_kept_up_to_the_last_byte_of_the_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "REFERENCE_BYTES", 4 * VOCABULARY * 6)
    divergences = _Divergences(tmp_path / "reference", VOCABULARY)
    windows = torch.randn(3, 3, VOCABULARY)
    for number, window in enumerate(windows):
        divergences.keep(window)
        assert divergences.is_full == (number == 2)
    for number in (1, 0):
        kept = divergences.window(number)
        assert kept is not None and torch.equal(kept, windows[number])
    assert divergences.window(2) is None
    assert not (tmp_path / "reference").exists()


def test_a_level_is_compared_on_the_windows_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "REFERENCE_BYTES", 4 * VOCABULARY * 5 * 2)
    windows = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(9))
    _, level = read(tmp_path, [{"input_ids": windows, "context_length": 12, "first": 6}])
    assert level.divergence.shape == level.same_first.shape == (2, 5) and level.nats[12].shape == (4, 5)
