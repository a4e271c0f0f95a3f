"""The tables of layers and families, against the network, the package gguf and transformers."""

import dataclasses
import importlib
from typing import Any

import gguf
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

from lightning_danube.model import PRESETS, Decoder, DecoderConfig, RopeScaling
from lightning_danube.model.architecture import (
    BLOCK_LAYERS,
    FAMILIES,
    OPTIONS,
    family_called,
    family_in_gguf,
    family_of,
    family_options,
    quantizable_layers,
    tensors_added_by,
    tensors_of,
)
from tests.tiny_models import CONFIG, TIED, VARIANTS, tiny_decoder

ALL = {"plain": CONFIG, "tied": TIED, **VARIANTS}


@pytest.fixture(params=list(ALL.values()), ids=list(ALL))
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    found: DecoderConfig = request.param
    return found


def theirs(model_type: str, content: dict[str, Any]) -> PreTrainedConfig:
    """What transformers makes of a config.json."""
    return AutoConfig.for_model(**{**content, "model_type": model_type})


# --- layers ---------------------------------------------------------------------------------------------------------


def test_the_table_has_the_parameters_of_the_network_and_no_others(config: DecoderConfig) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in tiny_decoder(config).named_parameters()}
    assert {tensor.name: tensor.shape for tensor in tensors_of(config)} == shapes


def test_every_option_that_adds_tensors_is_an_option_of_the_config() -> None:
    assert {layer.bias for layer in BLOCK_LAYERS} | {layer.option for layer in BLOCK_LAYERS} <= {None, *OPTIONS}
    assert set(OPTIONS) <= {field.name for field in dataclasses.fields(DecoderConfig)}


def test_the_tensors_of_an_option_are_those_that_the_first_block_has_more(config: DecoderConfig) -> None:
    off = dataclasses.replace(CONFIG, tie_word_embeddings=config.tie_word_embeddings)
    more = {tensor.gguf for tensor in tensors_of(config)} - {tensor.gguf for tensor in tensors_of(off)}
    added = set().union(*map(tensors_added_by, family_options(config)))
    assert added == {name for name in more if name.startswith("blk.0.")}


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("qkv_bias", {"blk.0.attn_q.bias", "blk.0.attn_k.bias", "blk.0.attn_v.bias"}),
        ("qk_norm", {"blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"}),
        ("sliding_window", set()),
    ],
)
def test_options_add_tensors_or_none(option: str, names: set[str]) -> None:
    assert tensors_added_by(option) == names


def test_tensor_parallelism_keeps_the_biases_of_matrices_whose_inputs_it_divides() -> None:
    parts = {layer.short_name: (layer.is_sharded("weight"), layer.is_sharded("bias")) for layer in BLOCK_LAYERS}
    assert parts["q_proj"] == (True, True) and parts["down_proj"] == (True, False)
    assert parts["input_layernorm"] == (False, False)


def test_names_are_those_that_llama_cpps_converter_gives(config: DecoderConfig) -> None:
    """The package gguf has its own table of names, made for the converter."""
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[family_of(config).gguf]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for tensor in tensors_of(config):
        assert names.get_name(tensor.name, (".weight", ".bias")) == tensor.gguf


def test_matrices_gains_and_heads_are_what_the_network_has(config: DecoderConfig) -> None:
    decoder = tiny_decoder(config)
    for tensor in tensors_of(config):
        module = decoder.get_submodule(tensor.name.rpartition(".")[0])
        kind = "embedding" if isinstance(module, nn.Embedding) else "gain"
        if isinstance(module, nn.Linear):
            kind = "head" if module is decoder.lm_head else "matrix"
            if tensor.layer.heads is not None:
                heads = config.num_attention_heads if tensor.layer.heads == "query" else config.num_key_value_heads
                assert module.out_features == heads * (config.head_dim or 0)
        assert tensor.layer.role == kind
    linear = {name for name, module in decoder.model.named_modules(prefix="model") if isinstance(module, nn.Linear)}
    assert set(quantizable_layers(config)) == linear


def test_the_closed_form_counts_the_parameters_of_every_variant(config: DecoderConfig) -> None:
    with torch.device("meta"):
        decoder = Decoder(config)
    assert config.parameters == sum(parameter.numel() for parameter in decoder.parameters())


def test_new_biases_are_zero_and_new_gains_one() -> None:
    for config in (VARIANTS["qwen2"], VARIANTS["qwen3"]):
        for name, parameter in Decoder(config).named_parameters():
            if parameter.ndim == 1:
                assert set(parameter.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name


# --- families -------------------------------------------------------------------------------------------------------


def test_each_variant_is_written_as_its_family(config: DecoderConfig) -> None:
    assert family_of(CONFIG).model_type == "llama"
    for name, variant in VARIANTS.items():
        assert family_of(variant).model_type == name.split(" ")[0]
    assert family_of(config) is family_called(config.to_hf()["model_type"])
    # A file of the family's architecture gives the family again, but for Mistral's, which llama.cpp takes for Llamas.
    if "sliding_window" not in family_options(config):
        assert family_in_gguf(family_of(config).gguf) is family_of(config)


def test_config_json_there_and_back_also_by_transformers(config: DecoderConfig) -> None:
    config = dataclasses.replace(config, attention_dropout=0.25, rms_norm_eps=3e-6)
    assert DecoderConfig.from_hf(config.to_hf()) == config
    read = theirs(family_of(config).model_type, config.to_hf())
    assert DecoderConfig.from_hf(read.to_dict()) == config
    for field in dataclasses.fields(config):
        if field.name not in ("rope_theta", *OPTIONS):
            assert getattr(read, field.name) == getattr(config, field.name), field.name
    assert read.rope_parameters is not None and read.rope_parameters["rope_theta"] == config.rope_theta


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_what_config_json_leaves_out_has_the_defaults_of_its_family(family: Any) -> None:
    sparse = {"hidden_size": 4096, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 32}
    sparse |= {"model_type": family.model_type}
    assert DecoderConfig.from_hf(sparse) == DecoderConfig.from_hf(theirs(family.model_type, sparse).to_dict())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_transformers_has_the_classes_that_are_written(family: Any) -> None:
    package = importlib.import_module("transformers")
    for task in ("CausalLM", "SequenceClassification"):
        assert hasattr(package, family.class_name(task))
    assert family.model_type in AutoModelForSequenceClassification._model_mapping._model_mapping


def test_old_spellings_of_the_rope_scaling_are_read() -> None:
    """transformers 4 has `rope_scaling` and no `rope_parameters`; its older versions say `type`."""
    config = VARIANTS["llama 3.2"]
    for name in ("rope_type", "type"):
        content = config.to_hf()
        del content["rope_parameters"]
        content["rope_scaling"][name] = content["rope_scaling"].pop("rope_type")
        assert DecoderConfig.from_hf(content) == config


def test_a_mistral_without_a_window_is_a_llama() -> None:
    content = {**VARIANTS["mistral"].to_hf(), "sliding_window": None}
    assert DecoderConfig.from_hf(content) == CONFIG


def test_the_window_of_a_qwen_that_is_off_is_no_obstacle() -> None:
    for name in ("qwen2", "qwen3"):
        content = {**VARIANTS[name].to_hf(), "sliding_window": 16, "max_window_layers": 1}
        assert DecoderConfig.from_hf(content) == VARIANTS[name]


def test_layers_without_positions_are_read_from_the_list() -> None:
    content = VARIANTS["smollm3"].to_hf() | {"no_rope_layer_interval": 4}
    assert DecoderConfig.from_hf(content | {"no_rope_layers": [1, 0, 1, 0, 1]}).nope_interval == 2
    assert DecoderConfig.from_hf(content | {"no_rope_layers": [1] * 5}) == TIED_OF_FIVE
    assert DecoderConfig.from_hf(content | {"no_rope_layers": None}).nope_interval == 4


TIED_OF_FIVE = dataclasses.replace(TIED, num_hidden_layers=5)


def test_options_that_are_off_are_not_in_a_checkpoint() -> None:
    """What checkpoints of plain decoders hold does not grow with the options that there are."""
    assert not set(OPTIONS) & CONFIG.facts().keys()
    for config in (*PRESETS.values(), *VARIANTS.values()):
        assert DecoderConfig(**config.facts()) == config
    assert VARIANTS["llama 3.2"].facts()["rope_scaling"]["factor"] == 32.0


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("mistral", {"model_type": "gemma"}, r"model_type is 'gemma'; these can be loaded: llama, mistral, qwen2, q"),
        ("qwen2", {"use_sliding_window": True}, r"use_sliding_window is True; of a qwen2 model only False is"),
        ("qwen3", {"attention_bias": True}, r"attention_bias is True; of a qwen3 model only False is supported"),
        ("smollm3", {"mlp_bias": True}, r"mlp_bias is True; of a smollm3 model only False is supported"),
        ("qwen2", {"rope_scaling": {"type": "yarn"}}, r"rope_scaling asks for rope type 'yarn'; of a qwen2 model only"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            r"asks for rope type 'llama3'; of a qwen2 model only 'default' can be computed",
        ),
        (
            "llama 3.2",
            {"rope_scaling": None, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            r"no low_freq_factor, high_freq_factor, original_max_position_embeddings in the rope parameters of type",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types names sliding_attention; here all layers attend alike, 'full_attention'",
        ),
        ("mistral", {"layer_types": ["full_attention"] * 2}, r"layer_types names full_attention; here all layers"),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1, 0]}, r"no_rope_layers is \[0, 1, 1, 1, 0\]; only every n-th layer"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1, 1]}, r"only every n-th layer can be without rotary positions"),
        ("mistral", {"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu' is supported"),
    ],
)
def test_a_checkpoint_that_would_be_computed_otherwise_is_refused(
    variant: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf({**VARIANTS[variant].to_hf(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, r"sliding_window is 0; give a whole number from 1 on, or none"),
        ({"sliding_window": 2.5}, r"sliding_window is 2.5; give a whole number from 1 on, or none"),
        ({"nope_interval": 1}, r"nope_interval is 1; give a whole number from 2 on, or none"),
        ({"qkv_bias": True, "qk_norm": True}, r"qk_norm and qkv_bias together: no checkpoint that transformers loads"),
        ({"sliding_window": 9, "qkv_bias": True}, r"qkv_bias and sliding_window together: .*: leave one out"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0.0}, r"rope_scaling.factor is 0.0; it has to be a number above 0"),
        ({"factor": "8"}, r"rope_scaling.factor is '8'; it has to be a number above 0"),
        ({"factor": 8.0, "low_freq_factor": 4.0}, r"low_freq_factor is 4.0; it has to be below high_freq_factor, 4.0"),
    ],
)
def test_impossible_scalings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**arguments)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the architecture is 'gemma'; these can be loaded: llama, qwen2, qwen3, smo"):
        family_in_gguf("gemma")
