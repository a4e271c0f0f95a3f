"""Opens token files as a source of a run does."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.tokens.foreign.listing import ForeignTokens, list_token_files
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from tests.tokens.foreign.written import FILES, TOKENIZER

Open = Callable[..., ForeignTokens]


@pytest.fixture(scope="session")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer(TOKENIZER)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy of the files, which a test may damage."""
    shutil.copytree(FILES, tmp_path / "files")
    return tmp_path / "files"


@pytest.fixture
def opened(tmp_path: Path, tokenizer: DocumentTokenizer) -> Open:
    def open_files(path: Path | str, held_out: float = 0.1, tokenizer: DocumentTokenizer = tokenizer) -> ForeignTokens:
        source, cache = Source(str(path)), tmp_path / "cache"
        directory, _ = list_token_files("books", source, tokenizer, held_out, cache)
        return ForeignTokens(directory, source, tokenizer, cache)

    return open_files
