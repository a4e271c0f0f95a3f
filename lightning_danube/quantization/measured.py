"""The measurements of one level, token by token, and the file that keeps them: no level is measured twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_danube.files import new_file

FORMAT = 1
Array = NDArray[Any]


@dataclass(frozen=True)
class Content:
    """What a model holds.

    Args:
        tensor_bytes: of all tensors; of a GGUF file those of the file, which is little more.
        weights: parameters of the model, a tied matrix once.
        fallbacks: type → how many matrices have it because the level's own does not fit their shape.
    """

    tensor_bytes: int
    weights: int
    fallbacks: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.weights


class RunningModel(Protocol):
    """A model that answers with logits."""

    content: Content

    def logits(self, ids_BT: Tensor, first: int) -> Tensor:
        """(B, T - first, V), at the places from `first` on."""

    def close(self) -> None:
        """Gives back what it holds outside of Python's memory."""


@dataclass(frozen=True)
class Cost:
    """Speed and memory, measured in a process of its own.

    Args:
        prefill_tokens_per_second: of reading a text.
        decode_tokens_per_second: of writing, one token after the other.
        peak_memory_bytes: most that the process held while doing so beyond what it held before the model was there;
            None where the system does not tell.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class MeasuredLevel:
    """What a level said of the text.

    Args:
        content: what the model holds.
        seconds: that it took.
        nats: context length → (windows, counted tokens) of each.
        divergence: (windows, counted tokens) of the first context length, nats from the full model's distribution to
            the level's (Kullback-Leibler); of as many windows as the full model's were kept of.
        same_first: likewise, whether both have the same likeliest token.
        cloze: (questions,), whether the true continuation was the likeliest.
        cost: None where it was not asked for, or not to be had.
    """

    content: Content
    seconds: float
    nats: Mapping[int, Array]
    divergence: Array
    same_first: Array
    cloze: Array
    cost: Cost | None = None
    cost_reason: str = field(default="", compare=False)


def measured_key(**facts: Any) -> str:
    """Tells a measurement from one of another model, level, text or version."""
    text = json.dumps([FORMAT, facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def save_measured(path: Path, measured: MeasuredLevel) -> None:
    facts = {
        "content": asdict(measured.content),
        "seconds": measured.seconds,
        "cost": None if measured.cost is None else asdict(measured.cost),
        "cost_reason": measured.cost_reason,
    }
    arrays = {f"nats_{length}": nats.astype(np.float32) for length, nats in measured.nats.items()}
    with new_file(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            facts=np.array(json.dumps(facts)),
            divergence=measured.divergence.astype(np.float32),
            same_first=measured.same_first,
            cloze=measured.cloze,
            **arrays,  # type: ignore[arg-type]  # its stub takes them for switches
        )


def load_measured(path: Path) -> MeasuredLevel | None:
    """None where nothing, or nothing whole, is kept."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            facts = json.loads(str(kept["facts"]))
            lengths = [int(name.removeprefix("nats_")) for name in kept.files if name.startswith("nats_")]
            return MeasuredLevel(
                Content(**facts["content"]),
                facts["seconds"],
                {length: kept[f"nats_{length}"] for length in sorted(lengths)},
                kept["divergence"],
                kept["same_first"],
                kept["cloze"],
                None if facts["cost"] is None else Cost(**facts["cost"]),
                facts["cost_reason"],
            )
    # Whatever is wrong with a damaged archive: it is measured again.
    except Exception:
        return None
