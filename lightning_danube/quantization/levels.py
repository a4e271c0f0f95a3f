"""Names of quantization levels: `<method>:<type>`, then options after a `+`, such as `gguf:Q4_K_M+imatrix`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lightning_danube.extras import need
from lightning_danube.terminal import nearest_name
from lightning_danube.weights.llama_cpp import check_file_type, import_llama_cpp

Method = Literal["full", "gguf", "bitsandbytes", "hqq", "rounding"]
METHODS: tuple[Method, ...] = ("gguf", "bitsandbytes", "hqq", "rounding")
BITSANDBYTES_TYPES = ("int8", "nf4", "fp4")
GROUP_BITS = (2, 3, 4, 8)
CACHE_TYPES = ("q8_0", "q4_0")
EXAMPLES = "gguf:Q4_K_M, bitsandbytes:nf4, hqq:4/64 (bits / weights that share a scale), rounding:4/64"


@dataclass(frozen=True)
class Level:
    """One way to hold a model in fewer bits.

    Args:
        method: the quantizer: "gguf" (llama.cpp), "bitsandbytes", "hqq", or "rounding" to the nearest step.
        type: a GGUF file type; int8, nf4 or fp4 for bitsandbytes; "<bits>/<group>" for hqq and rounding.
        embeddings: whether the embedding and the head are quantized, too.
        double: for 4 bits by bitsandbytes: whether the scales are stored in 8 bits.
        imatrix: for GGUF: whether an importance matrix from a calibration text weighs the columns.
        cache: for GGUF: the type of the cached keys and values; llama.cpp's default is F16.
    """

    method: Method
    type: str
    embeddings: bool = False
    double: bool = False
    imatrix: bool = False
    cache: str | None = None

    @property
    def name(self) -> str:
        """Returns the level's name as a config writes it."""
        if self.method == "full":
            return "full"
        usual = self.method == "gguf"
        options = [] if self.embeddings == usual else ["embeddings" if self.embeddings else "linear"]
        options += [option for option in ("double", "imatrix") if getattr(self, option)]
        options += [f"cache-{self.cache}"] if self.cache else []
        return "+".join([f"{self.method}:{self.type}", *options])

    @property
    def group(self) -> tuple[int, int]:
        """Returns bits/weight and the number of weights that share a scale, for hqq and rounding."""
        bits, group = self.type.split("/")
        return int(bits), int(group)


FULL = Level("full", "")
"""The unquantized model, with which all levels are compared."""


def parse_level(text: str) -> Level:
    """Returns the level with this name.

    Raises:
        ValueError: an unknown method, type or option; the message lists the known ones.
    """
    head, *options = text.strip().split("+")
    name, colon, kind = head.partition(":")
    method = next((one for one in METHODS if one == name), None)
    if not colon or method is None:
        near = nearest_name(name, METHODS)
        hint = f"did you mean {near}:…? " if near and colon else ""
        raise ValueError(f"level {text!r}: {hint}a level is <method>:<type>, such as {EXAMPLES}")
    level = _parse_options(text, method, _parse_type(text, method, kind), options)
    if level.cache and level.method != "gguf":
        raise ValueError(f"level {text!r}: only llama.cpp (gguf:…) has a cache of another type")
    return level


def parse_levels(texts: list[str]) -> list[Level]:
    """Returns the levels with these names.

    Raises:
        ValueError: the list is empty, or a name is wrong or occurs twice.
    """
    if not texts:
        raise ValueError(f"model.levels is empty: name some, such as {EXAMPLES}")
    levels = [parse_level(text) for text in texts]
    for number, level in enumerate(levels):
        if level in levels[:number]:
            raise ValueError(f"model.levels has {level.name} twice: leave one out")
    return levels


def why_not(level: Level) -> str | None:
    """Returns which package is missing and how to install it; None if the level can be tried."""
    try:
        if level.method == "gguf":
            import_llama_cpp()
        elif level.method in ("hqq", "rounding"):
            need("quantization", f"the method {level.method}")
    except ValueError as error:
        return str(error)
    return None


def _parse_type(text: str, method: str, kind: str) -> str:
    if method == "gguf":
        try:
            return check_file_type(kind)
        except ValueError as error:
            raise ValueError(f"level {text!r}: {str(error).partition(': ')[2]}") from None
    if method == "bitsandbytes":
        if kind.lower() not in BITSANDBYTES_TYPES:
            raise ValueError(f"level {text!r}: bitsandbytes has {', '.join(BITSANDBYTES_TYPES)}")
        return kind.lower()
    match = re.fullmatch(r"(\d+)/(\d+)", kind)
    if match is None or int(match[1]) not in GROUP_BITS or int(match[2]) < 2:
        bits = ", ".join(map(str, GROUP_BITS))
        raise ValueError(
            f"level {text!r}: {method} takes <bits>/<group>, such as 4/64: bits are one of {bits}, and group is the "
            "number of weights of a row that share a scale"
        )
    return kind


def _parse_options(text: str, method: Method, kind: str, options: list[str]) -> Level:
    allowed = {
        "gguf": ("linear", "imatrix", *(f"cache-{name}" for name in CACHE_TYPES)),
        "bitsandbytes": ("embeddings",) if kind == "int8" else ("embeddings", "double"),
    }.get(method, ("embeddings",))
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise ValueError(
            f"level {text!r}: there is no option {unknown[0]!r} for {method}:{kind}, only {', '.join(allowed)}"
        )
    caches = [option.removeprefix("cache-") for option in options if option.startswith("cache-")]
    if len(caches) > 1 or len(set(options)) < len(options):
        raise ValueError(f"level {text!r}: an option appears twice")
    return Level(
        method,
        kind,
        embeddings="embeddings" in options or (method == "gguf" and "linear" not in options),
        double="double" in options,
        imatrix="imatrix" in options,
        cache=caches[0] if caches else None,
    )
