"""Small token files that the real libraries wrote, kept in the folder `files`, and the documents in them.

`python tests/tokens/foreign/written.py` writes them again. It needs datatrove 0.10.1 (extra `benchmark`), megatron-core
0.16.1, dolma 1.2.1 and mosaicml-streaming 0.13.0. The last one asks for transformers below 5, so it and megatron-core
and dolma are not installed beside this project, but put on the path:

    pip install --no-deps --target peers megatron-core==0.16.1 dolma==1.2.1 mosaicml-streaming==0.13.0 PACKAGES
    PYTHONPATH=.:peers python tests/tokens/foreign/written.py

PACKAGES: those that the imports of these three name as missing.
"""

from __future__ import annotations

import shutil
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FILES = Path(__file__).with_name("files")
TOKENIZER = "danube-small"
TOKENIZER_FILE = "lightning_danube/tokens/danube-small/tokenizer.json"
_SUBJECTS = ("The river", "A small boat", "The old mill", "An engineer", "The second experiment")
_VERBS = ("passes", "measures", "remembers", "leaves")
_OBJECTS = ("the quiet town", "every signal twice", "what the morning brought", "a long row of numbers")
DOCUMENTS = tuple(
    " ".join(
        f"{_SUBJECTS[(number + sentence) % 5]} {_VERBS[(number * 3 + sentence) % 4]} "
        f"{_OBJECTS[(number // 2 + sentence) % 4]}."
        for sentence in range(1 + number * 7 % 11)
    )
    + f" This is document {number}."
    for number in range(60)
)


def ids_of_documents() -> list[list[int]]:
    """Returns the ids of each document and its end token, by the library `tokenizers` alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(__file__).parents[3] / TOKENIZER_FILE))
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in DOCUMENTS]


def write_datatrove() -> None:
    from datatrove.data import Document
    from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer, TokenizedFile

    for rank, part in enumerate((DOCUMENTS[:40], DOCUMENTS[40:])):
        step = DocumentTokenizer(
            str(FILES / "datatrove"), TOKENIZER_FILE, eos_token="</s>", shuffle_documents=False, seed=0
        )
        for _ in step.run((Document(text, str(number)) for number, text in enumerate(part)), rank, 2) or ():
            pass
    file = TokenizedFile(str(FILES / "datatrove-wide"), "wide.ds", token_size=4, tokenizer_name_or_path=None)
    for ids in ids_of_documents():
        file.write(ids, None)
    file.close()


def write_megatron() -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name, dtype, parts in (("narrow", np.uint16, 1), ("wide", np.int32, 2)):
        stem = FILES / "megatron" / name
        stem.parent.mkdir(exist_ok=True)
        builder = IndexedDatasetBuilder(f"{stem}.bin", dtype=dtype)
        for ids in ids_of_documents():
            middle = len(ids) // parts
            lengths = [middle, len(ids) - middle] if parts == 2 else [len(ids)]
            builder.add_document(torch.tensor(ids), lengths)
        builder.finalize(f"{stem}.idx")


def without_its_imports(*packages: str) -> None:
    """Makes modules of a package importable without its `__init__.py`, which imports what the writers do not need."""
    for package in packages:
        module = ModuleType(package)
        module.__path__ = [str(place / package.replace(".", "/")) for place in map(Path, sys.path)]
        sys.modules[package] = module


def write_olmo() -> None:
    without_its_imports("dolma", "dolma.core", "dolma.tokenizer")
    from dolma.tokenizer.data_types import TokenizerOutput
    from dolma.tokenizer.memmap_writer import MemmapWriter

    for name, dtype in (("narrow", np.uint16), ("wide", np.uint32)):
        with MemmapWriter(str(FILES / "olmo" / name), dtype=np.dtype(dtype), max_tokens=1 << 16) as writer:
            for number, ids in enumerate(ids_of_documents()):
                output = TokenizerOutput(id=str(number), src="documents", loc=number, tokens=ids, start=0, end=len(ids))
                assert writer.write(output)


def write_mosaic() -> None:
    without_its_imports("streaming", "streaming.base", "streaming.base.storage")
    from streaming.base.format.mds.writer import MDSWriter

    stream = np.array(list(chain.from_iterable(ids_of_documents())))
    rows = np.split(stream, range(64, len(stream), 64))
    ragged = np.split(
        stream, [255, 511, 1000, 1001, 1500, 1700, 2400, 2500, 3300, 3400]
    )  # 255 ids have the shorter header
    kinds: dict[str, tuple[dict[str, str], list[Any]]] = {
        "fixed": ({"tokens": "ndarray:uint16:64"}, [row.astype(np.uint16) for row in rows[:-1]]),
        "ragged": ({"tokens": "ndarray:int32", "number": "int"}, [row.astype(np.int32) for row in ragged]),
        "bytes": ({"tokens": "bytes"}, [row.astype(np.int64).tobytes() for row in rows]),
    }
    for name, (columns, samples) in kinds.items():
        with MDSWriter(out=str(FILES / "mosaic" / name), columns=columns, size_limit=4096, hashes=["sha1"]) as writer:
            for number, sample in enumerate(samples):
                writer.write({"tokens": sample, **({"number": number} if "number" in columns else {})})
    with MDSWriter(out=str(FILES / "mosaic" / "packed"), columns={"tokens": "bytes"}, compression="zstd") as writer:
        writer.write({"tokens": stream.tobytes()})


if __name__ == "__main__":
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir()
    write_datatrove()
    write_megatron()
    write_olmo()
    write_mosaic()
