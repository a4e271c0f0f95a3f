import dataclasses
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.weights.gguf.files import load_gguf, read_gguf_config, readable_types, save_gguf
from lightning_danube.weights.gguf.header import read_gguf_header
from lightning_danube.weights.llama_cpp import measure

# The file does not say how weights were once initialized, so these have the default of that.
CONFIGS = {
    "multi-head": DecoderConfig(64, 96, 2, 4, 4, vocab_size=101),
    "grouped": DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, rope_theta=500000.0, rms_norm_eps=1e-6),
    "multi-query": DecoderConfig(64, 96, 2, 4, 1, head_dim=24, vocab_size=101, tie_word_embeddings=True),
    # All rows whole blocks of every type.
    "danube": DecoderConfig(256, 256, 2, 4, 2, head_dim=64, vocab_size=256, max_position_embeddings=512),
}
IDS = torch.arange(30).view(2, 15)


@pytest.fixture(params=list(CONFIGS.values()), ids=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    return request.param


@pytest.fixture
def decoder() -> Decoder:
    return random_decoder(CONFIGS["danube"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("original") / "model.gguf"
    save_gguf(random_decoder(CONFIGS["danube"]), file, dtype=torch.float32)
    return file


@pytest.fixture
def written(original: Path, tmp_path: Path) -> Path:
    """The file of `decoder`, which a test may spoil."""
    return Path(shutil.copy(original, tmp_path))


def random_decoder(config: DecoderConfig) -> Decoder:
    """With gains other than 1, and weights that keep the size of what they multiply: every layer counts."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 2.0)
    return decoder


def assert_same_parameters(one: torch.nn.Module, other: torch.nn.Module) -> None:
    others = dict(other.named_parameters())
    assert dict(one.named_parameters()).keys() == others.keys()
    for name, parameter in one.named_parameters():
        assert parameter.dtype == others[name].dtype and torch.equal(parameter, others[name]), name


def rewrite(
    source: Path,
    target: Path,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    encode: Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    architecture: str = "llama",
) -> Path:
    """A copy by the package's own reader and writer, with other fields and tensors (None: left out)."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture)
    contents = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kinds = {name: field.types[0] for name, field in reader.fields.items()}
    for key, value in (contents | (fields or {})).items():
        if key == "general.architecture" or value is None:
            continue
        match value:
            case _ if key == "general.alignment":
                writer.add_custom_alignment(value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_key_value(key, value, kinds.get(key, gguf.GGUFValueType.UINT32))
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors} | (tensors or {})
    for name, array in arrays.items():
        if array is None:
            continue
        if encode is None:
            writer.add_tensor(name, array)
        else:
            data, kind = encode(name, array)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def read_by_transformers(file: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    assert isinstance(theirs, LlamaForCausalLM)
    return theirs


def test_what_is_written_reads_back_bit_by_bit(config: DecoderConfig, tmp_path: Path) -> None:
    decoder = random_decoder(config)
    save_gguf(decoder, tmp_path / "sub/model.gguf", dtype=torch.float32, name="a model")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["model.gguf"], "something temporary was left behind"
    assert read_gguf_config(tmp_path / "sub/model.gguf") == config
    loaded = load_gguf(tmp_path / "sub/model.gguf")
    assert loaded.config == config
    assert_same_parameters(loaded, decoder)
    assert loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert read_gguf_header(tmp_path / "sub/model.gguf").fields["general.name"] == "a model"


def test_transformers_reads_the_same_model(config: DecoderConfig, tmp_path: Path) -> None:
    decoder = random_decoder(config)
    save_gguf(decoder, tmp_path / "model.gguf", dtype=torch.float32)
    theirs = read_by_transformers(tmp_path / "model.gguf")
    assert_same_parameters(theirs, decoder)
    reference = theirs(IDS).logits
    # See test_parity.py.
    assert (decoder(IDS) - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_files_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = random_decoder(CONFIGS["grouped"]).to(dtype)
    save_gguf(decoder, tmp_path / "model.gguf", dtype=dtype)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds == {"F32", "F16" if dtype == torch.float16 else "BF16"}
    assert_same_parameters(load_gguf(tmp_path / "model.gguf"), decoder)
    assert_same_parameters(load_gguf(tmp_path / "model.gguf", dtype=torch.float32, device="cpu"), decoder.float())
    assert_same_parameters(read_by_transformers(tmp_path / "model.gguf"), decoder.float())


def test_a_float32_model_is_rounded_to_the_type_of_the_file(decoder: Decoder, tmp_path: Path) -> None:
    save_gguf(decoder, tmp_path / "model.gguf", dtype=torch.float16)
    gains = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors if tensor.data.ndim == 1}
    assert all(name.endswith("norm.weight") for name in gains) and len(gains) == 5
    loaded = load_gguf(tmp_path / "model.gguf", dtype=torch.float32)
    assert torch.equal(loaded.model.norm.weight, decoder.model.norm.weight)
    assert_same_parameters(load_gguf(tmp_path / "model.gguf"), decoder.half())


def test_every_type_of_the_package_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """A file whose matrices have each another type."""
    decoder = random_decoder(dataclasses.replace(CONFIGS["danube"], num_hidden_layers=4))
    save_gguf(decoder, tmp_path / "model.gguf", dtype=torch.float32)
    generator = np.random.default_rng(0)
    kinds = iter(sorted(readable_types()))
    used = set()

    def encode(name: str, array: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        kind = gguf.GGMLQuantizationType(next(kinds, 0)) if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        used.add(kind.name)
        try:
            return gguf.quantize(array, kind), kind
        except NotImplementedError:
            # Any bytes are some quantized numbers; small ones keep the scales, which are float16, finite.
            block, size = gguf.GGML_QUANT_SIZES[kind]
            return generator.integers(0, 64, (len(array), array.shape[1] // block * size), np.uint8), kind

    (tmp_path / "mixed").mkdir()
    file = rewrite(tmp_path / "model.gguf", tmp_path / "mixed/model.gguf", encode=encode)
    assert next(kinds, None) is None and used >= {"F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"}
    assert used >= {f"Q{bits}_K" for bits in (2, 3, 4, 5, 6)} | {"IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XS"}
    loaded = load_gguf(file)
    assert all(bool(parameter.isfinite().all()) for parameter in loaded.parameters())
    assert_same_parameters(loaded, read_by_transformers(file))


def test_a_large_tensor_is_dequantized_in_pieces(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(name: str, array: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        return gguf.quantize(array, kind), kind

    file = rewrite(written, tmp_path / "quantized.gguf", encode=encode)
    whole = load_gguf(file)
    monkeypatch.setattr("lightning_danube.weights.gguf.files.PIECE_VALUES", 1000)
    assert_same_parameters(load_gguf(file), whole)


def test_the_model_does_not_live_on_the_file(written: Path, decoder: Decoder) -> None:
    loaded = load_gguf(written)
    written.write_bytes(b"")
    assert_same_parameters(loaded, decoder)


def test_a_tied_head_is_one_tensor_again(tmp_path: Path) -> None:
    decoder = random_decoder(CONFIGS["multi-query"])
    save_gguf(decoder, tmp_path / "model.gguf", dtype=torch.float32)
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    loaded = load_gguf(tmp_path / "model.gguf", dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_keys_that_may_be_left_out_have_the_formats_defaults(written: Path, tmp_path: Path) -> None:
    gone = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base", "vocab_size")
    decoder = random_decoder(CONFIGS["multi-head"])
    save_gguf(decoder, tmp_path / "full.gguf", dtype=torch.float32)
    file = rewrite(tmp_path / "full.gguf", tmp_path / "few.gguf", {f"llama.{key}": None for key in gone})
    assert read_gguf_config(file) == dataclasses.replace(decoder.config, rope_theta=10000.0)


def test_settings_that_are_off_are_no_obstacle(written: Path, tmp_path: Path, decoder: Decoder) -> None:
    fields = {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 512,
        "llama.attention.sliding_window": 512,
        "llama.expert_count": 0,
        "llama.use_parallel_residual": False,
        "general.alignment": 64,
    }
    assert load_gguf(rewrite(written, tmp_path / "other.gguf", fields)).config == decoder.config


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.factor": 0.0, "llama.rope.scale_linear": 4.0},
        {"llama.rope.scaling.type": "linear"},
        {"llama.rope.scaling.attn_factor": 1.0},
    ],
    ids=str,
)
def test_a_scaling_by_one_is_none(fields: dict[str, Any], written: Path, tmp_path: Path, decoder: Decoder) -> None:
    assert load_gguf(rewrite(written, tmp_path / "other.gguf", fields)).config == decoder.config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"llama.rope.scaling.factor": 4.0},
            "rope.scaling.factor is 4.0, which scales positions linearly unless llama.rope.scaling.type is 'none'",
        ),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            "scaling.factor is 2.0, which scales",
        ),
        ({"llama.rope.scale_linear": 2.0}, "llama.rope.scale_linear is 2.0, which scales positions linearly unless"),
        (
            {"llama.rope.scaling.type": "none", "llama.rope.scaling.attn_factor": 0.5},
            "llama.rope.scaling.attn_factor is not 1, which is not supported",
        ),
    ],
)
def test_positions_that_llama_cpp_would_scale_are_refused(
    fields: dict[str, Any], message: str, written: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_gguf(rewrite(written, tmp_path / "other.gguf", fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"llama.rope.scaling.type": "yarn"},
            r"llama.rope.scaling.type is 'yarn'; only rope_freqs.weight can scale positions",
        ),
        (
            {"llama.attention.sliding_window": 128},
            r"sliding_window is 128, shorter than the context, 512: llama.cpp does not compute a window for 'llama'",
        ),
        ({"llama.expert_count": 8}, r"llama.expert_count is 8, which is not supported"),
        ({"llama.attention.causal": True}, r"llama.attention.causal is True, which is not supported"),
        ({"llama.rope.dimension_count": 32}, r"rope.dimension_count is 32; only heads of 64 channels, all rotated"),
        ({"llama.attention.value_length": 32}, r"value_length is 32; only heads of 64 channels, all rotated"),
        ({"llama.context_length": None}, r"no llama.context_length in it"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, r"no llama.attention.layer_norm_rms_epsilon in it"),
        ({"llama.attention.layer_norm_rms_epsilon": "small"}, r"rms_epsilon is 'small', not a number"),
        ({"llama.feed_forward_length": [512, 256]}, r"llama.feed_forward_length is \[512, 256\], not one whole number"),
        ({"llama.attention.head_count_kv": 3}, r"num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"llama.attention.head_count": 2**31}, r"llama.attention.head_count is 2147483648, and cannot be above"),
        ({"llama.block_count": 2**20}, r"llama.block_count is 1048576, yet there are only 21 tensors"),
        ({"llama.vocab_size": 300}, r"token_embd.weight \(256, 256\), not \(300, 256\)"),
        ({"llama.block_count": 3}, r"9 tensors are missing: blk.2.attn_k.weight, .* and 6 more"),
        ({"llama.block_count": 1}, r"9 tensors have no place in the model of its fields: blk.1.attn_k.weight, "),
        ({"split.count": 3}, r"one of 3 parts of a model; join them"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(
    fields: dict[str, Any], message: str, written: Path, tmp_path: Path
) -> None:
    file = rewrite(written, tmp_path / "other.gguf", fields)
    with pytest.raises(ValueError, match=rf"^[^\n]*other.gguf: [^\n]*{message}[^\n]*$"):
        load_gguf(file)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"rope_freqs.weight": np.ones(64, np.float32)}, r"rope_freqs.weight is not a float32 tensor of 32 numbers"),
        ({"blk.1.attn_q.weight": None}, r"1 tensor is missing: blk.1.attn_q.weight"),
        ({"token_embd.weight": None}, r"1 tensor is missing: token_embd.weight"),
        ({"blk.0.attn_q.bias": np.ones(512, np.float32)}, r"1 tensor has no place .*: blk.0.attn_q.bias"),
        ({"output.weight": np.ones((257, 256), np.float32)}, r"output.weight \(257, 256\), not \(256, 256\)"),
        ({"blk.0.ffn_up.weight": np.ones((256, 256), np.int32)}, r"cannot be read \(I32\): blk.0.ffn_up.weight"),
    ],
)
def test_tensors_that_do_not_make_up_the_model_are_refused(
    tensors: dict[str, np.ndarray | None], message: str, written: Path, tmp_path: Path
) -> None:
    file = rewrite(written, tmp_path / "other.gguf", tensors=tensors)
    with pytest.raises(ValueError, match=rf"^[^\n]*other.gguf: [^\n]*{message}[^\n]*$"):
        load_gguf(file)


def test_other_architectures_are_refused(written: Path, tmp_path: Path) -> None:
    file = rewrite(written, tmp_path / "other.gguf", architecture="gemma")
    message = r"other.gguf: the architecture is 'gemma'; these can be loaded: llama, qwen2, qwen3, smollm3$"
    with pytest.raises(ValueError, match=message):
        load_gguf(file)


def patched(source: Path, target: Path, name: str, kind: int | None = None, offset: int | None = None) -> Path:
    """A copy in which the entry of one tensor says another type or place."""
    content = bytearray(source.read_bytes())
    start = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    dimensions = struct.unpack_from("<I", content, start)[0]
    if kind is not None:
        struct.pack_into("<I", content, start + 4 + 8 * dimensions, kind)
    if offset is not None:
        struct.pack_into("<Q", content, start + 8 + 8 * dimensions, offset)
    target.write_bytes(content)
    return target


def test_types_newer_than_the_package_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read \(number 4000\): output.weight$"):
        load_gguf(patched(written, tmp_path / "other.gguf", "output.weight", kind=4000))


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    save_gguf(random_decoder(CONFIGS["grouped"]), tmp_path / "model.gguf", dtype=torch.float32)
    file = patched(
        tmp_path / "model.gguf", tmp_path / "other.gguf", "output.weight", kind=gguf.GGMLQuantizationType.Q4_K
    )
    with pytest.raises(ValueError, match=r"the rows of 1 tensor are not whole blocks of their type: output.weight$"):
        load_gguf(file)


def test_tensors_beyond_the_end_are_refused(written: Path, tmp_path: Path) -> None:
    message = r"truncated: 1 tensor ends beyond its [\d,]+ bytes: output.weight$"
    with pytest.raises(ValueError, match=message):
        load_gguf(patched(written, tmp_path / "other.gguf", "output.weight", offset=2**63))
    (tmp_path / "short.gguf").write_bytes(written.read_bytes()[:-32])
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "short.gguf")


def test_tensors_in_other_places_than_a_writer_puts_them_are_refused(written: Path, tmp_path: Path) -> None:
    """Such a file loads the numbers of another tensor, or half of its own, and the model answers nonsense."""
    entries = read_gguf_header(written).tensors
    start = min(entry.offset for entry in entries.values())
    other = entries["blk.0.attn_q.weight"].offset - start
    for offset, message in (
        (other, r"damaged: \d tensors? begins? inside another tensor: "),
        (other + 32, r"damaged: \d tensors? begins? inside another tensor: "),
        (other + 4, r"damaged: the tensor output.weight begins at byte [\d,]+, which 32 does not divide"),
    ):
        with pytest.raises(ValueError, match=rf"other.gguf: {message}"):
            load_gguf(patched(written, tmp_path / "other.gguf", "output.weight", offset=offset))


def test_a_long_array_takes_no_more_memory_than_in_the_file(tmp_path: Path) -> None:
    for letter, kind in SCALARS_OF_ARRAYS.items():
        count = 200_000
        values = struct.pack(f"<{count}{letter}", *[1] * count)
        (tmp_path / "other.gguf").write_bytes(header(text("k") + struct.pack("<IIQ", 9, kind, count) + values))
        tracemalloc.start()
        fields = read_gguf_header(tmp_path / "other.gguf").fields
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The bytes as they were read, the array with some room, and some objects.
        assert peak < 2.2 * len(values) + 100_000 and len(fields["k"]) == count and sum(fields["k"]) == count


@pytest.mark.parametrize("value", ["text", 3, 2.5, True, [1, 2], [0.5], ["a"]])
def test_a_field_of_another_type_is_refused_in_one_line(value: Any, written: Path, tmp_path: Path) -> None:
    """Each field that is read, with a value of another type: it is refused, or the value serves as well."""
    names = [key for key in read_gguf_header(written).fields if key != "general.alignment"]
    more = ["llama.attention.sliding_window", "llama.rope.scaling.type", "llama.rope.scaling.factor", "split.count"]
    for key in (*names, *more):
        file = write_with(written, tmp_path / "other.gguf", key, value)
        try:
            load_gguf(file)
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 400, str(error)


def write_with(source: Path, target: Path, key: str, value: Any) -> Path:
    """A copy in which a field has another value, of whatever type."""
    writer = gguf.GGUFWriter(target, "llama")
    fields = read_gguf_header(source).fields | {key: value}
    for name, one in fields.items():
        if name in ("general.architecture", "general.alignment"):
            continue
        kind: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kind[str] = writer.add_string
        kind.get(type(one), writer.add_array)(name, one)
    if key == "general.architecture":
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.get_type(value))
    for tensor in gguf.GGUFReader(source).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_what_is_no_gguf_file_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.gguf: no such file$"):
        load_gguf(tmp_path / "nowhere.gguf")
    file = tmp_path / "other.gguf"
    head = written.read_bytes()[:100]
    for content, message in (
        (b"", r"empty"),
        (b"PK\x03\x04 something else", r"not a GGUF file"),
        (head[:4] + struct.pack("<I", 1) + head[8:], r"GGUF version 1 is not supported, only 2 and 3"),
        (head[:4] + struct.pack(">I", 3) + head[8:], r"a big-endian GGUF file"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^[^\n]*other.gguf: {message}[^\n]*$"):
            load_gguf(file)


SCALARS_OF_ARRAYS = {"B": 0, "b": 1, "H": 2, "i": 5, "f": 6, "?": 7, "Q": 10, "d": 12}
"""Letter of struct → the format's number of the type."""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(fields: bytes, field_count: int = 1, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, field_count) + fields + tensors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"", field_count=2**60), r"is said to hold 1,152,921,504,606,846,976 fields, and has 24 bytes"),
        (header(b"", 0, tensor_count=2**40), r"is said to hold 1,099,511,627,776 tensors"),
        (header(struct.pack("<Q", 2**63), 1) + bytes(20), r"its 52 bytes end within a key"),
        (header(text("k") + struct.pack("<IIQ", 9, 0, 2**40)), r"1,099,511,627,776 values of k"),
        (header(text("k") + struct.pack("<IIQ", 9, 8, 2**40)), r"1,099,511,627,776 values of k"),
        (header(text("k") + struct.pack("<IIQ", 9, 9, 1)), r"k is an array of the type 9, which is not supported"),
        (header(text("k") + struct.pack("<I", 77) + bytes(8)), r"k has a value of the unknown type 77"),
        (header(text("k") + struct.pack("<IH", 4, 1)), r"its \d+ bytes end within k"),
        (header((text("k") + struct.pack("<II", 4, 1)) * 2, 2), r"the key k appears twice"),
        (header(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8)), r"a key is not UTF-8"),
        (header(text("a\nb") + bytes(8)), r"a key is not printable: 'a\\nb'$"),
        (header(text("general.alignment") + struct.pack("<II", 4, 3)), r"general.alignment is 3, not a power of two"),
        (header(b"", 0, text("t") + struct.pack("<I", 99) + bytes(20), 1), r"t has 99 dimensions; at most 4"),
        (header(b"", 0, (text("t") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2, 2), r"the tensor t appears twice"),
    ],
)
def test_hostile_headers_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*other.gguf: [^\n]*{message}"):
        load_gguf(tmp_path / "other.gguf")


def test_no_damage_ends_in_anything_but_one_line(tmp_path: Path) -> None:
    """Cut anywhere, or with bytes of the head changed at random, a file loads or is refused in one line."""
    config = DecoderConfig(8, 8, 1, 2, 1, vocab_size=4, max_position_embeddings=8)
    save_gguf(Decoder(config), tmp_path / "model.gguf", dtype=torch.float32)
    whole, file = (tmp_path / "model.gguf").read_bytes(), tmp_path / "damaged.gguf"
    first = min(entry.offset for entry in read_gguf_header(tmp_path / "model.gguf").tensors.values())
    generator = random.Random(0)
    damaged = [whole[:length] for length in range(0, len(whole), 17)]
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(first)] = generator.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for content in damaged:
        file.write_bytes(content)
        try:
            load_gguf(file)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).startswith(str(file)), str(error)
    # Each cut file, and most of the others: a changed name of the model, say, is no damage.
    assert refused > len(whole) // 17 + 300


def test_tokens_are_made_up_to_the_size_of_the_embedding(decoder: Decoder, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁a"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    save_gguf(decoder, tmp_path / "model.gguf", dtype=torch.float32, tokenizer_fields=fields)
    there = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert there["tokenizer.ggml.tokens"][:5] == [*fields["tokenizer.ggml.tokens"], "[PAD4]"]
    assert [len(there[f"tokenizer.ggml.{key}"]) for key in ("tokens", "scores", "token_type")] == [256] * 3
    assert there["tokenizer.ggml.token_type"][4:] == [gguf.TokenType.UNUSED] * 252
    assert (there["tokenizer.ggml.bos_token_id"], there["tokenizer.ggml.add_bos_token"]) == (1, True)
    fields["tokenizer.ggml.tokens"] = [str(index) for index in range(257)]
    with pytest.raises(ValueError, match=r"the tokenizer has 257 tokens, the model only 256: is the tokenizer another"):
        save_gguf(decoder, tmp_path / "other.gguf", dtype=torch.float32, tokenizer_fields=fields)


def test_a_file_is_overwritten_only_when_asked(decoder: Decoder, written: Path) -> None:
    other = random_decoder(CONFIGS["grouped"])
    with pytest.raises(ValueError, match=r"model.gguf exists: choose another name, or replace it by --overwrite$"):
        save_gguf(other, written, dtype=torch.float32)
    assert_same_parameters(load_gguf(written), decoder)
    save_gguf(other, written, dtype=torch.float32, overwrite=True)
    assert_same_parameters(load_gguf(written), other)


def test_a_model_can_be_saved_over_the_file_it_came_from(decoder: Decoder, written: Path) -> None:
    save_gguf(load_gguf(written), written, dtype=torch.float32, overwrite=True)
    assert_same_parameters(load_gguf(written), decoder)


def test_what_is_no_gguf_file_is_never_overwritten(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis.tex is not a GGUF file; it is not overwritten$"):
        save_gguf(decoder, tmp_path / "thesis.tex", dtype=torch.float32, overwrite=True)
    with pytest.raises(ValueError, match=r" is a directory; give the name of a file$"):
        save_gguf(decoder, tmp_path, dtype=torch.float32, overwrite=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (70000.0, r"lm_head.weight holds 7e\+04, beyond the 65,504 of float16: write bfloat16 or float32$"),
        (float("nan"), r"lm_head.weight holds values that are not finite: the model is broken, and is not written$"),
    ],
)
def test_a_failed_save_leaves_nothing_and_spoils_nothing(
    value: float, message: str, decoder: Decoder, written: Path
) -> None:
    before = load_gguf(written)
    with torch.no_grad():
        decoder.lm_head.weight[3, 3] = value
    with pytest.raises(ValueError, match=message):
        save_gguf(decoder, written, dtype=torch.float16, overwrite=True)
    assert [path.name for path in written.parent.iterdir()] == ["model.gguf"]
    assert_same_parameters(load_gguf(written), before)


def test_a_full_disk_leaves_nothing_and_spoils_nothing(
    decoder: Decoder, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    before = written.read_bytes()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(OSError, match="disk full"):
        save_gguf(decoder, written, dtype=torch.float16, overwrite=True)
    assert [path.name for path in written.parent.iterdir()] == ["model.gguf"]
    assert written.read_bytes() == before


def test_only_three_types_are_written(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in float32, float16 or bfloat16, not in torch.float64$"):
        save_gguf(decoder, tmp_path / "model.gguf", dtype=torch.float64)


def test_a_decoder_with_adapters_is_not_saved(decoder: Decoder, tmp_path: Path) -> None:
    decoder.model.layers[0].register_parameter("lora_A", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"not a plain one: model.layers.0.lora_A; merge its adapters"):
        save_gguf(decoder, tmp_path / "model.gguf", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.medium
def test_importing_the_file_imports_neither_gguf_nor_transformers() -> None:
    code = "import sys, lightning_danube.weights.gguf.files as _\nprint({'transformers', 'gguf'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


PEAK = """
import re, sys, threading
from pathlib import Path
import torch
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.weights.gguf.files import load_gguf, readable_types

def anonymous():  # what this process holds, without pages of files, which the system takes back at need
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

# What is imported on first use is not part of the model.
readable_types()
with torch.device("meta"):
    Decoder(DecoderConfig(8, 8, 1, 1, 1))
start, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch); watcher.start()
decoder = load_gguf(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
done.set(); watcher.join()
print(max(peak, anonymous()) - start, sum(p.numel() * p.element_size() for p in decoder.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("stored", "wanted"), [("F32", "float32"), ("F32", "bfloat16"), ("Q8_0", "float32")])
def test_a_big_model_is_never_there_twice(stored: str, wanted: str, tmp_path: Path) -> None:
    decoder = Decoder(DecoderConfig(1024, 2816, 6, 8, 4, vocab_size=8192))
    save_gguf(decoder, tmp_path / "model.gguf", dtype=torch.float32)
    if stored != "F32":

        def encode(name: str, array: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
            kind = gguf.GGMLQuantizationType[stored] if array.ndim > 1 else gguf.GGMLQuantizationType.F32
            return gguf.quantize(array, kind), kind

        file = rewrite(tmp_path / "model.gguf", tmp_path / "quantized.gguf", encode=encode)
        shutil.move(file, tmp_path / "model.gguf")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model.gguf"), wanted]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, held = map(int, result.stdout.split())
    # Beside the model a few megabytes in work, and what the allocator keeps: 15 to 30 MB were measured.
    assert peak - held < 60e6, (peak, held)


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 32)])
def test_the_header_says_the_type_of_the_file(dtype: torch.dtype, number: int, tmp_path: Path) -> None:
    """The numbers of `enum llama_ftype` in llama.h."""
    save_gguf(random_decoder(CONFIGS["grouped"]), tmp_path / "model.gguf", dtype=dtype)
    fields = read_gguf_header(tmp_path / "model.gguf").fields
    assert fields["general.file_type"] == number
    assert (fields["general.type"], fields["general.quantization_version"]) == ("model", 2)


def test_a_file_of_several_types_is_read_in_float32(written: Path, tmp_path: Path, decoder: Decoder) -> None:
    def encode(name: str, array: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        half = array.ndim > 1 and "ffn" in name
        kind = gguf.GGMLQuantizationType.F16 if half else gguf.GGMLQuantizationType.F32
        return gguf.quantize(array, kind), kind

    loaded = load_gguf(rewrite(written, tmp_path / "mixed.gguf", encode=encode))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, decoder.lm_head.weight)


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    """In its place and of the same size."""
    file = tmp_path / "model.gguf"
    save_gguf(random_decoder(CONFIGS["grouped"]), file, dtype=torch.float32, name="one")
    assert read_gguf_header(file).fields["general.name"] == "one"
    stat = file.stat()
    file.write_bytes(file.read_bytes().replace(b"one", b"two"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert (file.stat().st_ino, file.stat().st_size) == (stat.st_ino, stat.st_size)
    assert read_gguf_header(file).fields["general.name"] == "two"


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_an_alignment_of_its_own_is_kept(alignment: int, written: Path, tmp_path: Path, decoder: Decoder) -> None:
    assert_same_parameters(
        load_gguf(rewrite(written, tmp_path / "other.gguf", {"general.alignment": alignment})), decoder
    )


def test_a_file_is_measured_by_its_tensors(written: Path, tmp_path: Path, decoder: Decoder) -> None:
    def encode(name: str, array: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        return gguf.quantize(array, kind), kind

    matrices = [parameter.numel() for parameter in decoder.parameters() if parameter.ndim > 1]
    gains = [parameter.numel() for parameter in decoder.parameters() if parameter.ndim == 1]
    file = rewrite(written, tmp_path / "quantized.gguf", encode=encode)
    content = measure(file, "x: falling back to q5_0\ny: falling back to  q8_0\nz: falling back to q8_0\n")
    assert content.file_bytes == file.stat().st_size and content.weights == sum(matrices) + sum(gains)
    assert content.tensors == {"Q8_0": len(matrices), "F32": len(gains)} and content.fallbacks == {"Q8_0": 2, "Q5_0": 1}
    # Q8_0 has a float16 scale for each 32 weights of 8 bits.
    assert content.tensor_bytes == sum(matrices) // 32 * 34 + 4 * sum(gains)
    assert content.bits_per_weight == pytest.approx(8.5, abs=0.2)
    assert f"{content.weights:,} weights at {content.bits_per_weight:.2f} bits: 16 Q8_0, 5 F32" in content.describe()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"quantized.gguf: truncated: its tensors end beyond its [\d,]+ bytes"):
        measure(file)
