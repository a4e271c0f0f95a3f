"""`export`: writes a trained model for other programs: Hugging Face, llama.cpp, PEFT."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from lightning_danube.files import naming, scratch_folder
from lightning_danube.terminal import tell
from lightning_danube.weights.export_places import (
    EXPORTED_ADAPTER_FILES,
    EXPORTED_FILES,
    check_gguf_target,
    check_target,
    export_target,
    exporting,
)
from lightning_danube.weights.loading import add_weights_arguments, load_decoder, located_model
from lightning_danube.weights.names import Located, locate, locate_adapter
from lightning_danube.weights.tokenizers import load_tokenizer

FORMATS = ("hf", "gguf", "peft")
DEFAULT_TYPE = "F16"


def add_arguments(parser: ArgumentParser) -> None:
    add_weights_arguments(parser, device=False)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="hf",
        help="hf: config.json, safetensors, tokenizer, model card (default); gguf: one file for llama.cpp; "
        "peft: only the adapter: that of --adapter, or the one that the run has trained",
    )
    parser.add_argument(
        "--type",
        metavar="TYPE",
        help="of a GGUF file: F32, F16, BF16, or one that llama.cpp quantizes to, such as Q8_0 or Q4_K_M "
        f"({DEFAULT_TYPE})",
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="directory to create; for gguf a file")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")


def run(arguments: Namespace) -> None:
    _check(arguments)
    export = {"hf": _export_hf, "gguf": _export_gguf, "peft": _export_adapter}[arguments.format]
    with exporting(arguments.out), naming(Path(arguments.out)):
        # Both before PyTorch is imported, and before the weights are read, which takes minutes.
        _check_place(arguments)
        export(arguments, located_model(arguments))


def _check(arguments: Namespace) -> None:
    """Refuses options that would have no effect, an unknown type, and a type that needs llama.cpp without it."""
    if arguments.format == "gguf":
        if arguments.dtype is not None:
            raise ValueError("--dtype is for --format hf: the type of a GGUF file is --type")
        if not arguments.out.endswith(".gguf"):
            raise ValueError(f"--out {arguments.out}: a GGUF file is looked for by its ending, so add .gguf")
        _check_type(arguments.type or DEFAULT_TYPE)
    elif arguments.type is not None:
        raise ValueError(f"--type is for --format gguf: the type of --format {arguments.format} is --dtype")
    if arguments.format == "peft" and arguments.dtype is not None:
        raise ValueError("--dtype is for --format hf: an adapter is written as it is")


def _check_type(file_type: str) -> None:
    from lightning_danube.weights.llama_cpp import UNQUANTIZED, check_file_type, import_llama_cpp

    if check_file_type(file_type) not in UNQUANTIZED:
        import_llama_cpp()


def _check_place(arguments: Namespace) -> None:
    if arguments.format == "gguf":
        check_gguf_target(export_target(arguments.out), arguments.overwrite)
    else:
        known = EXPORTED_FILES if arguments.format == "hf" else EXPORTED_ADAPTER_FILES
        check_target(Path(arguments.out), known, arguments.overwrite)


def _export_hf(arguments: Namespace, weights: Located) -> None:
    from lightning_danube.classification.exported import is_classifier
    from lightning_danube.files import read_json
    from lightning_danube.tokens.chat_template import end_ids
    from lightning_danube.tokens.tokenizer import adding_bos
    from lightning_danube.weights.huggingface import save_hf
    from lightning_danube.weights.model_card import model_card

    out = Path(arguments.out)
    if is_classifier(weights):
        _export_classifier(arguments, weights)
        return
    tokenizer = load_tokenizer(weights)
    decoder = load_decoder(weights, adapter=arguments.adapter, dtype=arguments.dtype)
    generation = weights.path / "generation_config.json"
    settings = read_json(generation) if weights.kind == "hf" and generation.is_file() else {}
    ends = end_ids(tokenizer)
    if len(ends) > 1:
        # transformers ends a text at each of these tokens. The token that ends a turn need not be eos.
        settings["eos_token_id"] = ends
    save_hf(
        decoder,
        out,
        tokenizer=adding_bos(tokenizer),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        generation=settings,
        card=model_card(out.resolve().name, decoder, tokenizer, weights, arguments.adapter),
        overwrite=arguments.overwrite,
    )
    dtype = str(decoder.model.embed_tokens.weight.dtype).removeprefix("torch.")
    tell(f"{decoder.config.parameters:,} parameters written as {dtype} to {out}")


def _export_classifier(arguments: Namespace, weights: Located) -> None:
    """Exports a run of TextClassification as LlamaForSequenceClassification."""
    from lightning_danube.classification.exported import load_classifier, save_hf_classifier
    from lightning_danube.weights.model_card import classifier_card

    if arguments.adapter is not None:
        raise ValueError(f"--adapter: {arguments.weights} is a classifier with its own adapter; leave it out")
    classifier, out = load_classifier(weights, dtype=arguments.dtype), Path(arguments.out)
    length = classifier.tokenizer.model_max_length
    card = classifier_card(out.resolve().name, classifier.decoder, weights, classifier.labels, length)
    save_hf_classifier(classifier, out, card=card, overwrite=arguments.overwrite)
    dtype = str(classifier.score_CD.dtype).removeprefix("torch.")
    tell(f"a classifier of {len(classifier.labels)} classes written as {dtype} to {out}")


def _export_gguf(arguments: Namespace, weights: Located) -> None:
    import torch

    from lightning_danube.classification.exported import is_classifier
    from lightning_danube.weights.gguf.files import save_gguf
    from lightning_danube.weights.gguf.tokenizer import gguf_tokenizer_fields
    from lightning_danube.weights.llama_cpp import UNQUANTIZED, check_file_type, measure, quantize

    file_type, out = check_file_type(arguments.type or DEFAULT_TYPE), export_target(arguments.out)
    if is_classifier(weights):
        raise ValueError(f"{arguments.weights} is a classifier, which llama.cpp has no head for: --format hf or peft")
    fields = gguf_tokenizer_fields(load_tokenizer(weights))
    decoder = load_decoder(weights, adapter=arguments.adapter)
    name = _model_name(weights)
    written_as = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if file_type in UNQUANTIZED:
        save_gguf(decoder, out, dtype=written_as[file_type], tokenizer_fields=fields, name=name, overwrite=True)
        content = measure(out)
    else:
        # Beside the target, not in $TMPDIR, which may be memory.
        with scratch_folder(out) as scratch:
            whole = scratch / "whole.gguf"
            # The type is that of the weights, so that the weights are rounded only once.
            dtype = decoder.model.embed_tokens.weight.dtype
            save_gguf(decoder, whole, dtype=dtype, tokenizer_fields=fields, name=name)
            del decoder
            content = quantize(whole, out, file_type)
    tell(f"{file_type} written to {arguments.out}: {content.describe()}")


def _export_adapter(arguments: Namespace, weights: Located) -> None:
    from lightning_danube.weights.adapters import load_adapter, read_settings, save_adapter
    from lightning_danube.weights.model_card import adapter_card

    if arguments.adapter is None:
        _export_trained_adapter(arguments, weights)
        return
    directory = locate_adapter(arguments.adapter)
    decoder = load_decoder(weights)
    load_adapter(decoder, directory, trainable=True)
    parameters = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    settings = read_settings(directory)
    # A name that transformers can load, which a checkpoint or GGUF file of this project is not.
    base = arguments.weights if weights.kind == "hf" else settings.get("base_model_name_or_path")
    out = Path(arguments.out)
    card = adapter_card(out.resolve().name, base, settings, parameters)
    save_adapter(decoder, out, base=base, card=card, overwrite=arguments.overwrite)
    tell(f"adapter with {parameters:,} parameters written to {out}")


def _export_trained_adapter(arguments: Namespace, weights: Located) -> None:
    """Exports the adapter that a run of this project has trained."""
    from lightning_danube.classification.exported import is_classifier, load_classifier
    from lightning_danube.tokens.tokenizer import adding_bos
    from lightning_danube.weights.adapters import save_adapter
    from lightning_danube.weights.loading import load_adapted_decoder
    from lightning_danube.weights.model_card import adapter_card
    from lightning_danube.weights.new_tokens import trained_ids

    if weights.adapter_base is None:
        raise ValueError(f"--format peft writes an adapter: {arguments.weights} has none, so name one with --adapter")
    if is_classifier(weights):
        classifier = load_classifier(weights, merge=False)
        decoder, score_CD, labels = classifier.decoder, classifier.score_CD, classifier.labels
    else:
        decoder, score_CD, labels = load_adapted_decoder(weights), None, None
    adapters: Any = decoder.peft_config
    config = adapters["default"]
    base = weights.adapter_base if locate(weights.adapter_base).kind == "hf" else None
    parameters = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    parameters += 0 if score_CD is None else score_CD.numel()
    out = Path(arguments.out)
    new = trained_ids(decoder)
    vocabulary = decoder.config.vocab_size if new else None
    card = adapter_card(out.resolve().name, base, config.to_dict(), parameters, labels, vocabulary)
    tokenizer = adding_bos(load_tokenizer(weights)) if new else None
    save_adapter(decoder, out, base=base, card=card, score=score_CD, tokenizer=tokenizer, overwrite=arguments.overwrite)
    tell(f"adapter with {parameters:,} parameters written to {out}")


def _model_name(weights: Located) -> str:
    """Returns the model's name for programs that read the file: the run, or the name of the weights."""
    if weights.kind == "checkpoint":
        run = weights.path.parent.parent
        return f"{run.parent.name}/{run.name}"
    return weights.typed.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
