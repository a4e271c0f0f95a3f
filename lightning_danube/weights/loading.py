"""One meaning of `--weights` and `--adapter`, wherever a model is asked for."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_danube.weights.names import Weights, load_tokenizer, locate_adapter, locate_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from lightning_danube.model import Decoder

DTYPES = ("float32", "bfloat16", "float16")
KINDS = "a run's directory, a checkpoint (.ckpt), a Hugging Face directory, a GGUF file, a hub id or 'smollm2'"


def add_weights_arguments(parser: ArgumentParser, *, device: bool = True) -> None:
    """`--weights`, `--adapter` and `--dtype`, and `--device` where the model is going to compute."""
    parser.add_argument("--weights", required=True, metavar="NAME", help=KINDS)
    parser.add_argument(
        "--adapter", metavar="NAME", help="a LoRA adapter in PEFT's layout to merge into it: a directory or a hub id"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the parameters (as they are stored)")
    if device:
        parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (cuda where there is one)")


def load_model(
    weights: str | Weights,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[Decoder, PreTrainedTokenizerFast]:
    """Model and tokenizer; arguments as in `load_decoder`.

    Raises:
        ValueError: nothing of that name is there, or it is no model.
    """
    located = locate_weights(weights) if isinstance(weights, str) else weights
    # The tokenizer first: if it is not to be had, nothing large has been read.
    tokenizer = load_tokenizer(located)
    return load_decoder(located, adapter=adapter, dtype=dtype, device=device), tokenizer


def load_as_exported(
    weights: str, *, dtype: torch.dtype | str | None = None
) -> tuple[Decoder, PreTrainedTokenizerFast]:
    """Model, and the tokenizer that its Hugging Face export has: that begins a text by itself as training did.

    Raises:
        ValueError: nothing of that name is there, or it is no model.
    """
    from lightning_danube.tokens.tokenizer import adding_bos

    located = locate_weights(weights)
    decoder, tokenizer = load_model(located, dtype=dtype)
    return decoder, tokenizer if located.kind == "hf" else adding_bos(tokenizer)


def load_decoder(
    weights: str | Weights,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """The model alone, in training mode.

    Args:
        weights: any of KINDS, or what `locate_weights` found.
        adapter: a LoRA adapter, merged into the weights; `adapters.load_adapter` keeps it apart.
        dtype: type of the parameters, as stored if not given; of quantized GGUF files float32.
        device: "auto" is the GPU where there is one; not given, the CPU.

    Raises:
        ValueError: nothing of that name is there, or it is no model.
    """
    import torch

    from lightning_danube.weights.gguf.files import load_gguf
    from lightning_danube.weights.huggingface import load_checkpoint, load_hf

    weights = locate_weights(weights) if isinstance(weights, str) else weights
    dtype, device = parse_dtype(dtype), parse_device(device)
    # An adapter that cannot be found or read is no reason to wait for the model first.
    directory = None if adapter is None else locate_adapter(adapter)
    trained_on = adapter_base(weights)
    if trained_on is not None:
        from lightning_danube.weights.adapters import merge_adapter

        # As in training, and rounded once, when the adapter is in. What was trained on weights in 4 bits is merged into
        # what those stand for.
        decoder = load_decoder(trained_on, dtype=torch.float32, device=device)
        load_trained_adapter(decoder, weights.path)
        merge_adapter(decoder, dequantize=True)
        decoder.to(dtype=dtype)
    else:
        load = {"checkpoint": load_checkpoint, "hf": load_hf, "gguf": load_gguf}[weights.kind]
        decoder = load(weights.path, dtype=dtype, device=device)
    if directory is not None:
        from lightning_danube.weights.adapters import load_adapter, merge_adapter

        load_adapter(decoder, directory)
        merge_adapter(decoder)
    return decoder


def adapter_base(weights: Weights) -> str | None:
    """The weights on which the adapter in a checkpoint of ours was trained; None for a checkpoint of a whole model."""
    if weights.kind != "checkpoint":
        return None
    from lightning_danube.weights.huggingface import read_checkpoint

    checkpoint = read_checkpoint(weights.path)
    return str(checkpoint["base_weights"]) if "lora" in checkpoint else None


def load_trained_adapter(decoder: Decoder, path: Path) -> None:
    """Put the adapter in a checkpoint of ours onto its base, beside its weights.

    Raises:
        ValueError: the decoder is not the base that it was trained on.
    """
    from lightning_danube.weights.adapters import Lora, base_digest
    from lightning_danube.weights.huggingface import read_checkpoint

    checkpoint = read_checkpoint(path)
    Lora(**checkpoint["lora"]).apply(decoder)
    digest = base_digest(decoder)
    # A classifier's head is no part of the decoder.
    state = {
        name.removeprefix("decoder."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("decoder.")
    }
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    if state.keys() != trained:
        raise ValueError(f"{path}: its adapter does not fit {checkpoint['base_weights']}, on which it was trained")
    if checkpoint.get("base_digest", digest) != digest:
        raise ValueError(
            f"{path}: {checkpoint['base_weights']} holds other weights than those its adapter was trained on: bring "
            "them back"
        )
    decoder.load_state_dict(state, strict=False)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it has to be one of {', '.join(DTYPES)}")
    known: torch.dtype = getattr(torch, dtype)
    return known


def parse_device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
        # Asking for memory is what tells whether the device is there.
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).strip().splitlines()[0]}") from None
    return parsed
