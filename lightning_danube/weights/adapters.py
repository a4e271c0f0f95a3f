"""LoRA adapters in PEFT's layout, on the plain decoder. Only this file imports peft.

The decoder's modules are named as in Hugging Face's LlamaForCausalLM, so an adapter fits both. An adapter trained here
loads with PeftModel on the exported model, and the other way round. PEFT skips names that it does not know or find;
here names, shapes and settings must fit exactly.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_danube.files import read_json
from lightning_danube.model import Decoder
from lightning_danube.terminal import amount, counted, some
from lightning_danube.weights.export_places import EXPORTED_ADAPTER_FILES, export_folder
from lightning_danube.weights.huggingface import (
    SavesPretrained,
    read_tensor,
    tensor_types,
    write_hf_json,
)
from lightning_danube.weights.names import ADAPTER_FILES
from lightning_danube.weights.new_tokens import ROWS, merge_rows, trained_ids, trained_rows

if TYPE_CHECKING:
    from peft import LoraConfig

# On some processors bitsandbytes, which peft imports, looks for a kernel on the hub, and warns that there is none. The
# filter is set here, because jsonargparse runs the import above to find the types.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

CONFIG, TENSORS = ADAPTER_FILES
# PeftModel wraps the model's wrapper, so every name on disk begins with this prefix.
PREFIX = "base_model.model."
# Settings that may have any value. All other settings must have their default, which leaves the base unchanged.
FREE = {
    "auto_mapping",
    "alpha_pattern",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
INITIALIZATIONS = (True, False, "gaussian", "orthogonal")


def add_adapter(decoder: Decoder, **settings: Any) -> None:
    """Adds a new adapter, in place. From then on only the adapter trains. `settings` are those of peft.LoraConfig.

    Raises:
        ValueError: the decoder already has an adapter, or the settings fit none of its layers.
    """
    config = _lora_config(settings, "the adapter")
    _expected_shapes(decoder, config, "the adapter")
    _inject(decoder, config, "the adapter")


def load_adapter(decoder: Decoder, directory: str | Path, *, trainable: bool = False) -> None:
    """Loads an adapter onto a decoder, in place, without changing the weights; `merge_adapter` adds it to them.

    Raises:
        ValueError: the directory has no adapter, or it does not fit the decoder, which then is unchanged.
    """
    source = Path(directory)
    settings = read_settings(source)
    config = _lora_config({**settings, "inference_mode": not trainable}, f"{source / CONFIG}")
    tensors = read_adapter_tensors(source)
    _check_embeddings(decoder, tensors, source)
    _check_shapes(_expected_shapes(decoder, config, f"{source / CONFIG}"), tensors, config, source)
    _inject(decoder, config, f"{source / CONFIG}")
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(decoder, tensors)


def merge_adapter(decoder: Decoder, *, dequantize: bool = False) -> None:
    """Adds the adapter to the weights, in place. The decoder is plain again, and keeps its type.

    For 16-bit weights the sum is rounded to 16 bits: load the base as float32 where that matters.

    Args:
        dequantize: merge an adapter trained on 4-bit layers into plain layers. Rounded to 4 bits, the sum would not be
            the trained model.

    Raises:
        ValueError: the sum is not finite, or the base is in 4 bits and `dequantize` is false.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    merge_rows(decoder)
    if getattr(decoder, "is_loaded_in_4bit", False):
        if not dequantize:
            raise ValueError("the adapter's base is in 4 bits, which cannot hold the sum: merge with dequantize=True")
        _onto_plain_layers(decoder)
    for name, module in list(decoder.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        try:
            module.merge(safe_merge=True)
        except ValueError as error:
            raise ValueError(f"{name}: the adapter cannot be merged: {error}") from error
        parent, _, child = name.rpartition(".")
        setattr(decoder.get_submodule(parent), child, module.get_base_layer())
    del decoder.peft_config
    decoder.requires_grad_(True)


def _onto_plain_layers(decoder: Decoder) -> None:
    """Moves the adapter from 4-bit layers onto plain layers with the dequantized weights."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lightning_danube.weights.quantized_linear import dequantize_linear_layers

    adapters: Any = decoder.peft_config
    config, state = adapters["default"], get_peft_model_state_dict(decoder, save_embedding_layers=False)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, module.get_base_layer())
    del decoder.peft_config
    dequantize_linear_layers(decoder)
    _inject(decoder, config, "the adapter")
    set_peft_model_state_dict(decoder, state)


def save_adapter(
    decoder: Decoder,
    directory: str | Path,
    *,
    base: str | None = None,
    card: str | None = None,
    score: Tensor | None = None,
    tokenizer: SavesPretrained | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the decoder's adapter as PEFT does. `tokenizer` is one with new tokens, which the base does not have.

    `base` names the adapter's base model. `card` goes into README.md. `score` is the classification head that belongs
    to the adapter, as in LlamaForSequenceClassification, (classes, hidden size).
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if not hasattr(decoder, "peft_config"):
        raise ValueError("the decoder has no adapter to save")
    adapters: Any = decoder.peft_config
    config = adapters["default"]
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    content |= {"base_model_name_or_path": base, "inference_mode": True}
    content["task_type"] = content["task_type"] or "CAUSAL_LM"
    state = get_peft_model_state_dict(decoder, save_embedding_layers=False)
    if rows := trained_rows(decoder):
        # PEFT's layout of tokens that train beside an adapter. The base needs as many rows before it takes the adapter.
        ids = trained_ids(decoder)
        content["trainable_token_indices"] = {name.rpartition(".")[2]: ids for name in rows}
        state |= {f"{name}.token_adapter.trainable_tokens_delta": tensor for name, tensor in rows.items()}
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if score is not None:
        content |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        tensors[f"{PREFIX}score.weight"] = score.detach().cpu().contiguous()
    with export_folder(directory, EXPORTED_ADAPTER_FILES, overwrite) as partial:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        write_hf_json(partial / CONFIG, content)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        if card is not None:
            (partial / "README.md").write_text(card, "utf-8")


def base_digest(decoder: Decoder) -> str:
    """Returns a hash of the beginning of each weight of a frozen base, with or without an adapter on it."""
    digest = hashlib.sha256()
    frozen = {
        name.replace(".base_layer.", ".").replace(".parametrizations.weight.original", ".weight"): parameter
        for name, parameter in decoder.named_parameters()
        if ".lora_" not in name and not name.endswith(ROWS)
    }
    for name in sorted(frozen):
        digest.update(name.encode())
        begin = frozen[name].detach().flatten()[:256].cpu()
        # Converted to one type, so that the hash is equal if the base is loaded in 16 bits or more. Packed weights stay
        # bytes.
        begin = begin.float() if begin.is_floating_point() else begin
        digest.update(begin.numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_digest(decoder: Decoder) -> str:
    """Returns a hash of all weights of the base, with or without an adapter, in the type they have."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in decoder.state_dict().items():
        if ".lora_" not in name:
            digest.update(f"{name.replace('.base_layer.', '.')} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_settings(directory: Path) -> dict[str, Any]:
    """Reads adapter_config.json. Refuses settings that do not have the effect here that they have in PEFT."""
    file = directory / CONFIG
    if not file.is_file():
        raise ValueError(f"{directory}: no {CONFIG} in it, so no adapter in PEFT's layout")
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {settings.get('peft_type')!r}; only 'LORA' can be loaded")
    initialization = settings.get("init_lora_weights", True)
    if initialization not in INITIALIZATIONS:
        raise ValueError(
            f"{file}: init_lora_weights is {initialization!r}, which may change the base's own weights; convert it to "
            "plain LoRA when saving (path_initial_model_for_weight_conversion in PEFT)"
        )
    if tokens := settings.get("trainable_token_indices"):
        raise ValueError(
            f"{file}: the adapter has new tokens ({tokens}), which the base does not have: export the run "
            "that trained it with --format hf"
        )
    from_peft = _peft_defaults()
    for key, value in settings.items():
        if key not in FREE and key != "init_lora_weights" and value and value != from_peft.get(key):
            raise ValueError(f"{file}: {key} is {value!r}; only LoRA on whole linear or embedding layers can be loaded")
    return {key: value for key, value in settings.items() if key in FREE}


def read_adapter_tensors(directory: Path) -> dict[str, Tensor]:
    """Reads the tensors of an adapter, by their names in the decoder."""
    file = directory / TENSORS
    if not file.is_file():
        if (directory / "adapter_model.bin").is_file():
            raise ValueError(
                f"{directory}: only pickled weights (adapter_model.bin), which can run anything when read; convert "
                "them to safetensors first"
            )
        raise ValueError(f"{directory}: no {TENSORS} in it")
    tensors = {name: read_tensor(file, name, None, None) for name in tensor_types(file)}
    if foreign := [name for name in tensors if not name.startswith(PREFIX)]:
        raise ValueError(f"{file}: {len(foreign)} names do not begin with {PREFIX}, as PEFT's do: {some(foreign)}")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{file}: {counted(len(broken), 'tensor holds', 'tensors hold')} values that are not finite: {some(broken)}"
        )
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _check_embeddings(decoder: Decoder, tensors: dict[str, Tensor], source: Path) -> None:
    """Removes the copies of the base's embeddings that PEFT saves if an adapter is on them."""
    for name in [name for name in tensors if name.endswith(".base_layer.weight")]:
        theirs, module = tensors.pop(name), name.removesuffix(".base_layer.weight")
        ours = dict(decoder.named_parameters(remove_duplicate=False)).get(f"{module}.weight")
        if ours is None or ours.shape != theirs.shape or not torch.equal(ours.cpu(), theirs.to(ours.dtype)):
            raise ValueError(
                f"{source}: it brings another {module} than the model has: it was made for another base, or with added "
                "tokens"
            )


def _expected_shapes(decoder: Decoder, config: LoraConfig, where: str) -> dict[str, tuple[int, ...]]:
    """Returns name → shape of the tensors that an adapter has on this decoder.

    Computes them on a copy without memory, so that the decoder does not change before everything is known to fit.
    """
    from peft import get_peft_model_state_dict

    if hasattr(decoder, "peft_config"):
        raise ValueError(f"{where}: the decoder has an adapter already; merge that one first")
    with torch.device("meta"):
        empty = Decoder(decoder.config)
    _inject(empty, copy.deepcopy(config), where)
    tied = {"model.embed_tokens": empty.model.embed_tokens, "lm_head": empty.lm_head}
    adapted = [name for name, layer in tied.items() if hasattr(layer, "base_layer")]
    if decoder.config.tie_word_embeddings and adapted:
        raise ValueError(
            f"{where}: it adapts {some(adapted)}, and this model's embedding and head share one weight: merged, it "
            "would change both"
        )
    state = get_peft_model_state_dict(empty, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], config: LoraConfig, source: Path
) -> None:
    made_for = f" (made for {config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    if missing := expected.keys() - tensors.keys():
        raise ValueError(
            f"{source}: {amount(len(missing), 'tensor')} of the adapter{made_for} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {some(missing)}"
        )
    if surplus := tensors.keys() - expected.keys():
        raise ValueError(
            f"{source}: {amount(len(surplus), 'tensor')} of the adapter{made_for} "
            f"{'has' if len(surplus) == 1 else 'have'} no place in this model: {some(surplus)}"
        )
    wrong = [
        f"{name} {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise ValueError(
            f"{source}: {amount(len(wrong), 'tensor')} of the adapter{made_for} "
            f"{'has' if len(wrong) == 1 else 'have'} another shape than this model's layers and "
            f"its settings say: {some(wrong)}"
        )


def _lora_config(settings: Mapping[str, Any], where: str) -> LoraConfig:
    from peft import LoraConfig

    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _inject(decoder: Decoder, config: LoraConfig, where: str) -> None:
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    try:
        inject_adapter_in_model(config, decoder)
    except Exception as error:
        # PEFT does not check settings, so a wrong setting can raise any exception.
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: it fits no layer of this model ({reason})") from error
    # As in PeftModel, adapters get float32, because small updates would be lost in 16 bits.
    cast_adapter_dtype(decoder, "default")


def _peft_defaults() -> dict[str, Any]:
    from peft import LoraConfig

    return LoraConfig().to_dict()
