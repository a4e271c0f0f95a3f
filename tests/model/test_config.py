import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lightning_danube.model import PRESETS, Decoder, DecoderConfig
from lightning_danube.model.architecture import OPTIONS

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


@pytest.mark.parametrize(("name", "parameters"), [("danube3-500m", 513_590_784), ("danube3-4b", 3_961_839_360)])
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    config = DecoderConfig.preset(name)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == parameters == config.parameters


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 40}, {"num_key_value_heads": 4}])
def test_the_closed_form_counts_what_is_there(changes: dict[str, Any]) -> None:
    config = DecoderConfig(**{**TINY, **changes})
    with torch.device("meta"):
        decoder = Decoder(config)
    assert config.parameters == sum(parameter.numel() for parameter in decoder.parameters())
    embedding = decoder.model.embed_tokens.weight.numel()
    assert config.parameters_without_embedding == config.parameters - embedding


def test_flops_of_the_500m_by_hand() -> None:
    config = DecoderConfig.preset("danube3-500m")
    linear = 6 * (513_590_784 - 32000 * 1536)
    square = 12 * 16 * 1536 * 8192
    assert config.flops_per_token(8192) == linear + square == 5_202_551_808
    assert config.flops_per_token(8192, causal=True) == linear + square // 2


def test_a_tied_head_multiplies_as_an_untied_one_does() -> None:
    untied = DecoderConfig(**TINY)
    tied = dataclasses.replace(untied, tie_word_embeddings=True)
    assert tied.flops_per_token(128) == untied.flops_per_token(128)


def test_cache_bytes_by_hand() -> None:
    # 2 (keys and values) x 16 layers x 8 heads x 96 channels x 2 bytes
    assert DecoderConfig.preset("danube3-500m").cache_bytes(1) == 49_152
    assert DecoderConfig.preset("danube3-500m").cache_bytes(10, bytes_per_value=4) == 983_040


@pytest.mark.parametrize("config", [*PRESETS.values(), DecoderConfig(**TINY, tie_word_embeddings=True, head_dim=10)])
def test_hf_there_and_back(config: DecoderConfig) -> None:
    assert DecoderConfig.from_hf(config.to_hf()) == config


def test_transformers_reads_the_same_facts() -> None:
    config = DecoderConfig(**TINY, head_dim=20, rope_theta=5000.0, rms_norm_eps=3e-6, attention_dropout=0.25)
    read = LlamaConfig.from_dict(config.to_hf(bos_id=3, eos_id=4, pad_id=5))
    for field in dataclasses.fields(config):
        if field.name not in ("rope_theta", *OPTIONS):
            assert getattr(read, field.name) == getattr(config, field.name), field.name
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (3, 4, 5)
    # What it writes itself is read here, too.
    assert DecoderConfig.from_hf(read.to_dict()) == config


def test_both_forms_of_the_rotary_base_are_read() -> None:
    new = DecoderConfig(**TINY, rope_theta=777.0).to_hf()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    del new["rope_theta"]
    assert DecoderConfig.from_hf(old).rope_theta == DecoderConfig.from_hf(new).rope_theta == 777.0


def test_what_config_json_leaves_out_has_transformers_defaults() -> None:
    sparse = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sparse |= {"num_attention_heads": 4}
    assert DecoderConfig.from_hf(sparse) == DecoderConfig.from_hf(LlamaConfig.from_dict(sparse).to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, r"num_key_value_heads 3 does not divide num_attention_heads 4; these do: 1, 2, 4"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads is 0; it has to be above 0"),
        ({"hidden_size": -1}, r"hidden_size is -1; it has to be above 0"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0; it has to be above 0"),
        ({"head_dim": 0}, r"head_dim is 0; it has to be above 0"),
        ({"hidden_size": 66}, r"hidden_size 66 is not a multiple of num_attention_heads 4; 64 would be"),
        (
            {"hidden_size": 68, "head_dim": None},
            r"hidden_size 68 and num_attention_heads 4 make a head_dim of 17, .* use a hidden_size of 64 or 72, or",
        ),
        ({"hidden_size": 4, "head_dim": None}, r"make a head_dim of 1, which is odd; .* so use a hidden_size of 8, or"),
        ({"head_dim": 15}, r"head_dim 15 is odd; .* use 14 or 16"),
        ({"attention_dropout": 1.0}, r"attention_dropout is 1.0; it has to be at least 0 and below 1"),
        ({"attention_dropout": -0.1}, r"attention_dropout is -0.1; it has to be at least 0 and below 1"),
    ],
)
def test_an_impossible_shape_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**TINY, **changes})


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no preset is called 'danube-500m'; did you mean danube3-500m\?"):
        DecoderConfig.preset("danube-500m")
    with pytest.raises(ValueError, match=r"no preset is called 'x'; there are danube3-500m, danube3-4b"):
        DecoderConfig.preset("x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, r"model_type is 'gemma'; these can be loaded: llama, mistral"),
        ({"attention_bias": True}, r"attention_bias is True; of a llama model only False is supported"),
        ({"model_type": "smollm3", "mlp_bias": True}, r"mlp_bias is True; of a smollm3 model only False is supported"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu' is supported"),
        ({"pretraining_tp": 2}, r"pretraining_tp is 2; of a llama model only 1 is supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is set; load the unquantized weights"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling asks for rope type 'linear'; of a l"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_parameters asks for rope type 'yarn'; of a"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5; this decoder rotates every channel"),
        ({"hidden_size": None}, r"no hidden_size in the config of a llama model"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf({**DecoderConfig(**TINY).to_hf(), **changes})
