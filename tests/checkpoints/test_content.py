"""What a whole file may hold: weights of another kind, or of a run that has diverged, are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.checkpoints.content import all_finite, check_content, check_plain, check_restored
from lightning_danube.checkpoints.files import read_plain

FILE = Path("step_00000003.ckpt")


def holding(weight: Any = None, **others: Any) -> dict[str, Any]:
    return {"state_dict": {"a": torch.ones(2), "b": torch.ones(2) if weight is None else weight}, **others}


@pytest.mark.parametrize(
    ("weight", "wrong"),
    [
        (torch.tensor([1.0, float("nan")]), "holds NaN or infinity"),
        (torch.tensor([float("-inf"), 1.0], dtype=torch.bfloat16), "holds NaN or infinity"),
        (torch.ones(2, dtype=torch.complex64), "is complex"),
        (torch.ones(2).to_sparse(), "is sparse"),
        (torch.ones(2, device="meta"), "has a shape and no values"),
        (torch.ones(2, dtype=torch.int8), "holds int8, not floating-point"),
        ("text", "is a str, not a tensor"),
    ],
)
def test_a_weight_that_no_run_can_use_is_named(weight: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"^step_00000003.ckpt: its weight b {wrong}"):
        check_content(holding(weight), FILE)
    with pytest.raises(
        ValueError, match=r"^step_00000003.ckpt: its optimizer's value of parameter 0, exp_avg holds NaN"
    ):
        state = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.full((2,), torch.nan)}}, "param_groups": []}
        check_content(holding(optimizer_states=[state]), FILE)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_values_are_refused_also_where_whole_numbers_may_stand() -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    state = {"state": {0: {"step": torch.ones((), dtype=torch.int64), "exp_avg": quantized}}}
    with pytest.raises(ValueError, match="its optimizer's value of parameter 0, exp_avg is quantized"):
        check_content(holding(optimizer_states=[state]), FILE)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"state_dict": [torch.ones(2)]},
        holding(optimizer_states=3),
        holding(optimizer_states=[None]),
        holding(optimizer_states=[{"state": {0: 3}}]),
    ],
)
def test_a_content_of_another_layout_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^step_00000003.ckpt:? (is not a checkpoint of a run|its optimizer_states|the state)"
    ):
        check_content(content, FILE)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), (1, 2), 3, None, {1: torch.ones(2)}, "text"])
def test_a_file_that_holds_no_mapping_of_names_is_refused(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "step_1.ckpt"
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"step_1.ckpt is not a checkpoint: it holds a \w+, not a mapping of names$"):
        read_plain(file)


def test_an_optimizer_takes_only_a_state_of_the_shapes_of_its_parameters() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    check_restored(optimizer)
    state = optimizer.state[parameters[1]]
    for harm in ({"exp_avg": torch.ones(2)}, {"exp_avg": "text"}, {"more": torch.ones(2, 2)}):
        optimizer.state[parameters[1]] = {**state, **harm}
        with pytest.raises(ValueError, match="the checkpoint's optimizer does not fit its weights"):
            check_restored(optimizer)
    optimizer.state[parameters[1]] = {"step": state["step"]}
    with pytest.raises(ValueError, match="the checkpoint's optimizer does not fit its weights"):
        check_restored(optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_finite_values_pass(dtype: torch.dtype) -> None:
    tensor = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0], dtype=dtype)
    assert all_finite(tensor) and not all_finite(tensor * 2)


def test_integers_and_empty_tensors_pass() -> None:
    check_plain(
        {"a": torch.zeros(0), "b": torch.ones(2, dtype=torch.int64), "c": torch.tensor(True)}, FILE, floats=False
    )
