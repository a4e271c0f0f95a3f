"""One meaning of `--weights`, wherever a model is asked for."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_danube.runs import newest_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.model import Decoder


def add_weights_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        required=True,
        metavar="PATH",
        help="a run's directory, a checkpoint file (.ckpt), or a Hugging Face directory",
    )


def load_model(weights: str) -> tuple[Decoder, PreTrainedTokenizerBase]:
    """Model and tokenizer.

    Raises:
        ValueError: nothing of that name is there, or it is no model.
    """
    from lightning_danube.data.tokenizer import load_hf_tokenizer
    from lightning_danube.model import load_checkpoint, load_hf

    path = Path(weights).expanduser()
    if not path.exists():
        raise ValueError(f"--weights {weights}: there is no such file or directory")
    if path.is_dir() and (path / "config.json").exists():
        return load_hf(path), load_hf_tokenizer(str(path))
    if path.is_dir():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise ValueError(
                f"--weights {weights}: neither a Hugging Face directory (config.json) nor a run (checkpoints/*.ckpt)"
            )
        path = checkpoint
    return load_checkpoint(path), load_hf_tokenizer(tokenizer_of_checkpoint(path))


def tokenizer_of_checkpoint(path: Path) -> str:
    """Name of the tokenizer a checkpoint was trained with."""
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return str(checkpoint["CurriculumData"]["tokenizer"]["name"])
