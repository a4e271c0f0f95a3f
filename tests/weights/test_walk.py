"""How far a reader has to go to follow `load_model`: the rooms of the package that its calls lead through."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import lightning_danube
from lightning_danube.weights.gguf.files import save_gguf
from lightning_danube.weights.gguf.tokenizer import gguf_tokenizer_fields
from lightning_danube.weights.loading import load_model
from tests.test_layering import GENERAL
from tests.tiny_models import save_tiny, tiny_decoder, tiny_tokenizer

ROOT = Path(lightning_danube.__file__).resolve().parent
MOST_STAYS = 8


def room_of(frame: FrameType | None) -> str | None:
    """Returns the room of the package that a frame lies in, or of the nearest of its callers that lies in one."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and file.name != "__init__.py":
            return file.relative_to(ROOT).with_suffix("").parts[0]
        frame = frame.f_back
    return None


def stays(call: Callable[[], Any]) -> list[str]:
    """Returns the rooms that a reader of a call enters, in order.

    The reader follows each call, reads each function once, and returns to where the call stands. Rooms of one file for
    all others, such as `files`, are tools with a stated guarantee, and are not entered. Calls that lead to the room of
    the last stay do not begin another.
    """
    call()  # imports what the walk needs: a module's own lines are no calls
    read, entered = set(), []

    def enter(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code not in read and Path(frame.f_code.co_filename).is_relative_to(ROOT):
            read.add(frame.f_code)
            room = room_of(frame)
            if room is not None and room not in GENERAL and room != room_of(frame.f_back):
                entered.append(room)

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(before)
    return [room for room, _ in itertools.groupby(entered)]


def gguf(directory: Path) -> Path:
    fields = gguf_tokenizer_fields(tiny_tokenizer())
    save_gguf(tiny_decoder(), directory / "tiny.gguf", dtype=torch.float32, tokenizer_fields=fields)
    return directory / "tiny.gguf"


@pytest.mark.parametrize("make", [lambda directory: save_tiny(directory / "tiny"), gguf], ids=["hf", "gguf"])
def test_loading_a_model_leads_through_few_rooms(make: Callable[[Path], Path], tmp_path: Path) -> None:
    name = str(make(tmp_path))
    found = stays(lambda: load_model(name))
    assert found[0] == "weights" and {"model", "tokens"} <= set(found)
    assert len(found) <= MOST_STAYS, f"the walk of load_model has {len(found)} stays: {' → '.join(found)}"


def test_loading_a_run_leads_through_few_rooms(tiny_run: Path) -> None:
    found = stays(lambda: load_model(str(tiny_run)))
    assert found[0] == "weights" and {"model", "tokens", "checkpoints"} <= set(found)
    assert len(found) <= MOST_STAYS, f"the walk of load_model has {len(found)} stays: {' → '.join(found)}"
