"""`tokenizer`: trains a tokenizer on any texts and writes it as a Hugging Face directory."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_danube.terminal import counted, show, text_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lightning_danube.tokens.tokenizer_training import TextSample

WRITTEN_FILES = ("tokenizer*",)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        action="append",
        metavar="NAME",
        help="the configuration of a pre-training run, a name or a file: its data.sources",
    )
    parser.add_argument(
        "--source",
        action="append",
        metavar="PATH",
        help="without a configuration: a file, a directory or a glob of texts, as in data.sources; may be repeated",
    )
    parser.add_argument("--vocab-size", default="4096", metavar="N", help="pieces in all, such as 8192 or 32K (4096)")
    parser.add_argument("--out", required=True, metavar="PATH", help="directory to create")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there")
    # Everything else overrides a key of the configuration, as in `fit`.
    parser.set_defaults(overrides=[])


def run(arguments: Namespace) -> None:
    from lightning_danube.options import parse_tokens
    from lightning_danube.tokens.tokenizer_training import check_pieces, train_tokenizer
    from lightning_danube.weights.export_places import export_folder, exporting

    pieces = parse_tokens(arguments.vocab_size, "--vocab-size")
    check_pieces(pieces)
    # Entered before the text is read, so that a directory that cannot be written is reported at once.
    with (
        exporting(arguments.out),
        export_folder(arguments.out, WRITTEN_FILES, arguments.overwrite) as directory,
    ):
        sample = _sample(arguments)
        tokenizer = train_tokenizer(sample.texts(), pieces)
        tokenizer.save_pretrained(str(directory))
    show(_summary(arguments.out, tokenizer, sample))


def _sample(arguments: Namespace) -> TextSample:
    from lightning_danube.files import default_cache_dir
    from lightning_danube.text.corpora import Source
    from lightning_danube.tokens.tokenizer_training import TextSample

    if bool(arguments.config) == bool(arguments.source):
        raise ValueError("give the texts either by --config NAME, which has data.sources, or by --source PATH")
    if arguments.config:
        return _configured_sample(arguments.config, arguments.overrides)
    if arguments.overrides:
        raise ValueError(
            f"unrecognized arguments: {' '.join(arguments.overrides)} (only --config has keys to override)"
        )
    return TextSample({path: Source(path) for path in arguments.source}, default_cache_dir())


def _configured_sample(configs: Sequence[str], overrides: Sequence[str]) -> TextSample:
    from lightning_danube.cli.configs import configured_data
    from lightning_danube.tokens.tokenizer import MISTRAL

    # The configuration may already name the tokenizer that this command makes.
    data = configured_data("tokenizer", configs, [*overrides, "--data.init_args.tokenizer", MISTRAL])
    from lightning_danube.pretraining.data import CurriculumData
    from lightning_danube.tokens.tokenizer_training import TextSample

    assert isinstance(data, CurriculumData)
    return TextSample(data.sources, data.cache_dir, data.held_out)


def _summary(out: str, tokenizer: PreTrainedTokenizerFast, sample: TextSample) -> str:
    from lightning_danube.tokens.tokenizer import MISTRAL, load_hf_tokenizer

    measured = {name: texts for name, texts in sample.measured.items() if texts}
    rows = [
        [name, f"{len(measuring):,}", *_bytes_per_token(measuring, measured)]
        for name, measuring in ((out, tokenizer), (MISTRAL, load_hf_tokenizer(MISTRAL)))
    ]
    lines = [text_table(["bytes per token of held-out text", "pieces", *measured], rows)]
    if not measured:
        lines.append("there is too little text to hold some out and measure on it")
    lines += [
        f"{name}: {counted(count, 'row was', 'rows were')} skipped, as on_bad_row says"
        for name, count in sample.skipped_rows.items()
    ]
    learned = sum(sample.learned_bytes.values())
    lines.append(f"learned from {learned:,} bytes; to use it in a configuration: tokenizer: {Path(out)}")
    return "\n".join(lines)


def _bytes_per_token(tokenizer: PreTrainedTokenizerFast, measured: Mapping[str, Sequence[str]]) -> list[str]:
    from lightning_danube.tokens.encoding import TextEncoder, can_encode_in_parts

    description = tokenizer.backend_tokenizer.to_str()
    encoder = TextEncoder(description, can_encode_in_parts(description))
    cells = []
    for texts in measured.values():
        tokens = sum(map(len, encoder.encode(texts)))
        cells.append(f"{sum(len(text.encode()) for text in texts) / tokens:.2f}")
    return cells
