"""The classifier's parts on a random model: what it sees of a text, what its adapter does, what trains."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_danube.classification.task import ClassifiedTexts, TextClassification, last_token_states
from lightning_danube.model import Decoder
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.weights.adapters import add_adapter, base_digest, merge_adapter
from lightning_danube.weights.lora import Lora
from tests.tiny_models import CONFIG, save_tiny, tiny_decoder

LENGTHS = (9, 4, 1)


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 250, (length,), generator=generator) for length in LENGTHS]


def padded(padding: int = 2) -> tuple[Tensor, Tensor]:
    """Rows of one place more than the longest text has."""
    rows, masks = [], []
    for ids in texts():
        place = (0, max(LENGTHS) + 1 - len(ids))
        rows.append(F.pad(ids, place, value=padding))
        masks.append(F.pad(torch.ones_like(ids), place))
    return torch.stack(rows), torch.stack(masks)


class ThreeLabels:
    """As much of a data module as the task asks for."""

    vocab_size, context_length, evaluation_places = CONFIG.vocab_size, 8, 64
    labels = ("a", "b", "c")
    keep, begin = "start", True

    def described(self, row: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"row": row}, {}


def task(tmp_path: Path, head: Any = "hidden", **options: Any) -> TextClassification:
    made = TextClassification(str(save_tiny(tmp_path / "base")), LearningRate(1e-3, 0.0, 0), head=head, **options)
    made.trainer = SimpleNamespace(datamodule=ThreeLabels())  # type: ignore[assignment]
    torch.manual_seed(1)
    made.configure_model()
    return made.double()


def randomize(decoder: Decoder) -> None:
    """Adapters as after training: a fresh one's second matrix is 0."""
    torch.manual_seed(5)
    for name, parameter in decoder.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def test_padding_makes_no_difference() -> None:
    """Float64, so that only the angles' rounding to float32 is left, which is the same for the same positions."""
    decoder = tiny_decoder().double().eval()
    alone = torch.cat([last_token_states(decoder, ids[None], torch.ones(1, len(ids), dtype=int)) for ids in texts()])  # type: ignore[call-overload]
    together = last_token_states(decoder, *padded())
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    for padding in (0, 77):
        assert torch.equal(last_token_states(decoder, *padded(padding)), together)


def test_an_empty_row_changes_no_other() -> None:
    decoder = tiny_decoder().double().eval()
    ids, mask = padded()
    with_empty = [torch.cat([rows, torch.zeros_like(rows[:1])]) for rows in (ids, mask)]
    assert torch.equal(last_token_states(decoder, *with_empty)[:-1], last_token_states(decoder, ids, mask))


def test_the_state_is_that_of_the_last_token() -> None:
    decoder = tiny_decoder().double().eval()
    ids = texts()[0]
    expected = decoder.hidden_states(ids[None])[:, -1]
    found = last_token_states(decoder, *padded())[:1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", ["hidden", "logits"])
def test_a_fresh_adapter_changes_nothing(tmp_path: Path, head: str) -> None:
    model = task(tmp_path, head).eval()
    base = tiny_decoder().double().eval()
    seen = last_token_states(base, *padded())
    if head == "logits":
        seen = base.lm_head(seen)
    torch.testing.assert_close(model.class_logits(*padded()), model.head(seen), rtol=1e-12, atol=1e-12)
    assert model.head.weight.shape == (3, 64 if head == "hidden" else 272) and model.head.bias is None


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
def test_merging_gives_the_same_scores(tmp_path: Path, kind: dict[str, bool]) -> None:
    model = task(tmp_path, lora=Lora(rank=4, alpha=8, **kind)).eval()  # type: ignore[arg-type]
    before = model.class_logits(*padded())
    randomize(model.decoder)
    apart = model.class_logits(*padded())
    assert (apart - before).abs().max() > 1e-3
    merge_adapter(model.decoder)
    torch.testing.assert_close(model.class_logits(*padded()), apart, rtol=1e-10, atol=1e-12)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    scales = []
    for rslora in (False, True):
        decoder = tiny_decoder()
        add_adapter(decoder, **Lora(rank=16, alpha=32, rslora=rslora).settings())
        scales.append(decoder.model.layers[0].self_attn.q_proj.scaling["default"])  # type: ignore[union-attr,index]
    assert scales == [2.0, 8.0]


@pytest.mark.parametrize("head", ["hidden", "logits"])
def test_gradients_reach_the_adapter_and_the_head_alone(tmp_path: Path, head: str) -> None:
    model = task(tmp_path, head, lora=Lora(rank=4))
    randomize(model.decoder)
    ids, mask = padded()
    total, count = model.sum_of_losses(
        {"input_ids": ids, "attention_mask": mask, "classes": torch.tensor([0, -100, 2]), "rows": torch.arange(3)}
    )
    assert int(count) == 2
    total.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == set(model._trained())
    assert {name for name in reached if "lora_" not in name} == {"head.weight"}
    # Seven layers in each of two blocks, two matrices each.
    assert len(reached) == 2 * 7 * 2 + 1
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)


def test_recomputing_activations_changes_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for recompute in (False, True):
        model = task(
            tmp_path / str(recompute), lora=Lora(rank=4, dropout=0.0), activation_checkpointing=recompute
        ).train()
        randomize(model.decoder)
        ids, mask = padded()
        model.sum_of_losses(
            {"input_ids": ids, "attention_mask": mask, "classes": torch.tensor([0, 1, 2]), "rows": torch.arange(3)}
        )[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def test_the_head_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    model = task(tmp_path, head_learning_rate=1e-4)
    model.length_in_tokens = lambda: (10, 100)  # type: ignore[method-assign]
    made = model.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    adapter, head = optimizer.param_groups
    assert head["params"] == [model.head.weight] and all(p is not model.head.weight for p in adapter["params"])
    for step in range(4):
        rate = LearningRate(1e-3, 0.0, 0).at((step + 1) * 10, 100)
        assert (adapter["lr"], head["lr"]) == pytest.approx((rate, rate / 10))
        optimizer.step()
        scheduler.step()


def test_a_base_is_told_by_its_weights() -> None:
    decoder = tiny_decoder()
    mine = base_digest(decoder)
    add_adapter(decoder, **Lora(rank=2).settings())
    randomize(decoder)
    assert base_digest(decoder) == mine
    assert base_digest(tiny_decoder(seed=1)) != mine


def test_predictions_are_put_into_the_order_of_the_texts() -> None:
    collected = ClassifiedTexts()
    collected.update(torch.tensor([4, 0, -1]), torch.tensor([2, 1, -100]), torch.tensor([[4.0], [0.0], [9.0]]))
    collected.update(torch.tensor([2, 3, 1]), torch.tensor([0, 1, 2]), torch.tensor([[2.0], [3.0], [1.0]]))
    rows, classes, logs = collected.compute()
    assert (
        rows.tolist() == [0, 1, 2, 3, 4]
        and classes.tolist() == [1, 2, 0, 1, 2]
        and logs[:, 0].tolist() == [0, 1, 2, 3, 4]
    )


def batch_of(rows: list[int], classes: list[int]) -> Any:
    ids, mask = padded()
    return {"input_ids": ids, "attention_mask": mask, "classes": torch.tensor(classes), "rows": torch.tensor(rows)}


@pytest.mark.parametrize("verb", ["validation", "test"])
def test_scores_are_of_the_last_evaluation_alone(tmp_path: Path, verb: str) -> None:
    model = task(tmp_path).eval()
    logged: dict[str, Any] = {}
    model.log_dict = lambda values, logger: logged.update(values)  # type: ignore[method-assign, assignment, misc]
    model.trainer.loggers = []
    with torch.no_grad():
        logits = model.class_logits(*padded())
        wanted = logits.log_softmax(1)
        for classes in ([0, 0, 0], [2, 0, -100]):
            getattr(model, f"on_{verb}_epoch_start")()
            getattr(model, f"{verb}_step")(batch_of([1, 0, -1], classes), 0)
            getattr(model, f"on_{verb}_epoch_end")()
    assert model.latest is not None
    rows_N, classes_N, probabilities_NC = model.latest
    assert rows_N.tolist() == [0, 1] and classes_N.tolist() == [0, 2]
    torch.testing.assert_close(probabilities_NC, wanted[[1, 0]].exp(), rtol=1e-12, atol=0)
    assert logged[f"loss/{verb}"] == pytest.approx(-float(wanted[1, 0] + wanted[0, 2]) / 2)
    right = (wanted[[1, 0]].argmax(1) == torch.tensor([0, 2])).double().mean()
    assert logged[f"accuracy/{verb}"] == pytest.approx(float(right))


def test_a_prediction_names_the_likeliest_label(tmp_path: Path) -> None:
    model = task(tmp_path).eval()
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, -1.0], [0.0, 0.0, 9.0]], dtype=torch.float64)
    model.class_logits = lambda *_: logits  # type: ignore[method-assign]
    said = model.predict_step(batch_of([7, 3, -1], [0, 0, 0]), 0)
    assert [(answer["row"], answer["label"]) for answer in said] == [(7, "b"), (3, "a")]
    for answer, row in zip(said, logits, strict=False):
        exponentials = row.exp()
        assert list(answer["probabilities"]) == ["a", "b", "c"]
        assert list(answer["probabilities"].values()) == pytest.approx((exponentials / exponentials.sum()).tolist())


def test_the_seed_of_the_run_makes_the_head_whatever_was_drawn_before(tmp_path: Path) -> None:
    base, heads = str(save_tiny(tmp_path / "base")), []
    for seed, draws in ((3, 0), (3, 5), (4, 0)):
        torch.manual_seed(seed)
        made = TextClassification(base, LearningRate(1e-3, 0.0, 0))
        made.trainer = SimpleNamespace(datamodule=ThreeLabels())  # type: ignore[assignment]
        torch.rand(draws)
        state = torch.get_rng_state()
        made.configure_model()
        assert torch.equal(torch.get_rng_state(), state)
        heads.append(made.head.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_class_logits_keep_their_precision_under_autocast(tmp_path: Path) -> None:
    model = task(tmp_path).float().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = last_token_states(model.decoder, *padded())
        found = model.class_logits(*padded())
    assert found.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(found, model.head(seen.float()), rtol=1e-5, atol=1e-6)


def test_the_head_decays_like_the_adapter(tmp_path: Path) -> None:
    model = task(tmp_path, optimizer=AdamW(weight_decay=0.125))
    model.length_in_tokens = lambda: (10, 100)  # type: ignore[method-assign]
    optimizer = model.configure_optimizers()["optimizer"]
    assert optimizer.param_groups[-1]["params"] == [model.head.weight]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.125, 0.125]
