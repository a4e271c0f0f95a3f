"""The model and the tokenizer that `--weights` and `--adapter` stand for."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_danube.weights.names import Located, locate, locate_adapter
from lightning_danube.weights.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from lightning_danube.model import Decoder

DTYPES = ("float32", "bfloat16", "float16")
KINDS = "a run's directory, a checkpoint (.ckpt), a Hugging Face directory, a GGUF file, a hub id or 'smollm2'"


def add_weights_arguments(parser: ArgumentParser, *, device: bool = True) -> None:
    """Adds `--weights`, `--adapter` and `--dtype`, and `--device` if the model is going to compute."""
    parser.add_argument("--weights", required=True, metavar="NAME", help=KINDS)
    parser.add_argument(
        "--adapter", metavar="NAME", help="a LoRA adapter in PEFT's layout to merge into it: a directory or a hub id"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the parameters (as they are stored)")
    if device:
        parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (cuda where there is one)")


def located_model(arguments: Namespace) -> Located:
    """Returns the model that `--weights` names, and looks for the adapter that `--adapter` names.

    PyTorch is not imported for a missing one.

    Raises:
        ValueError: nothing has this name, or it is not a model or no adapter.
    """
    model = locate(arguments.weights)
    if arguments.adapter is not None:
        locate_adapter(arguments.adapter)
    return model


def load_model(
    weights: str | Located,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[Decoder, PreTrainedTokenizerFast]:
    """The model and its tokenizer. The arguments are those of `load_decoder`.

    Raises:
        ValueError: nothing has this name, or it is not a model.
    """
    located = locate(weights) if isinstance(weights, str) else weights
    if located.kind == "hf":
        from lightning_danube.weights.huggingface import read_hf_config

        read_hf_config(located.path)  # transformers reads it, too, and would blame the tokenizer for a wrong number
    # The tokenizer first: if it is missing, the error comes before a long read.
    tokenizer = load_tokenizer(located)
    return load_decoder(located, adapter=adapter, dtype=dtype, device=device), tokenizer


def load_as_exported(
    weights: str, *, dtype: torch.dtype | str | None = None
) -> tuple[Decoder, PreTrainedTokenizerFast]:
    """The model, and the tokenizer as `export` writes it: it adds the begin token to a text by itself, as in training.

    Raises:
        ValueError: nothing has this name, or it is not a model.
    """
    from lightning_danube.tokens.tokenizer import adding_bos

    decoder, tokenizer = load_model(weights, dtype=dtype)
    return decoder, adding_bos(tokenizer)


def load_decoder(
    weights: str | Located,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """The model without its tokenizer, in training mode.

    Args:
        weights: any of KINDS, or what `locate` returned.
        adapter: the name of a LoRA adapter to merge into the weights; `adapters.load_adapter` keeps one apart.
        dtype: type of the parameters. The default is the type they are stored in; float32 for a quantized GGUF file.
        device: "auto" is the GPU if there is one. The default is the CPU.

    Raises:
        ValueError: nothing has this name, or it is not a model.
    """
    import torch

    from lightning_danube.weights.adapters import load_adapter, merge_adapter
    from lightning_danube.weights.gguf.files import load_gguf
    from lightning_danube.weights.huggingface import load_checkpoint, load_hf

    located = locate(weights) if isinstance(weights, str) else weights
    dtype, device = parse_dtype(dtype), parse_device(device)
    # Before the model is read, so that an error in the adapter's name comes at once.
    directory = None if adapter is None else locate_adapter(adapter)
    if located.adapter_base is None:
        load = {"checkpoint": load_checkpoint, "hf": load_hf, "gguf": load_gguf}[located.kind]
        decoder = load(located.path, dtype=dtype, device=device)
    else:
        # Merged in float32, as in training, and rounded once. An adapter that was trained on 4-bit weights is merged
        # into the weights that the 4 bits stand for.
        decoder = load_adapted_decoder(located, dtype=torch.float32, device=device)
        merge_adapter(decoder, dequantize=True)
        decoder.to(dtype=dtype)
    if directory is not None:
        load_adapter(decoder, directory)
        merge_adapter(decoder)
    return decoder


def load_adapted_decoder(
    checkpoint: Located, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Decoder:
    """The base of a checkpoint's adapter, with the adapter beside its weights.

    Raises:
        ValueError: the base is missing, or is not the model that the adapter was trained on.
    """
    from lightning_danube.weights.adapters import base_digest
    from lightning_danube.weights.huggingface import read_checkpoint
    from lightning_danube.weights.lora import Lora
    from lightning_danube.weights.new_tokens import grow_vocabulary, train_rows

    path, base = checkpoint.path, checkpoint.adapter_base
    assert base is not None, "a checkpoint of a whole model"
    decoder = load_decoder(base, dtype=dtype, device=device)
    saved = read_checkpoint(path)
    # A run may have added tokens, and may have read longer texts.
    sizes = saved["decoder_config"]
    grow_vocabulary(decoder, sizes["vocab_size"])
    decoder.config = replace(decoder.config, max_position_embeddings=sizes["max_position_embeddings"])
    Lora(**saved["lora"]).apply(decoder)
    if "new_token_ids" in saved:
        train_rows(decoder, saved["new_token_ids"])
    digest = base_digest(decoder)
    # A classifier's head is not part of the decoder.
    state = {
        name.removeprefix("decoder."): tensor
        for name, tensor in saved["state_dict"].items()
        if name.startswith("decoder.")
    }
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    if state.keys() != trained:
        raise ValueError(f"{path}: its adapter does not fit {base}, on which it was trained")
    if saved.get("base_digest", digest) != digest:
        raise ValueError(f"{path}: {base} holds other weights than those its adapter was trained on: bring them back")
    decoder.load_state_dict(state, strict=False)
    return decoder


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type that a user names, such as "bfloat16".

    Raises:
        ValueError: no such type is supported.
    """
    if not isinstance(dtype, str):
        return dtype
    check_dtype(dtype)
    import torch

    known: torch.dtype = getattr(torch, dtype)
    return known


def check_dtype(name: str, key: str = "dtype") -> None:
    """Checks the name of a type, without PyTorch.

    Args:
        key: name of the option in messages.

    Raises:
        ValueError: no such type is supported.
    """
    if name not in DTYPES:
        raise ValueError(f"{key} is {name!r}; it has to be one of {', '.join(DTYPES)}")


def parse_device(device: torch.device | str | None) -> torch.device | None:
    """The device that a user names. "auto" is the GPU if there is one.

    Raises:
        ValueError: this machine has no such device.
    """
    if device is None:
        return None
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
        # Only an allocation shows whether the device is there.
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).strip().splitlines()[0]}") from None
    return parsed
