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
    """The content of a model.

    Args:
        tensor_bytes: size of all tensors; for a GGUF file the size of the file, which is little more.
        weights: parameters of the model, where a tied matrix counts once.
        fallbacks: type → number of matrices stored in it because the level's own type does not fit their shape.
    """

    tensor_bytes: int
    weights: int
    fallbacks: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.weights


class RunningModel(Protocol):
    """A model that returns logits."""

    content: Content

    def logits(self, ids_BT: Tensor, first: int) -> Tensor:
        """Returns logits, (B, T - first, V), for the positions from `first` on."""

    def close(self) -> None:
        """Frees the memory that the model holds outside of Python."""


@dataclass(frozen=True)
class Cost:
    """Speed and memory, measured in a separate process.

    Args:
        prefill_tokens_per_second: speed of reading a prompt.
        decode_tokens_per_second: speed of writing, token by token.
        peak_memory_bytes: the process's peak memory during both, minus its memory before the model was loaded; None
            if the system does not report it.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class MeasuredLevel:
    """The results of one level on the text.

    Args:
        content: the content of the model.
        seconds: duration of the evaluation.
        nats: context length → loss of each token in nats, (windows, counted tokens).
        divergence: (windows, counted tokens) of the first context length: Kullback-Leibler divergence in nats from the
            full model's distribution to the level's. Covers the windows whose full distributions were kept.
        same_first: of equal shape: whether both models have the same likeliest token.
        cloze: (questions,), whether the true continuation was the likeliest.
        cost: None if it was not requested, or could not be measured.
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
    """Returns a key that differs between measurements of different models, levels, texts or versions."""
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
            **arrays,  # type: ignore[arg-type]  # the stub reads them as switches
        )


def load_measured(path: Path) -> MeasuredLevel | None:
    """Reads the results from a file. Returns None if the file is missing or damaged."""
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
    # Whatever the damage is, the level is measured again.
    except Exception:
        return None
