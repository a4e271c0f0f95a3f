"""Looks for the most common relapses into hard English, in the prose of all pages. Code, outputs and filled blocks are
left out."""

import ast
import re

import pytest

from docs.making.fill import BLOCK
from docs.making.pages import FENCE, ROOT, pages, read

BEGIN = r"(?:^|(?<=[.!?:;)] )|(?<=\| ))(?:[-*] |\d\. )?"
"""Where a sentence, a line of a list or a cell of a table begins."""
UNITS = (
    r"\b(?:nats|bits) (?:a|per) (?:token|byte|weight|text)\b|\btokens (?:a|per) second\b|\b(?:bytes|FLOPs) a token\b"
)
PRINTED = {
    "say nats/token, bits/byte, tokens/s": UNITS,
    "passes: say epochs": r"\bpass\(es\)|\bpasses$|\bpasses (?:after|are)\b",
    "say 1 device × 1 accumulation step × micro-batch of 8 rows": r"\d × \d+ × \d+ rows|\d × \d+ rows\b",
    "count in words: 1 epoch, 2 epochs": r"\w\((?:s|es)\)(?!\()",
    "quiet: say idle": r"\bquiet\b",
    "say again": r"\banew\b(?!`)",
    "say differently from": r"\botherwise than\b",
    "say appears twice": r"\bstands? (?:there )?twice\b",
    "say fix, correct": r"\bmend(?:s|ed|ing)?\b",
    "say is not a …": r"(?<![Tt]here )(?<!here )\bis no "
    r"(?:checkpoint|run|option|object|mapping|model|multiple|number|text|file|list|key)\b",
}
"""Relapses in what the program prints, and in its docstrings."""
RELAPSES = {
    "a sentence begins with 'Of …'": BEGIN + r"Of (?!course\b)[a-z]",
    "a sentence begins with 'What …', and is no question": BEGIN
    + r"What (?:is|was|were|are|a|an|the|one|it|they|each|all|has|needs|stands|differs)\b(?![^.\n]*\?)",
    "quiet: say idle": r"\bquiet\b",
    "passes: say epochs": r"\bpass(?:es)? over (?:the|each|all|a) (?:text|source|data|document|conversation|pair)"
    r"|\b(?:one|two|three|\d+) pass(?:es)?\b(?! of)|\bpass\(es\)",
    "say every n-th": r"\bso-manieth\b|\bevery so many\b",
    "say nats/token, bits/byte, tokens/s": r"\b(?:nats|bits) a (?:token|byte|weight)\b|\btokens a second\b",
    "say a reader that": r"\b(?:to|from|by|for) who\b",
    "say is detected": r"\b(?:no|nothing|neither) (?:\w+ ){0,3}is (?:to be )?seen\b|\bis not to be told apart\b",
    "say complete": r"\bwhole or not there\b",
    "say for example": r"\bas it were\b",
    "say continues, resumes": r"\b(?:go|goes|going|gone|went) on\b(?! an? )",
    "say while, at the same time": r"\bmeanwhile\b",
    "say is divided among": r"\bdealt\b|\bdeals\b",
}
IN_SENTENCES = {
    "say again": r"\banew\b",
    "say differently from": r"\botherwise than\b",
    "say appears, is in": r"\bstands? (?:there )?twice\b|\bstood in\b"
    r"|\b(?:lies|stands) (?:there|in|behind|before) (?:the|a|its|this)\b",
    "say fix, correct": r"\bmend(?:s|ed|ing)?\b",
    "say is not a …": r"(?<![Tt]here )(?<!here )\b(?:is|are|was|were) no "
    r"(?!longer|better|faster|worse|slower|more|less|other|such|way|need|room)[a-zA-Z]",
}
"""Relapses that are looked for in sentences, and not in tables."""
# These say which words not to use, or are not sentences of this project.
ALLOWED = {
    "CONTRIBUTING.md": (
        "| not |",
        "| idle (a machine)",
        "| no difference",
        "| nats/token, bits/byte",
        "| epochs",
        "| again",
        "| differently from",
        "| is in, appears twice",
        "| fix, correct",
        "| checkpoint, resume",
        "| continues, resumes",
        "No sentence begins",
    )
}
# Made by the mutants' runner, from entries that have their own review.
NOT_READ = {"docs/mutants.md"}


def prose_lines(text: str) -> list[str]:
    """Returns the lines of a page, blank where they are code or filled from a file."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    text = FENCE.sub(blank, BLOCK.sub(blank, text))
    return [re.sub(r"`[^`]*`", "`x`", line) for line in text.splitlines()]


def relapses(text: str, allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"line {number}: {what}: {line.strip()[:120]}"
        for number, line in enumerate(prose_lines(text), start=1)
        if not line.startswith("#") and not (allowed and line.startswith(allowed))
        for what, pattern in (RELAPSES if line.startswith("|") else RELAPSES | IN_SENTENCES).items()
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("page", [page for page in pages() if page not in NOT_READ])
def test_a_page_is_in_plain_english(page: str) -> None:
    assert relapses(read(page), ALLOWED.get(page, ())) == []


def printed_relapses(text: str) -> list[str]:
    return [
        f"{what}: {line.strip()[:120]}"
        for line in text.splitlines()
        for what, pattern in PRINTED.items()
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("page", [page for page in pages() if page not in NOT_READ])
def test_outputs_on_a_page_have_the_words_of_the_pages(page: str) -> None:
    assert [found for block in FENCE.finditer(read(page)) for found in printed_relapses(block[2])] == []


@pytest.mark.parametrize("package", ["lightning_danube", "callbacks"])
def test_messages_and_docstrings_have_the_words_of_the_pages(package: str) -> None:
    files = {path for path in (ROOT / package).rglob("*.py")}
    # The templates of made-up texts, and texts that others wrote, keep their own words.
    files -= set((ROOT / "lightning_danube/text/embedded").glob("*.py"))
    assert len(files) > 10
    found = []
    for path in sorted(files):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [f"{path.relative_to(ROOT)}:{node.lineno}: {one}" for one in printed_relapses(node.value)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "held-out loss, nats a token    web",
        "run: 15 steps, in 5 pass(es), into runs/tuned",
        "source   documents     tokens  held-out tokens  passes",
        "instruct: 16.3 passes are more than 16",
        "run: 64 tokens in 8 steps of 8 (1 × 1 × 2 rows of 4)",
        "does not divide into 2 device(s)",
        "5,728 tokens a second",
        "4.50 bits per weight",
        "the chat template fails: mend the template",
        "the key 'a' stands twice, first in line 1",
        "runs/x is no run",
    ],
)
def test_relapses_in_outputs_are_found(line: str) -> None:
    assert printed_relapses(line)


@pytest.mark.parametrize(
    "line",
    [
        "held-out loss, nats/token    web",
        "the backward pass",
        "6 layers × 384 hidden",
        "1 device × 2 accumulation steps × micro-batch of 8 rows of 256",
    ],
)
def test_plain_outputs_pass(line: str) -> None:
    assert printed_relapses(line) == []


@pytest.mark.parametrize(
    "line",
    [
        "Of a run the newest checkpoint is taken.",
        "- Of the sources two are read.",
        "It ends. What is left goes on.",
        "It ran on a quiet machine.",
        "| loss | in 5 pass(es) |",
        "It made two passes and one pass over the text.",
        "Only every so-manieth unit is made.",
        "The loss is 4.3 nats a token at 12 tokens a second.",
        "At equal parameters no cost is seen.",
        "Nothing is hidden from who counts.",
        "The run begins anew.",
        "A path that exists is no pattern.",
        "gigatoken encodes a text otherwise than tokenizers does.",
        "The counts are elsewhere, and the size stands in the file.",
        "The run goes on from the checkpoint before.",
        "| a killed join | it went on |",
        "The agents import most of Ray meanwhile.",
        "FSDP2 deals the weights over the replicas.",
    ],
)
def test_relapses_are_found(line: str) -> None:
    assert relapses(line)


@pytest.mark.parametrize(
    "line",
    [
        "Of course it ends.",
        "What is left?",
        "## What is refused",
        "`Of a run` and `quiet` are code.",
        "The forward pass and the backward pass.",
        "```\nnats a token\n```",
        "<!-- fill outputs: x -->\nnats a token\n<!-- /fill -->",
        "It says what was measured.",
        "There is no pattern, and the machine is no longer idle.",
        "| A path is no pattern |",
        "This page says where the time goes on a CPU.",
    ],
)
def test_plain_english_passes(line: str) -> None:
    assert relapses(line) == []
