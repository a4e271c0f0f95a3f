"""Checkpoints of every family: into files and back, in transformers, with adapters, in 4 bits, and what is refused."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_danube.__main__ import main
from lightning_danube.model import Decoder, DecoderConfig, RopeScaling, architecture
from lightning_danube.model.architecture import family_of
from lightning_danube.quantization.decoders import quantized_decoder
from lightning_danube.quantization.levels import parse_level
from lightning_danube.weights.adapters import add_adapter, load_adapter, merge_adapter, save_adapter
from lightning_danube.weights.gguf.files import (
    load_gguf,
    read_gguf_config,
    rotated_by_halves,
    rotated_by_neighbours,
    save_gguf,
)
from lightning_danube.weights.gguf.header import read_gguf_header
from lightning_danube.weights.huggingface import load_hf, save_hf
from lightning_danube.weights.loading import load_decoder
from lightning_danube.weights.lora import Lora
from lightning_danube.weights.quantized_linear import FrozenLinear4bit, quantize_linear_layers
from tests.tiny_models import CONFIG, VARIANTS, tiny_decoder
from tests.weights.gguf.test_files import rewrite

IDS = torch.arange(60).view(2, 30)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def assert_same_model(found: torch.nn.Module, expected: Decoder) -> None:
    others = dict(expected.named_parameters())
    assert dict(found.named_parameters()).keys() == others.keys()
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, others[name]), name


def of_file(name: str) -> DecoderConfig:
    """The variant as a GGUF file says it: the file has no window, and no word about how weights once began."""
    config = VARIANTS[name]
    window = config.sliding_window and config.max_position_embeddings
    return dataclasses.replace(config, initializer_range=0.02, sliding_window=window)


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def test_a_directory_reads_back_here_and_in_transformers(variant: str, tmp_path: Path) -> None:
    decoder = tiny_decoder(VARIANTS[variant]).eval()
    save_hf(decoder, tmp_path / "ours")
    loaded = load_hf(tmp_path / "ours")
    assert loaded.config == decoder.config
    assert_same_model(loaded, decoder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs).__name__ == family_of(decoder.config).class_name("CausalLM")
    assert_same_model(theirs, decoder)
    # What transformers writes is read here, too.
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_hf(tmp_path / "theirs").eval()
    assert again.config == decoder.config
    with torch.no_grad():
        reference = theirs(IDS).logits
        # float32, see test_parity.py.
        assert (again(IDS) - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_a_checkpoint_that_lacks_its_biases_is_refused(tmp_path: Path) -> None:
    save_hf(tiny_decoder(CONFIG), tmp_path / "export")
    config = tmp_path / "export/config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "qwen2"'))
    with pytest.raises(ValueError, match=r"6 tensors are missing: model.layers.0.self_attn.k_proj.bias, "):
        load_hf(tmp_path / "export")


def test_biases_that_the_family_does_not_have_are_refused(tmp_path: Path) -> None:
    save_hf(tiny_decoder(VARIANTS["qwen2"]), tmp_path / "export")
    config = tmp_path / "export/config.json"
    config.write_text(config.read_text().replace('"model_type": "qwen2"', '"model_type": "llama"'))
    with pytest.raises(ValueError, match=r"6 tensors have no place in the model of its config: .*k_proj.bias, "):
        load_hf(tmp_path / "export")


# --- GGUF -----------------------------------------------------------------------------------------------------------


def test_a_gguf_file_reads_back(variant: str, tmp_path: Path) -> None:
    """Its logits in llama.cpp: test_llama_cpp.py."""
    decoder = tiny_decoder(of_file(variant))
    save_gguf(decoder, tmp_path / "model.gguf", dtype=torch.float32)
    loaded = load_gguf(tmp_path / "model.gguf")
    # A window that no text exceeds is none.
    assert loaded.config == read_gguf_config(tmp_path / "model.gguf")
    assert loaded.config == dataclasses.replace(decoder.config, sliding_window=None)
    assert_same_model(loaded, decoder)
    header = read_gguf_header(tmp_path / "model.gguf")
    assert header.fields["general.architecture"] == family_of(decoder.config).gguf
    assert ("rope_freqs.weight" in header.tensors) == (decoder.config.rope_scaling is not None)


def test_an_option_that_is_a_number_of_the_file_is_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No architecture of llama.cpp has such an option yet, so this test keeps the interval of a SmolLM3 in the file."""
    key = "attention.nope_interval"
    kept = [
        dataclasses.replace(family, in_gguf={"nope_interval": key}) if family.model_type == "smollm3" else family
        for family in architecture.FAMILIES
    ]
    decoder = tiny_decoder(dataclasses.replace(of_file("smollm3"), nope_interval=2))
    file = tmp_path / "model.gguf"
    with monkeypatch.context() as patched:
        patched.setattr(architecture, "FAMILIES", kept)
        save_gguf(decoder, file, dtype=torch.float32)
        assert read_gguf_header(file).fields[f"smollm3.{key}"] == 2
        assert read_gguf_config(file) == decoder.config
        for number, interval in ((3, 3), (None, None)):
            other = rewrite(file, tmp_path / "other.gguf", {f"smollm3.{key}": number}, architecture="smollm3")
            assert read_gguf_config(other).nope_interval == interval
        other = rewrite(file, tmp_path / "other.gguf", {f"smollm3.{key}": 2.5}, architecture="smollm3")
        with pytest.raises(ValueError, match=r"nope_interval is 2\.5; give a whole number from 2 on"):
            read_gguf_config(other)
    with pytest.raises(ValueError, match=r"smollm3\.attention\.nope_interval is 2, which is not supported"):
        read_gguf_config(file)


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_of_biases_are_turned_as_those_of_their_weights(heads: int) -> None:
    weight = torch.arange(heads * 8 * 5.0).view(heads * 8, 5)
    turned = rotated_by_neighbours(weight, heads)
    assert torch.equal(rotated_by_neighbours(weight[:, 2], heads), turned[:, 2])
    assert turned[:4, 0].tolist() == [0, 20, 5, 25], "rows 0 and 4 of a head are its first pair"
    assert torch.equal(rotated_by_halves(turned, heads), weight)
    assert torch.equal(rotated_by_halves(turned[:, 2], heads), weight[:, 2])


def test_biases_are_float32_in_a_file_of_16_bits(tmp_path: Path) -> None:
    save_gguf(tiny_decoder(VARIANTS["qwen2"]), tmp_path / "model.gguf", dtype=torch.float16)
    header = read_gguf_header(tmp_path / "model.gguf")
    assert {entry.type for name, entry in header.tensors.items() if name.endswith("bias")} == {0}
    assert load_gguf(tmp_path / "model.gguf").lm_head.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dataclasses.replace(VARIANTS["mistral"], max_position_embeddings=128),
            r"sliding_window 7 is shorter than the context of 128 tokens, and llama.cpp's 'llama' architecture has no "
            r"window: .* set max_position_embeddings to 7 in config.json, or export as hf$",
        ),
        (
            dataclasses.replace(VARIANTS["smollm3"], nope_interval=2),
            r"nope_interval is 2; llama.cpp's 'smollm3' architecture has 4, whatever the file says: export as hf$",
        ),
        (
            dataclasses.replace(VARIANTS["qwen2"], head_dim=24),
            r"head_dim is 24; llama.cpp's 'qwen2' architecture needs hidden_size / num_attention_heads, 16: export",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_not_written(
    config: DecoderConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_gguf(tiny_decoder(config), tmp_path / "model.gguf", dtype=torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "fields", "tensors", "message"),
    [
        (
            "qwen2",
            {"qwen2.rope.scaling.type": "yarn"},
            {},
            r"qwen2.rope.scaling.type is 'yarn'; only rope_freqs.weight",
        ),
        (
            "qwen3",
            {"qwen3.attention.sliding_window": 16},
            {},
            r"qwen3.attention.sliding_window is 16, shorter than the",
        ),
        ("qwen2", {}, {"blk.0.attn_q.bias": None}, r"1 tensor is missing: blk.0.attn_q.bias"),
        ("qwen2", {}, {"blk.0.attn_output.bias": np.ones(64, np.float32)}, r"1 tensor has no place in the model"),
        (
            "qwen3",
            {},
            {"rope_freqs.weight": np.ones(12, np.float32)},
            r"rope_freqs.weight slows rotary positions, which 'qwen3' does not have here",
        ),
        (
            "llama 3.2",
            {},
            {"rope_freqs.weight": np.linspace(1, 32, 8, dtype=np.float32)},
            r"rope_freqs.weight does not hold the factors of Llama 3.1's scaling; others are not supported",
        ),
        (
            "llama 3.2",
            {},
            {"rope_freqs.weight": np.full(8, np.nan, np.float32)},
            r"rope_freqs.weight does not hold the factors of Llama 3.1's scaling",
        ),
        (
            "llama 3.2",
            {},
            {"rope_freqs.weight": np.ones(7, np.float32)},
            r"rope_freqs.weight is not a float32 tensor of 8 numbers, one a pair of channels",
        ),
    ],
)
def test_a_file_that_would_be_computed_otherwise_is_refused(
    name: str, fields: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = of_file(name)
    save_gguf(tiny_decoder(config), tmp_path / "model.gguf", dtype=torch.float32)
    architecture = family_of(config).gguf
    file = rewrite(tmp_path / "model.gguf", tmp_path / "other.gguf", fields, tensors, architecture=architecture)
    with pytest.raises(ValueError, match=rf"^[^\n]*other.gguf: {message}"):
        load_gguf(file)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_as_a_converter_computes_them_are_understood(factor: float, tmp_path: Path) -> None:
    """In float32, by the formula of llama.cpp's converter."""
    config = dataclasses.replace(of_file("llama 3.2"), rope_scaling=RopeScaling(factor))
    save_gguf(tiny_decoder(config), tmp_path / "model.gguf", dtype=torch.float32)
    factors = []
    for i in range(0, 16, 2):
        wavelength = 2 * np.pi / np.float32(1.0 / 500000.0 ** np.float32(i / 16))
        smooth = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    array = np.array(factors, np.float32)
    file = rewrite(tmp_path / "model.gguf", tmp_path / "other.gguf", tensors={"rope_freqs.weight": array})
    assert load_gguf(file).config == config


# --- adapters and quantization --------------------------------------------------------------------------------------


def test_an_adapter_is_that_of_peft_on_transformers_model(variant: str, tmp_path: Path) -> None:
    decoder = tiny_decoder(VARIANTS[variant]).eval()
    save_hf(decoder, tmp_path / "base")
    adapted = copy.deepcopy(decoder)
    Lora(rank=4, dropout=0.0).apply(adapted)
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    save_adapter(adapted, tmp_path / "adapter", base=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        reference = theirs.eval()(IDS).logits
        assert (reference - decoder(IDS)).abs().max() > 1e-2 * reference.abs().max()
        again = copy.deepcopy(decoder)
        load_adapter(again, tmp_path / "adapter")
        for model in (adapted, again):
            assert (model(IDS) - reference).abs().max() <= 1e-5 * reference.abs().max()
        merge_adapter(again)
        assert (again(IDS) - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_biases_stay_beside_4_bit_weights_and_after_a_merge() -> None:
    config = dataclasses.replace(VARIANTS["qwen2"], intermediate_size=128)
    decoder, plain = tiny_decoder(config).eval(), tiny_decoder(config).eval()
    quantize_linear_layers(decoder, "nf4")
    for name, layer in decoder.named_modules():
        if isinstance(layer, FrozenLinear4bit):
            plain.get_submodule(name).weight.data = layer.weight_values(torch.float32)
    with torch.no_grad():
        expected = plain(IDS)
        # The same products by another kernel.
        assert (decoder(IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()
        add_adapter(decoder, r=2, target_modules=["q_proj"])
        merge_adapter(decoder, dequantize=True)
        assert (decoder(IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert_same_names(decoder, plain)


def assert_same_names(one: Decoder, other: Decoder) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize("level", ["bitsandbytes:int8", "bitsandbytes:nf4", "hqq:8/64", "rounding:8/64"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_levels_compute_with_the_biases_and_norms(name: str, level: str) -> None:
    config = dataclasses.replace(VARIANTS[name], intermediate_size=128, head_dim=16)
    decoder = tiny_decoder(config).eval()
    running = quantized_decoder(decoder, parse_level(level))
    plain = tiny_decoder(config).eval()
    for module, layer in running.decoder.named_modules():
        if hasattr(layer, "weight_values"):
            plain.get_submodule(module).weight.data = layer.weight_values(torch.float32)
    with torch.no_grad():
        found, wanted = running.logits(IDS, 0), plain(IDS)
        # LLM.int8 rounds the inputs of each layer, too.
        assert (found - wanted).norm() < (0.1 if level.endswith("int8") else 1e-5) * wanted.norm()
    small = sum(parameter.numel() for parameter in decoder.parameters() if parameter.ndim == 1)
    assert running.content.tensor_bytes > 4 * small


# --- from training to other programs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_decoder_that_was_trained_with_the_options_of_qwen3_answers_alike_in_transformers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny)
    # transformers reads no head dimension from the GGUF file of a Qwen3, and takes 128.
    Path("qwen3.yaml").write_text(
        "model: {init_args: {decoder: {qk_norm: true, tie_word_embeddings: true, head_dim: 128, rms_norm_eps: 1.0e-6}}}"
    )
    assert main(["fit", "--config", "tiny.yaml", "--config", "qwen3.yaml", "--trainer.max_steps", "12"]) == 0
    run = "runs/tiny/version_0"
    for kind, *options in (("hf", "--dtype", "float32", "--out", "hf"), ("gguf", "--type", "F32", "--out", "x.gguf")):
        assert main(["export", "--weights", run, "--format", kind, *options]) == 0
    ours = load_decoder(run, dtype=torch.float32).eval()
    # Training has moved the gains of the heads: a program that ignored them would answer otherwise.
    assert (ours.get_parameter("model.layers.1.self_attn.q_norm.weight") - 1).abs().max() > 1e-3
    readers = {"hf": {}, ".": {"gguf_file": "x.gguf"}}
    for directory, reading in readers.items():
        theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **reading).eval()
        assert type(theirs).__name__ == "Qwen3ForCausalLM"
        assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
        with torch.no_grad():
            reference = theirs(IDS).logits
            # float32, see test_parity.py.
            assert (ours(IDS) - reference).abs().max() <= 1e-5 * reference.abs().max()
