"""Model cards of runs that are made up. Cards of real runs: tests/cli/verbs/test_export.py."""

import ast
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from lightning_danube.model import Decoder
from lightning_danube.weights.model_card import adapter_card, classifier_card, model_card
from lightning_danube.weights.names import Located
from tests.tiny_models import CONFIG, VARIANTS, tiny_decoder, tiny_tokenizer

SAMPLES = torch.tensor([[30, 10], [6, 6]])
"""Samples of 32 tokens by stage and source."""


def section(card: str, title: str) -> list[str]:
    """The lines under a heading."""
    lines = card.partition(f"# {title}\n\n")[2].split("\n#")[0].splitlines()
    assert lines, title
    return lines


@pytest.fixture
def run(tmp_path: Path) -> tuple[Located, Decoder]:
    """A checkpoint in the middle of the second stage, and a summary that was written at its end."""
    decoder, directory = tiny_decoder(), tmp_path / "runs" / "talk" / "version_2"
    (directory / "checkpoints").mkdir(parents=True)
    checkpoint = directory / "checkpoints" / "step_00000013.ckpt"
    content: dict[str, Any] = {
        "decoder_config": CONFIG.facts(),
        "state_dict": {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()},
        "global_step": 1300,
        "seed": 5,
        "token_ledger": {
            "stages": ["first", "second"],
            "sources": ["web", "wiki"],
            "samples": SAMPLES,
            "context_length": 32,
        },
    }
    torch.save(content, checkpoint)
    interval = {"accuracy_interval": [0.7, 0.9], "macro_f1_interval": [0.6, 0.8], "calibration_error_interval": [0, 1]}
    scores = {"accuracy": 0.8, "macro_f1": 0.7, "calibration_error": 0.25, "accuracy_above_tfidf": -0.125, "n": 1200}
    summary = {
        "steps": 13,
        "stages": [
            {"name": "first", "tokens": 1280, "val_loss": {"web": 3.0, "wiki": 2.5}},
            {"name": "second", "tokens": 1000, "val_loss": {"web": 2.0, "wiki": 1.5}},
        ],
        "validation": scores | interval,
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return Located("talk", "checkpoint", checkpoint, None, "base"), decoder


def test_a_card_counts_the_tokens_of_its_checkpoint(run: tuple[Located, Decoder]) -> None:
    card = model_card("talk", run[1], tiny_tokenizer(), run[0])
    training = section(card, "Training")
    tokens = int(SAMPLES.sum()) * 32
    assert training[0] == "Checkpoint `step_00000013.ckpt` of the run `talk/version_2`:"
    rows = [row for row in training if row.startswith("|")]
    assert {f"| tokens | {tokens:,} |", "| optimizer steps | 1,300 |", "| tokens a row | 32 |"} <= set(rows)
    assert f"| tokens a parameter | {tokens / CONFIG.parameters:.3g} |" in rows
    assert section(card, "Tokens seen")[2:] == [
        "| first | 1,280 | 960 (75.0 %) | 320 (25.0 %) |",
        "| second | 384 | 192 (50.0 %) | 192 (50.0 %) |",
    ]
    losses = section(card, "Held-out loss")
    assert "| after first | 3.000 | 2.500 |" in losses and not any("second" in line for line in losses)


@pytest.mark.parametrize(
    ("variant", "row"),
    [
        ("mistral", "| sliding window, tokens | 7 |"),
        ("llama 3.2", "| rotary positions | 32 times slower at long wavelengths |"),
        ("smollm3", "| layers without rotary positions | one in 4 |"),
        ("qwen2", "| biases | of queries, keys and values |"),
        ("qwen3", "| norms of heads | of queries and keys |"),
    ],
)
def test_a_card_has_a_row_for_each_option_that_is_on(variant: str, row: str, run: tuple[Located, Decoder]) -> None:
    plain, rows = (
        section(model_card("talk", decoder, tiny_tokenizer(), run[0]), "Architecture")
        for decoder in (run[1], tiny_decoder(VARIANTS[variant]))
    )
    assert row in rows and len(rows) == len(plain) + 1


def test_a_card_has_the_scores_of_its_own_step(run: tuple[Located, Decoder]) -> None:
    located, decoder = run
    card = classifier_card("talk", decoder, located, ["yes", "no"], 32)
    assert section(card, "On 1,200 validation texts")[2:5] == [
        "| accuracy | 0.800 | 0.700 | 0.900 |",
        "| macro F1 | 0.700 | 0.600 | 0.800 |",
        "| calibration error | 0.250 | 0.000 | 1.000 |",
    ]
    assert "The accuracy is 0.125 below that of TF-IDF" in card
    earlier = located.path.rename(located.path.with_name("step_00000012.ckpt"))
    other = Located("talk", "checkpoint", earlier, None, "base")
    assert "validation texts" not in classifier_card("talk", decoder, other, ["yes", "no"], 32)


HOSTILE = (
    "yes`\n# A title <script>alert(1)</script>",
    "![x](http://evil/track.png)",
    "a | b\x1b[31m",
    '"); import os; os.system("x") #',
    "```\n---\n[a]: http://evil",
    "---",
)


def test_a_card_shows_hostile_names_and_obeys_none(run: tuple[Located, Decoder]) -> None:
    """By another implementation of Markdown: names of others make no heading, no picture, no link, and no code."""
    located, decoder = run
    located = Located(HOSTILE[0], "checkpoint", located.path, None, HOSTILE[3])
    content = torch.load(located.path)
    content["token_ledger"] |= {"stages": list(HOSTILE[:2]), "sources": list(HOSTILE[2:4])}
    torch.save(content, located.path)
    (located.path.parent.parent / "history.jsonl").write_text(json.dumps({"time": HOSTILE[1], "commit": HOSTILE[0]}))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    for card in (
        model_card("talk", decoder, tiny_tokenizer(), located, adapter=HOSTILE[0]),
        classifier_card("talk", decoder, located, HOSTILE, 32),
        adapter_card("talk", HOSTILE[3], settings, 5),
        adapter_card("talk", HOSTILE[3], settings, 5, labels=HOSTILE),
        adapter_card("talk", HOSTILE[3], settings, 5, vocabulary=9),
    ):
        _, front, body = card.split("---\n", 2)
        assert set(yaml.safe_load(front)) <= {"library_name", "pipeline_tag", "license", "base_model"}
        assert "\x1b" not in card
        page = MarkdownIt("commonmark").enable("table").render(body)
        assert not re.search(r"<(script|img|a|hr)\b", page), page
        titles = re.findall(r"<h\d>(.*?)</h\d>", page)
        assert not any("A title" in title for title in titles)
        for code in re.findall(r'<pre><code class="language-python">(.*?)</code></pre>', page, re.DOTALL):
            calls = {
                ast.unparse(node.func) for node in ast.walk(ast.parse(unescape(code))) if isinstance(node, ast.Call)
            }
            assert not any("system" in call for call in calls)


@pytest.mark.parametrize(("license", "kept"), [("mit", True), ("&a [*a]", False), ("[" * 100_000, False)])
def test_a_card_takes_the_licence_of_its_source_if_that_can_be_read(license: str, kept: bool, tmp_path: Path) -> None:
    """Front matter of others may stand for values without end. The text below it is kept in either case."""
    (tmp_path / "README.md").write_text(f"---\nlicense: {license}\n---\nThe card of the source.\n")
    card = model_card("copy", tiny_decoder(), tiny_tokenizer(), Located(str(tmp_path), "hf", tmp_path, None))
    assert "The card of the source." in card
    front = card.split("---\n", 2)[1]
    assert ("license: mit" in front) == kept and ("license" in front) == kept
