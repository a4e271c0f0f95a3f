"""The README.md of an exported model. It states only what is known, and leaves out the rest.

For a run, the facts come from the checkpoint's token ledger and from the files beside the checkpoint. For other
weights, the card says where they come from.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_danube.checkpoints.runs import read_saved_config, read_step
from lightning_danube.files import read_json, read_json_lines
from lightning_danube.model.architecture import OPTIONS, family_of, is_on
from lightning_danube.outside.texts import in_code, in_markdown, printable
from lightning_danube.terminal import amount, quoted
from lightning_danube.tokens.chat_template import end_ids
from lightning_danube.tokens.hub import hub_id
from lightning_danube.tokens.tokenizer import begin_token
from lightning_danube.weights.names import Located
from lightning_danube.yaml_files import NotYaml, load_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lightning_danube.model import Decoder, DecoderConfig

GGUF_FACTS = {
    "general.name": "name",
    "general.author": "author",
    "general.organization": "organization",
    "general.source.url": "source",
    "general.url": "address",
    "general.license": "licence",
}
KNOWN_TOKENIZERS = {
    "mistral": "Mistral v1, the SentencePiece pieces of Danube3",
    "danube3-chat": "danube3-chat, the SentencePiece pieces of Danube3 as its chat models use them",
    "danube-small": "danube-small, the byte-level pieces that come with lightning-danube",
}


def model_card(
    title: str,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    weights: Located,
    adapter: str | None = None,
) -> str:
    """The README.md of a Hugging Face directory.

    Args:
        title: the name of the directory.
        decoder: the exported model.
        weights: where the model comes from.
        adapter: the name of an adapter that is merged into the model.
    """
    config = decoder.config
    dtype = str(decoder.model.embed_tokens.weight.dtype).removeprefix("torch.")
    sections = [
        f"# {in_markdown(title)}",
        f"A decoder of the {family_of(config).classes} type with {config.parameters:,} parameters, written by "
        f"lightning-danube {importlib.metadata.version('lightning-danube')}.",
    ]
    licence, note, source_card = None, [], None
    if weights.kind == "checkpoint":
        sections += _of_run(weights.path, decoder)
        note.append("The licence of these weights is not stated. It depends on the texts they were trained on.")
    else:
        origin, licence, source_card = _of_hub_or_directory(weights) if weights.kind == "hf" else _of_gguf(weights)
        sections += ["## Where it comes from", origin]
        if not licence:
            note.append("The licence is that of the source.")
    if adapter is not None:
        sections.append(f"The LoRA adapter {in_code(adapter)} is merged into the weights.")
    sections += [
        "## Architecture",
        _table(
            ("", ""),
            [
                ("layers", config.num_hidden_layers),
                ("hidden size", config.hidden_size),
                ("feed-forward size", config.intermediate_size),
                ("query heads", config.num_attention_heads),
                ("key-value heads", config.num_key_value_heads),
                ("channels of a head", config.head_dim),
                ("vocabulary", f"{config.vocab_size:,}"),
                ("context, tokens", f"{config.max_position_embeddings:,}"),
                ("rotary base", f"{config.rope_theta:,.0f}"),
                *_of_options(config),
                ("input and output embedding", "shared" if config.tie_word_embeddings else "separate"),
                ("parameters", f"{config.parameters:,}"),
                ("stored as", dtype),
            ],
        ),
        "## Tokenizer",
        _of_tokenizer(tokenizer, weights),
        "## Use",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({_literal(f'./{title}')})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_literal(f'./{title}')})\n"
        "```",
        "or " + in_code(f'python -m lightning_danube generate --weights {quoted(f"./{title}")} --prompt "…"'),
        "## Licence and limits",
        " ".join(
            [
                *([f"Licence: {in_markdown(licence)}."] if licence else []),
                *note,
                f"A text may have at most {config.max_position_embeddings:,} tokens. Nothing was measured beyond what "
                "stands here.",
            ]
        ),
    ]
    if source_card:
        sections += ["---", "The card that came with the source:", printable(source_card)]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "license": licence}
    if weights.kind == "hf" and (repository := hub_id(weights.typed)):
        front["base_model"] = repository
    return _front_matter(front) + "\n\n".join(sections) + "\n"


def _of_options(config: DecoderConfig) -> list[tuple[str, str]]:
    """Rows for the options of the decoder that are on."""
    return [
        (title, text.format(getattr(config, name))) for name, (title, text) in OPTIONS.items() if is_on(config, name)
    ]


def classifier_card(title: str, decoder: Decoder, weights: Located, labels: Sequence[str], context_length: int) -> str:
    """The README.md of a LlamaForSequenceClassification.

    Args:
        title: the name of the directory.
        decoder: the classifier's decoder.
        weights: the run that trained the classifier.
        labels: the classes, by number.
        context_length: the most tokens of a text.
    """
    config = decoder.config
    sections = [
        f"# {in_markdown(title)}",
        f"A classifier of texts into {len(labels)} classes: a decoder of the {family_of(config).classes} type with "
        f"{config.parameters:,} parameters and a linear head on the last token, written by lightning-danube "
        f"{importlib.metadata.version('lightning-danube')}. Its adapter was trained on {in_code(weights.adapter_base)} "
        "and is merged into the weights.",
        *_of_run(weights.path, decoder),
        *_validation_scores(weights.path),
        "## Classes",
        ", ".join(in_code(label) for label in labels),
        "## Use",
        "```python\n"
        "from transformers import pipeline\n\n"
        f'classify = pipeline("text-classification", model={_literal(f"./{title}")})\n'
        'classify(["a text", "another one"], truncation=True)\n'
        "```",
        f"`truncation=True` cuts a text at {context_length:,} tokens, as training did.",
        "## Licence and limits",
        "The licence of these weights is not stated. It depends on the model that was trained and the texts it was "
        "trained on. The classes are those of the training texts; a text of any other kind is given to one of them all "
        "the same.",
    ]
    return _front_matter({"library_name": "transformers", "pipeline_tag": "text-classification"}) + (
        "\n\n".join(sections) + "\n"
    )


def adapter_card(
    title: str,
    base: str | None,
    settings: Mapping[str, Any],
    parameters: int,
    labels: Sequence[str] | None = None,
    vocabulary: int | None = None,
) -> str:
    """The README.md of an adapter in PEFT's layout.

    Args:
        title: the name of the directory.
        base: the model that the adapter belongs on, by a name that transformers can load; None if it has none.
        settings: the content of adapter_config.json.
        parameters: how many numbers the adapter holds.
        labels: the classes, by number, if the adapter belongs to a classifier.
        vocabulary: rows of the embedding that the base needs, if the adapter brings new tokens.
    """
    kind = "DoRA" if settings.get("use_dora") else "LoRA"
    sections = [
        f"# {in_markdown(title)}",
        f"A {kind} adapter with {parameters:,} parameters" + (f" for {in_code(base)}." if base else "."),
        _table(
            ("", ""),
            [
                ("rank", settings["r"]),
                ("alpha", settings["lora_alpha"]),
                ("layers", ", ".join(sorted(settings["target_modules"]))),
            ],
        ),
    ]
    if labels is not None:
        classes = {number: label for number, label in enumerate(labels)}
        sections += [
            f"It classifies texts into {len(labels)} classes by the head `score`, which is in it.",
            "```python\n"
            "from peft import PeftModel\n"
            "from transformers import AutoModelForSequenceClassification\n\n"
            f"base = AutoModelForSequenceClassification.from_pretrained("
            f"{_literal(base or 'the model it was trained on')}, num_labels={len(labels)}, id2label={classes})\n"
            f"model = PeftModel.from_pretrained(base, {_literal(title)})\n"
            "```",
        ]
    elif vocabulary is not None:
        sections += [
            "It brings new tokens: the tokenizer is beside it, and the base needs as many rows before it takes the "
            "adapter.",
            "```python\n"
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({_literal(base or 'the model it was trained on')})\n"
            f"base.resize_token_embeddings({vocabulary})\n"
            f"model = PeftModel.from_pretrained(base, {_literal(title)})\n"
            "```",
        ]
    elif base:
        sections += [
            "```python\n"
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({_literal(base)})\n"
            f"model = PeftModel.from_pretrained(base, {_literal(title)})\n"
            "```",
            "or "
            + in_code(
                f'python -m lightning_danube generate --weights {quoted(base)} --adapter {quoted(title)} --prompt "…"'
            ),
        ]
    front = {"library_name": "peft", "base_model": hub_id(base) if base else None}
    return _front_matter(front) + "\n\n".join(sections) + "\n"


def _of_run(checkpoint_file: Path, decoder: Decoder) -> list[str]:
    """What a run was trained on and what it measured, from its checkpoint and the files beside the checkpoint."""
    from lightning_danube.weights.huggingface import read_checkpoint

    checkpoint = read_checkpoint(checkpoint_file)
    run = checkpoint_file.parent.parent
    config = read_saved_config(run / "config.yaml") or {}
    ledger = checkpoint.get("token_ledger")
    step = checkpoint.get("global_step")
    named = in_code(f"{run.parent.name}/{run.name}")
    sections = ["## Training", f"Checkpoint {in_code(checkpoint_file.name)} of the run {named}"]
    facts: list[tuple[str, Any]] = [("optimizer steps", f"{step:,}")] if step else []
    if ledger:
        tokens = int(ledger["samples"].sum()) * ledger["context_length"]
        facts.append(("tokens", f"{tokens:,}"))
        facts.append(("tokens a parameter", f"{tokens / decoder.config.parameters:.3g}"))
        facts.append(("tokens a row", f"{ledger['context_length']:,}"))
    if precision := _at(config, "trainer", "precision"):
        facts.append(("precision in training", in_markdown(precision)))
    if checkpoint.get("seed") is not None:
        facts.append(("seed", checkpoint["seed"]))
    facts += _of_history(run / "history.jsonl")
    sections[-1] += ":" if facts else "."
    sections.append(_table(("", ""), facts))
    if ledger:
        sections += ["### Tokens seen", _of_ledger(ledger)]
        if paths := _source_paths(config, ledger["sources"]):
            sections.append("\n".join(f"- {in_markdown(source)}: {in_code(path)}" for source, path in paths.items()))
    if ledger and (losses := _held_out_losses(ledger, run)):
        sections += ["### Held-out loss", losses]
    return [section for section in sections if section]


def _validation_scores(checkpoint_file: Path) -> list[str]:
    """The scores of a finished classifier run on its validation texts."""
    try:
        summary = read_json(checkpoint_file.parent.parent / "summary.json")
    except (OSError, ValueError):
        return []
    # The summary has the scores of the last step, so they are wrong for an earlier checkpoint.
    if "validation" not in summary or summary.get("steps") != read_step(checkpoint_file):
        return []
    found = summary["validation"]
    rows = [
        (title, f"{found[name]:.3f}", *(f"{end:.3f}" for end in found[f"{name}_interval"]))
        for name, title in (
            ("accuracy", "accuracy"),
            ("macro_f1", "macro F1"),
            ("calibration_error", "calibration error"),
        )
    ]
    above = found["accuracy_above_tfidf"]
    compared = f"{abs(above):.3f} {'below' if above < 0 else 'above'}"
    return [
        f"### On {amount(found['n'], 'validation text')}",
        _table(("", "score", "95 % from", "to"), rows),
        f"The accuracy is {compared} that of TF-IDF with logistic regression, trained on the same texts.",
    ]


def _of_ledger(ledger: Mapping[str, Any]) -> str:
    sources = ledger["sources"]
    rows = []
    for stage, samples in zip(ledger["stages"], ledger["samples"].tolist(), strict=True):
        total = sum(samples)
        if total:
            shares = (f"{n * ledger['context_length']:,} ({100 * n / total:.1f} %)" for n in samples)
            rows.append((in_markdown(stage), f"{total * ledger['context_length']:,}", *shares))
    return _table(("stage", "tokens", *map(in_markdown, sources)), rows)


def _source_paths(config: Mapping[str, Any], sources: Sequence[str]) -> dict[str, str]:
    configured = _at(config, "data", "init_args", "sources") or {}
    return {name: str(path) for name in sources if (path := _at(configured, name, "path"))}


def _held_out_losses(ledger: Mapping[str, Any], run: Path) -> str:
    """A table of the losses after each stage that the checkpoint has finished, from the run's summary.json."""
    try:
        summary = read_json(run / "summary.json")
    except (OSError, ValueError):
        return ""
    # The summary may be newer than the checkpoint, which has finished a stage if it has seen all of the stage's tokens.
    tokens = dict(zip(ledger["stages"], (ledger["samples"].sum(1) * ledger["context_length"]).tolist(), strict=True))
    losses = [
        (stage["name"], stage["val_loss"])
        for stage in summary.get("stages", ())
        if stage["val_loss"] and stage["tokens"] == tokens.get(stage["name"])
    ]
    if not losses:
        return ""
    sources = list(losses[-1][1])
    rows: list[tuple[str, ...]] = []
    if counts := summary.get("val_tokens"):
        rows.append(("tokens measured on", *(f"{counts[name]:,}" if name in counts else "" for name in sources)))
    if unigram := summary.get("unigram_loss"):
        rows.append(("unigram baseline", *(f"{unigram[name]:.3f}" if name in unigram else "" for name in sources)))
    for stage, by_source in losses:
        rows.append(
            (
                in_markdown(f"after {stage}"),
                *(f"{by_source[name]:.3f}" if name in by_source else "" for name in sources),
            )
        )
    table = _table(("nats/token", *map(in_markdown, sources)), rows)
    return table + "\n\nThe unigram baseline only knows how frequent each token is." if unigram else table


def _of_history(file: Path) -> list[tuple[str, str]]:
    """Time, versions and commit of the run's last session."""
    try:
        last = read_json_lines(file)[-1]
    except (OSError, ValueError, IndexError):
        return []
    facts = []
    if began := last.get("time"):
        facts.append(("session began", in_markdown(began)))
    if versions := last.get("versions"):
        facts.append(("versions", in_markdown(", ".join(f"{name} {version}" for name, version in versions.items()))))
    if commit := last.get("commit"):
        facts.append(("commit of the code", in_code(commit)))
    return facts


def _of_hub_or_directory(weights: Located) -> tuple[str, str | None, str | None]:
    """Origin, licence and card of a Hugging Face directory."""
    where = "on the Hugging Face hub" if hub_id(weights.typed) else "a Hugging Face directory"
    return f"The weights of {in_code(weights.typed)}, {where}.", *_licence_and_text(weights.path / "README.md")


def _licence_and_text(file: Path) -> tuple[str | None, str | None]:
    """The licence that a model card's front matter states, and the text below the front matter."""
    from lightning_danube.weights.export_places import CARD_MARK

    if not file.is_file():
        return None, None
    try:
        text = file.read_text("utf-8").partition(CARD_MARK)[0]
    except (OSError, UnicodeDecodeError):
        return None, None
    front = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
    if front is None:
        return None, text.strip() or None
    try:
        facts = load_yaml(front[1])
    except NotYaml:
        return None, text.strip()
    licence = facts.get("license") if isinstance(facts, dict) else None
    names = [str(name) for name in (licence if isinstance(licence, list) else [licence]) if isinstance(name, str | int)]
    return ", ".join(names) or None, text[front.end() :].strip() or None


def _of_gguf(weights: Located) -> tuple[str, str | None, None]:
    """Origin and licence of a GGUF file, from the fields of its header."""
    from lightning_danube.weights.gguf.header import read_gguf_header
    from lightning_danube.weights.llama_cpp import UNQUANTIZED, measure

    fields = read_gguf_header(weights.path).fields
    content = measure(weights.path)
    quantized = not set(content.tensors) <= set(UNQUANTIZED)
    origin = f"The weights of the GGUF file {in_code(weights.path.name)}" + (
        f", quantized there to {content.bits_per_weight:.2f} bits/weight; what that rounded away is lost."
        if quantized
        else "."
    )
    facts = [(title, in_markdown(fields[key])) for key, title in GGUF_FACTS.items() if fields.get(key)]
    licence = fields.get("general.license")
    sections = [origin, *([_table(("", ""), facts)] if facts else [])]
    return "\n\n".join(sections), str(licence) if licence else None, None


def _of_tokenizer(tokenizer: PreTrainedTokenizerFast, weights: Located) -> str:
    facts: list[tuple[str, Any]] = [("tokens", f"{len(tokenizer):,}")]
    if weights.kind == "checkpoint" and weights.tokenizer is not None:
        name = weights.tokenizer.name
        facts.insert(0, ("name", KNOWN_TOKENIZERS.get(name) or in_code(name)))
    for title, token_ids in (
        ("begins a text", [begin_token(tokenizer)]),
        ("ends a text", end_ids(tokenizer)),
        ("pads", [tokenizer.pad_token_id]),
    ):
        known = [f"{in_code(tokenizer.convert_ids_to_tokens(i))}, {i}" for i in token_ids if i is not None]
        if known:
            facts.append((title, "; ".join(known)))
    facts.append(("chat template", "yes" if tokenizer.chat_template else "none"))
    return _table(("", ""), facts)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---", *("---:" if len(header) > 2 else "---" for _ in header[1:])], *rows]
    # A cell may hold code, in which only a bar has to be escaped.
    escaped = [[re.sub(r"(?<!\\)\|", r"\\|", str(cell)) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _literal(text: str) -> str:
    """Returns a text as Python writes it, so an untrusted name cannot end the text and begin a command."""
    return json.dumps(printable(text), ensure_ascii=False)


def _front_matter(fields: Mapping[str, Any]) -> str:
    """The YAML block that the hub reads. Fields without a value are left out."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**fields).to_yaml(original_order=list(fields))}\n---\n\n"


def _at(values: Any, *keys: str) -> Any:
    """The value under nested keys, or None."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
