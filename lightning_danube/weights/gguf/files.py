"""Decoders as GGUF files, the format of llama.cpp, in both directions.

For some architectures llama.cpp rotates channels 2i and 2i + 1 of a head as one pair, and this project i and i + K/2.
So the rows of the query and key projections are in another order there. Without reordering, the file loads, and the
model answers wrongly. model/architecture.py lists these architectures and the names of the tensors.

A wrong file is refused in one line that names it, before any tensor is read. gguf and numpy are imported inside the
functions, so that importing the model stays cheap.
"""

import math
import sys
from array import array
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_danube.device import check_memory
from lightning_danube.files import new_file
from lightning_danube.model.architecture import (
    EMBEDDING,
    HEAD,
    Family,
    NamedTensor,
    family_in_gguf,
    family_of,
    is_on,
    number_of_heads,
    tensors_added_by,
    tensors_of,
)
from lightning_danube.model.attention import inverse_frequencies
from lightning_danube.model.config import DecoderConfig, RopeScaling
from lightning_danube.model.decoder import Decoder
from lightning_danube.terminal import amount, counted, some
from lightning_danube.weights.export_places import check_gguf_target
from lightning_danube.weights.gguf.header import GGUFHeader, TensorEntry, read_gguf_header
from lightning_danube.weights.huggingface import assemble, is_host, plain_tensors

if TYPE_CHECKING:
    import gguf

# Factors by which the rotary frequencies are divided, (K / 2,). The decoder has no such tensor: it computes them.
ROPE_FACTORS = "rope_freqs.weight"
# Keys that become part of the config or are checked. Any other key of the architecture could change the computation.
KNOWN_KEYS = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
    }
)
# No decoder has a larger number of anything. So the check of a damaged number cannot cost more than this.
MOST = 2**24
LARGEST_FLOAT16 = 65504.0
# Dequantizing temporarily needs several times the memory of its result. With pieces that fit into the processor's
# cache, SmolLM2's file takes 0.9 CPU seconds; with pieces of 2^20 values, 1.5.
PIECE_VALUES = 2**18


def import_gguf() -> Any:
    """Imports the package gguf without the tokenizers of mistral_common.

    gguf uses them only to convert models, and importing them takes 0.4 CPU seconds.
    """
    hidden = "mistral_common"
    if "gguf" not in sys.modules and hidden not in sys.modules:
        sys.modules[hidden] = None  # type: ignore[assignment]  # makes its import fail
        try:
            import gguf
        finally:
            del sys.modules[hidden]
    import gguf

    return gguf


def load_gguf(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Decoder:
    """Loads the decoder in a GGUF file of a known architecture, whatever type its tensors have.

    The decoder has type `dtype`. Without `dtype` it has the file's type if all matrices are float16 or all bfloat16,
    otherwise float32, so that dequantized values are not rounded again. Tensors are read from a memory map one by one,
    so two copies are never held. The decoder is in training mode, as after load_hf.
    """
    header = read_gguf_header(path)
    config = config_of(header)
    check_tensors(header, config)
    dtype = dtype or natural_type(header)
    if is_host(device):
        check_memory(str(header.path), config.parameters * dtype.itemsize)

    import numpy as np

    content = np.memmap(header.path, dtype=np.uint8, mode="r")
    tensors: dict[str, Tensor] = {}
    for named in tensors_of(config):
        tensor = read_gguf_tensor(content, header.tensors[named.gguf], dtype)
        if heads := rotated_heads(config, named):
            tensor = rotated_by_halves(tensor, heads)
        tensors[named.name] = tensor.to(device)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return assemble(config, tensors, header.path).to(device)


def read_gguf_config(path: str | Path) -> DecoderConfig:
    """Reads the shape of the decoder in a GGUF file, without its tensors."""
    return config_of(read_gguf_header(path))


def save_gguf(
    decoder: Decoder,
    path: str | Path,
    *,
    dtype: torch.dtype,
    tokenizer_fields: Mapping[str, Any] | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a file that llama.cpp loads: matrices in `dtype` (float32, float16 or bfloat16), gains and biases in
    float32, as llama.cpp requires.

    `tokenizer_fields` are keys and values of the tokenizer, as `gguf_tokenizer_fields` makes them. Without them, the
    file has no tokenizer and takes only token ids. Programs that read the file show `name`. An existing file is
    overwritten only if it is a GGUF file.
    """
    target = Path(path).absolute()
    file_type_of(dtype)
    check_gguf_target(target, overwrite)
    config = decoder.config
    check_computed_by_llama_cpp(config)
    tensors = plain_tensors(decoder)

    with new_file(target) as partial, closing(begin_gguf(partial, config, dtype, tokenizer_fields, name)) as writer:
        for named in tensors_of(config):
            # Only one converted copy is in memory at a time, however large the model is.
            tensor = tensors[named.name].detach().cpu()
            if heads := rotated_heads(config, named):
                tensor = rotated_by_neighbours(tensor, heads)
            converted = tensor.to(dtype if tensor.ndim > 1 else torch.float32).contiguous()
            check_converted(named.name, tensor, converted)
            # numpy has no bfloat16; the writer only copies bytes.
            raw = converted.view(torch.int16) if converted.dtype == torch.bfloat16 else converted
            writer.write_tensor_data(raw.numpy())
        if config.rope_scaling is not None:
            writer.write_tensor_data(rope_factors(config).numpy())


def save_gguf_shape(config: DecoderConfig, path: str | Path) -> None:
    """Writes the header of a float16 file, with a hole instead of the tensors, for programs that only read shapes.
    The file takes almost no disk space, however large the model is.
    """
    writer = begin_gguf(Path(path), config, torch.float16, None, None)
    writer.close()
    header = read_gguf_header(path)
    last = max(header.tensors.values(), key=lambda tensor: tensor.offset)
    with open(path, "r+b") as file:
        # Gains, the last tensors of all, have 4 bytes a number.
        file.truncate(last.offset + 4 * math.prod(last.shape))


def file_type_of(dtype: torch.dtype) -> "tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]":
    """Returns GGUF's types of a matrix and of a file for a `dtype`.

    Raises:
        ValueError: this project does not write files of this type.
    """
    gguf = import_gguf()

    quantizations = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    if dtype not in quantizations:
        raise ValueError(f"a GGUF file is written in float32, float16 or bfloat16, not in {dtype}")
    return quantizations[dtype]


def begin_gguf(
    path: Path,
    config: DecoderConfig,
    dtype: torch.dtype,
    tokenizer_fields: Mapping[str, Any] | None,
    name: str | None,
) -> "gguf.GGUFWriter":
    """Opens a file and writes everything except its tensors, which must follow in the order of `gguf_names`.

    If that fails, the file is removed.
    """
    gguf = import_gguf()
    import numpy as np

    quantization, file_type = file_type_of(dtype)
    architecture = family_of(config).gguf
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type("model")
        if name:
            writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in model_fields(config).items():
            add_field(writer, f"{architecture}.{key}", value)
        for key, value in padded_to_vocabulary(tokenizer_fields, config.vocab_size).items():
            add_field(writer, key, value)
        for theirs, shape in shapes_of(config).items():
            kind = quantization if len(shape) > 1 else gguf.GGMLQuantizationType.F32
            size = math.prod(shape) * gguf.GGML_QUANT_SIZES[kind][1]
            writer.add_tensor_info(theirs, shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except BaseException:
        path.unlink(missing_ok=True)
        writer.close()
        raise
    return writer


def shapes_of(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns GGUF's names of all tensors of a file, in the file's order, with their shapes in torch's order."""
    shapes = {named.gguf: named.shape for named in tensors_of(config)}
    if config.rope_scaling is not None:
        assert config.head_dim is not None  # resolved by the config
        shapes[ROPE_FACTORS] = (config.head_dim // 2,)
    return shapes


def gguf_names(config: DecoderConfig) -> dict[str, str]:
    """Returns the decoder's names of tensors → GGUF's names, in the order of a file, without a tied head."""
    return {named.name: named.gguf for named in tensors_of(config)}


def rotated_heads(config: DecoderConfig, tensor: NamedTensor) -> int | None:
    """Returns the number of heads in a tensor's rows if GGUF stores the rows in another order, otherwise None."""
    if tensor.layer.heads is None or not family_of(config).turns_neighbours:
        return None
    return number_of_heads(config, tensor.layer.heads)


def check_computed_by_llama_cpp(config: DecoderConfig) -> None:
    """Checks that llama.cpp computes what this decoder computes.

    Raises:
        ValueError: llama.cpp would load the file, and compute something else.
    """
    family = family_of(config)
    window = config.sliding_window
    if "sliding_window" in family.not_in_gguf and window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window {window:,} is shorter than the context of {config.max_position_embeddings:,} tokens, and "
            f"llama.cpp's {family.gguf!r} architecture has no window: it would answer differently to texts that are "
            f"longer than the window; set max_position_embeddings to {window} in config.json, or export as hf"
        )
    for option, number in family.in_gguf.items():
        value = getattr(config, option)
        if isinstance(number, int) and is_on(config, option) and value != number:
            raise ValueError(
                f"{option} is {value}; llama.cpp's {family.gguf!r} architecture has {number}, whatever the file says: "
                "export as hf"
            )
    if config.qkv_bias and config.head_dim != config.hidden_size // config.num_attention_heads:
        raise ValueError(
            f"head_dim is {config.head_dim}; llama.cpp's {family.gguf!r} architecture needs "
            f"hidden_size / num_attention_heads, {config.hidden_size // config.num_attention_heads}: export as hf"
        )


def rope_factors(config: DecoderConfig) -> Tensor:
    """Returns the factors by which llama.cpp divides the frequencies of channel pairs, (K / 2,), float32."""
    head_dim = config.head_dim
    assert head_dim is not None  # resolved by the config
    plain = inverse_frequencies(head_dim, config.rope_theta, torch.float64)
    slowed = inverse_frequencies(head_dim, config.rope_theta, torch.float64, config.rope_scaling)
    return (plain / slowed).float()


def scaling_of_factors(factors: Tensor, head_dim: int, theta: float) -> RopeScaling:
    """Returns the scaling that these factors come from, if they are Llama 3.1's for some `factor`.

    The file has only the factors. All published models with this scaling share the other numbers.

    Raises:
        ValueError: the factors have another form.
    """
    largest = float(factors.max())
    if math.isfinite(largest) and largest > 0:
        scaling = RopeScaling(factor=largest)
        plain = inverse_frequencies(head_dim, theta, torch.float64)
        expected = plain / inverse_frequencies(head_dim, theta, torch.float64, scaling)
        # Converters compute them in float32.
        if torch.allclose(factors.double(), expected, rtol=1e-5, atol=0):
            return scaling
    raise ValueError(f"{ROPE_FACTORS} does not hold the factors of Llama 3.1's scaling; others are not supported")


def rotated_by_neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Reorders the rows of each head from this project's order (pairs i, i + K/2) to llama.cpp's (pairs 2i, 2i + 1).

    Args:
        tensor: a weight (N, D) or a bias (N,) whose N rows are the channels of the heads.
    """
    N, *rest = tensor.shape
    return tensor.view(heads, 2, N // heads // 2, *rest).transpose(1, 2).reshape(N, *rest)


def rotated_by_halves(tensor: Tensor, heads: int) -> Tensor:
    """Reorders the rows of each head from llama.cpp's order to this project's; inverse of `rotated_by_neighbours`."""
    N, *rest = tensor.shape
    return tensor.view(heads, N // heads // 2, 2, *rest).transpose(1, 2).reshape(N, *rest)


@dataclass(frozen=True)
class ModelFields:
    """The fields of a file that describe its architecture, by their names without the architecture's prefix."""

    architecture: str
    values: Mapping[str, Any]

    def named(self, key: str) -> str:
        """Returns the key with the prefix that it has in the file."""
        return f"{self.architecture}.{key}"

    def whole(self, key: str, default: int | None = None) -> int:
        """Returns a field that is a whole number.

        Raises:
            ValueError: it is something else, or missing without a default.
        """
        value = self.values.get(key, default)
        if value is None:
            raise ValueError(f"no {self.named(key)} in it")
        if not isinstance(value, int) or isinstance(value, bool):
            # A list has one number per layer, so the layers have different shapes.
            raise ValueError(f"{self.named(key)} is {_shown(value)}, not one whole number")
        if not 0 <= value <= MOST:
            raise ValueError(f"{self.named(key)} is {value}, and cannot be above {MOST}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """Returns a field that is a number.

        Raises:
            ValueError: it is something else, or missing without a default.
        """
        value = self.values.get(key, default)
        if value is None:
            raise ValueError(f"no {self.named(key)} in it")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{self.named(key)} is {_shown(value)}, not a number")
        # The file holds a float32, so 1e-5 is read as 9.999999747378752e-06. The shortest decimal number with this
        # float32 value is taken instead.
        import numpy as np

        return float(str(np.float32(value)))


def config_of(header: GGUFHeader) -> DecoderConfig:
    """Returns the config that a file's fields describe.

    Refuses fields that this decoder cannot compute: if they were ignored, the model would load and answer wrongly.
    """
    try:
        architecture = header.fields.get("general.architecture")
        family_in_gguf(architecture)
        if (parts := header.fields.get("split.count", 1)) not in (0, 1):
            raise ValueError(f"one of {parts} parts of a model; join them (llama-gguf-split --merge)")
        prefix = f"{architecture}."
        own = {key.removeprefix(prefix): value for key, value in header.fields.items() if key.startswith(prefix)}
        return config_from_fields(ModelFields(prefix.removesuffix("."), own), header)
    except ValueError as error:
        raise ValueError(f"{header.path}: {error}") from None


def config_from_fields(fields: ModelFields, header: GGUFHeader) -> DecoderConfig:
    refuse_fields_that_are_not_computed(fields)
    family, tensors = family_in_gguf(fields.architecture), header.tensors
    heads = fields.whole("attention.head_count")
    hidden_size = fields.whole("embedding_length")
    head_dim = fields.whole("attention.key_length", hidden_size // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.whole(key, head_dim) != head_dim:
            raise ValueError(
                f"{fields.named(key)} is {fields.values[key]}; only heads of {head_dim} channels, all rotated, are "
                "possible"
            )
    embedding = tensors.get(f"{EMBEDDING.gguf}.weight")
    if embedding is None:
        raise ValueError(f"1 tensor is missing: {EMBEDDING.gguf}.weight")
    layers = fields.whole("block_count")
    if layers > len(tensors):
        raise ValueError(f"{fields.named('block_count')} is {layers}, yet there are only {len(tensors)} tensors")
    theta = fields.real("rope.freq_base", 10000.0)
    return DecoderConfig(
        hidden_size=hidden_size,
        intermediate_size=fields.whole("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=fields.whole("vocab_size", embedding.shape[0] if embedding.shape else 0),
        max_position_embeddings=fields.whole("context_length"),
        rope_theta=theta,
        rms_norm_eps=fields.real("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=f"{HEAD.gguf}.weight" not in tensors,
        **options_in_file(fields, header, family, head_dim, theta),
    )


def options_in_file(
    fields: ModelFields, header: GGUFHeader, family: Family, head_dim: int, theta: float
) -> dict[str, Any]:
    """Returns the options of the decoder in a file, without options that are off.

    The table of families says which numbers of the file are options. An option that adds weights is on if the first
    block has one of them.

    Raises:
        ValueError: the family does not have an option that the file's tensors need, or a number is not one.
    """
    options: dict[str, Any] = dict.fromkeys(family.needs, True)
    for option, number in family.in_gguf.items():
        if isinstance(number, int):
            options[option] = number
        elif option in family.needs or number in fields.values:
            is_real = isinstance(fields.values.get(number), float)
            options[option] = fields.real(number) if is_real else fields.whole(number)
    options |= {option: True for option in family.allows if tensors_added_by(option) & header.tensors.keys()}
    if ROPE_FACTORS in header.tensors:
        if "rope_scaling" not in family.allows:
            raise ValueError(f"{ROPE_FACTORS} slows rotary positions, which {family.gguf!r} does not have here")
        options["rope_scaling"] = scaling_of_factors(read_rope_factors(header, head_dim), head_dim, theta)
    return options


def read_rope_factors(header: GGUFHeader, head_dim: int) -> Tensor:
    """Returns the factors of the rotary frequencies in a file, (K / 2,), float32.

    Raises:
        ValueError: the tensor has another type or shape, or ends beyond the file.
    """
    entry, gguf = header.tensors[ROPE_FACTORS], import_gguf()
    if entry.type != gguf.GGMLQuantizationType.F32 or entry.shape != (head_dim // 2,):
        raise ValueError(f"{ROPE_FACTORS} is not a float32 tensor of {head_dim // 2} numbers, one a pair of channels")
    with open(header.path, "rb") as file:
        file.seek(min(entry.offset, header.file_size))
        content = file.read(4 * (head_dim // 2))
    if len(content) < 4 * (head_dim // 2):
        raise ValueError(f"truncated: {ROPE_FACTORS} ends beyond its {header.file_size:,} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.float32)


def refuse_fields_that_are_not_computed(fields: ModelFields) -> None:
    """Checks that this decoder computes everything that the fields describe.

    Raises:
        ValueError: a field requires something that this decoder does not compute.
    """
    refuse_scaled_positions(fields)
    window, context = fields.whole("attention.sliding_window", 0), fields.whole("context_length")
    if window and window < context:
        raise ValueError(
            f"{fields.named('attention.sliding_window')} is {window}, shorter than the context, {context}: llama.cpp "
            f"does not compute a window for {fields.architecture!r}, so what the file means is not certain"
        )
    known = {*KNOWN_KEYS, *family_in_gguf(fields.architecture).in_gguf.values()}
    for key, value in fields.values.items():
        # Settings that are off have no effect.
        if key not in known and not key.startswith("rope.scal") and value not in (0, "", "none", "default"):
            raise ValueError(f"{fields.named(key)} is {_shown(value)}, which is not supported")


def _shown(value: object) -> str:
    """Returns the beginning of a field's value. An array may be as long as the file."""
    value = list(value[:20]) if isinstance(value, list | array) else value
    return repr(value[:60] if isinstance(value, str) else value)[:60]


def refuse_scaled_positions(fields: ModelFields) -> None:
    """Checks that the file's rotary positions are not scaled by a field.

    Raises:
        ValueError: llama.cpp would scale the positions, or the values that they turn.
    """
    # llama.cpp's defaults: a factor without a type scales linearly, and 0 stands for 1.
    kind = fields.values.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"{fields.named('rope.scaling.type')} is {kind!r}; only {ROPE_FACTORS} can scale positions")
    # The second key is an older name of the first. llama.cpp reads it only where the first is missing.
    factor = next((key for key in ("rope.scaling.factor", "rope.scale_linear") if key in fields.values), None)
    if factor is not None and kind == "linear" and fields.real(factor) not in (0, 1):
        raise ValueError(
            f"{fields.named(factor)} is {fields.values[factor]}, which scales positions linearly unless "
            f"{fields.named('rope.scaling.type')} is 'none'; only {ROPE_FACTORS} can scale positions"
        )
    # llama.cpp multiplies by this factor whatever the type is.
    if fields.real("rope.scaling.attn_factor", 1.0) != 1:
        raise ValueError(f"{fields.named('rope.scaling.attn_factor')} is not 1, which is not supported")


def model_fields(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of the shape that llama.cpp needs.

    Without them llama.cpp assumes key and value lengths of hidden size / heads and a rotary base of 10,000. The model
    would then load and answer wrongly.
    """
    assert config.head_dim is not None  # resolved by the config
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        **{
            number: getattr(config, option)
            for option, number in family_of(config).in_gguf.items()
            if isinstance(number, str) and is_on(config, option)
        },
    }


def padded_to_vocabulary(tokenizer_fields: Mapping[str, Any] | None, vocab_size: int) -> dict[str, Any]:
    """Returns the tokenizer's fields with a token for every row of the embedding, because llama.cpp requires this."""
    if tokenizer_fields is None:
        return {"tokenizer.ggml.model": "none"}
    gguf = import_gguf()

    fields = dict(tokenizer_fields)
    tokens = list(fields["tokenizer.ggml.tokens"])
    if len(tokens) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokens)} tokens, the model only {vocab_size}: is the tokenizer another model's?"
        )
    missing = range(len(tokens), vocab_size)
    tokens += [f"[PAD{index}]" for index in missing]
    # llama.cpp ends the whole process if two tokens have equal text.
    assert len(set(tokens)) == len(tokens), "two tokens have the same text"
    fields["tokenizer.ggml.tokens"] = tokens
    fillers = {"tokenizer.ggml.token_type": int(gguf.TokenType.UNUSED), "tokenizer.ggml.scores": -10000.0}
    for key, filler in fillers.items():
        if key in fields:
            fields[key] = [*fields[key], *(filler for _ in missing)]
    return fields


def add_field(writer: "gguf.GGUFWriter", key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise AssertionError(f"{key} is a {type(value).__name__}, which no field holds")


def check_converted(name: str, tensor: Tensor, converted: Tensor) -> None:
    if bool(converted.isfinite().all()):
        return
    if bool(tensor.isfinite().all()):
        raise ValueError(
            f"{name} holds {float(tensor.abs().max()):.3g}, beyond the {LARGEST_FLOAT16:,.0f} of float16: "
            "write bfloat16 or float32"
        )
    raise ValueError(f"{name} holds values that are not finite: the model is broken, and is not written")


def check_tensors(header: GGUFHeader, config: DecoderConfig) -> None:
    """Checks that each expected tensor is complete, in its shape and a readable type, and that there are no others."""
    path, entries, expected = header.path, header.tensors, shapes_of(config)
    if missing := expected.keys() - entries.keys():
        raise ValueError(f"{path}: {counted(len(missing), 'tensor is', 'tensors are')} missing: {some(missing)}")
    if surplus := entries.keys() - expected.keys():
        raise ValueError(
            f"{path}: {counted(len(surplus), 'tensor has', 'tensors have')} no place in the model of its "
            f"fields: {some(surplus)}"
        )
    wrong = [
        f"{theirs} {entries[theirs].shape}, not {shape}"
        for theirs, shape in expected.items()
        if entries[theirs].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{path}: {counted(len(wrong), 'tensor has', 'tensors have')} another shape than its fields "
            f"say: {some(wrong)}"
        )
    readable = readable_types()
    if unread := {entry.name for entry in entries.values() if entry.type not in readable}:
        kinds = ", ".join(sorted({type_name(entries[name].type) for name in unread}))
        raise ValueError(
            f"{path}: {counted(len(unread), 'tensor has', 'tensors have')} a type that cannot be read "
            f"({kinds}): {some(unread)}"
        )
    if uneven := {entry.name for entry in entries.values() if entry.shape[-1] % block_size(entry)}:
        raise ValueError(
            f"{path}: the rows of {amount(len(uneven), 'tensor')} are not whole blocks of their type: {some(uneven)}"
        )
    cut = {entry.name for entry in entries.values() if entry.offset + tensor_bytes(entry) > header.file_size}
    if cut:
        raise ValueError(
            f"{path}: truncated: {counted(len(cut), 'tensor ends', 'tensors end')} beyond its "
            f"{header.file_size:,} bytes: {some(cut)}"
        )
    in_order = sorted(entries.values(), key=lambda entry: entry.offset)
    if shared := {b.name for a, b in pairwise(in_order) if a.offset + tensor_bytes(a) > b.offset}:
        raise ValueError(
            f"{path}: damaged: {counted(len(shared), 'tensor begins', 'tensors begin')} inside another "
            f"tensor: {some(shared)}"
        )


def type_name(kind: int) -> str:
    gguf = import_gguf()

    return gguf.GGMLQuantizationType(kind).name if kind in set(gguf.GGMLQuantizationType) else f"number {kind}"


@lru_cache(maxsize=1)
def readable_types() -> frozenset[int]:
    """Returns the types that the package gguf can dequantize."""
    gguf = import_gguf()
    import numpy as np

    readable = set()
    for kind, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        readable.add(int(kind))
    return frozenset(readable)


def block_size(entry: TensorEntry) -> int:
    """Returns the number of values that are encoded together."""
    gguf = import_gguf()

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.type)][0]


def tensor_bytes(entry: TensorEntry) -> int:
    gguf = import_gguf()

    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.type)][1]
    return math.prod(entry.shape) // block_size(entry) * block_bytes


def natural_type(header: GGUFHeader) -> torch.dtype:
    """Returns float16 or bfloat16 if every matrix has that type, otherwise float32."""
    gguf = import_gguf()

    kinds = {entry.type for entry in header.tensors.values() if len(entry.shape) > 1}
    if kinds == {gguf.GGMLQuantizationType.F16}:
        return torch.float16
    return torch.bfloat16 if kinds == {gguf.GGMLQuantizationType.BF16} else torch.float32


def read_gguf_tensor(content: Any, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """Copies one tensor from the mapped file (an array of bytes), because the file may be truncated during use."""
    gguf = import_gguf()
    import numpy as np

    kind = gguf.GGMLQuantizationType(entry.type)
    plain = {
        gguf.GGMLQuantizationType.F32: torch.float32,
        gguf.GGMLQuantizationType.F16: torch.float16,
        gguf.GGMLQuantizationType.BF16: torch.bfloat16,
    }
    tensor = torch.empty(entry.shape, dtype=dtype)
    rows = tensor.view(-1, entry.shape[-1])
    bytes_of_rows = content[entry.offset : entry.offset + tensor_bytes(entry)].reshape(len(rows), -1)
    together = max(1, PIECE_VALUES // entry.shape[-1])
    for start in range(0, len(rows), together):
        piece = np.array(bytes_of_rows[start : start + together])
        if kind in plain:
            values = torch.from_numpy(piece).view(plain[kind])
        else:
            # Read as one long row, because the package processes 16 rows at a time, which are small pieces here.
            values = torch.from_numpy(gguf.dequantize(piece.reshape(1, -1), kind)).view(len(piece), -1)
        rows[start : start + together] = values
    return tensor
