"""Exports trained classifiers for other programs: transformers' LlamaForSequenceClassification and PEFT.

Both programs pool the last token that is not padding, as training does, and score it by a linear layer without a bias.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_danube.weights.names import Located
from lightning_danube.weights.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from lightning_danube.model import Decoder

PROBE = "Whether a text begins as in training: 12 words, and no end."


@dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Args:
        decoder: the decoder, with the adapter merged into its weights or kept beside them.
        score_CD: the head as a linear layer over the last hidden state, (classes, hidden size).
        labels: the classes, by number.
        tokenizer: begins and cuts a text as training did.
    """

    decoder: Decoder
    score_CD: Tensor
    labels: list[str]
    tokenizer: PreTrainedTokenizerFast


def is_classifier(weights: Located) -> bool:
    """Returns whether the weights come from a run of TextClassification. Reads no tensors."""
    if weights.kind != "checkpoint":
        return False
    from lightning_danube.checkpoints.files import read_plain
    from lightning_danube.checkpoints.sharded import read_rest

    path = weights.path
    return "classifier" in (read_rest(path) if path.is_dir() else read_plain(path, mmap=True))


def load_classifier(weights: Located, *, merge: bool = True, dtype: torch.dtype | str | None = None) -> Classifier:
    """Loads the classifier from a checkpoint of a run of TextClassification.

    Args:
        merge: add the adapter to the weights, instead of keeping it beside them.

    Raises:
        ValueError: the model that the adapter was trained on is missing or has changed.
    """
    import torch

    from lightning_danube.weights.huggingface import read_checkpoint
    from lightning_danube.weights.loading import load_adapted_decoder, load_decoder, parse_dtype

    checkpoint = read_checkpoint(weights.path)
    facts = checkpoint["classifier"]
    # Runs of earlier versions kept the start of a text and began it.
    tokenizer = _as_in_training(
        load_tokenizer(weights), facts["context_length"], facts.get("keep", "start"), begin=facts.get("begin", True)
    )
    decoder = (load_decoder if merge else load_adapted_decoder)(weights, dtype=torch.float32)
    score_CD = checkpoint["state_dict"]["head.weight"].clone()
    if facts["head"] == "logits":
        # Two linear layers in sequence are one linear layer, so the output embedding is multiplied into the head.
        score_CD = (score_CD.double() @ decoder.lm_head.weight.detach().double()).to(torch.float32)
    kind = parse_dtype(dtype)
    decoder.to(dtype=kind)
    return Classifier(decoder, score_CD.to(kind), list(facts["labels"]), tokenizer)


def _as_in_training(
    tokenizer: PreTrainedTokenizerFast, context_length: int, keep: str, *, begin: bool
) -> PreTrainedTokenizerFast:
    """Returns a copy of the tokenizer that prepares a text as training did.

    The copy adds the bos token if training did, and `truncation=True` cuts a text at the context length of training.
    A special token that a text spells stays text. The copy has a padding token that no text ends with, because the last
    token that is not padding is scored.

    Raises:
        ValueError: the copy still adds other tokens to a text than training did.
    """
    from lightning_danube.tokens.tokenizer import BEGINS_TEXTS, begin_token, with_bos

    bos = begin_token(tokenizer) if begin else None
    tokenizer = copy.deepcopy(tokenizer)
    if list(tokenizer("").input_ids) != ([] if bos is None else [bos]):
        tokenizer = with_bos(tokenizer, adds=bos is not None)
    tokenizer.init_kwargs.pop(BEGINS_TEXTS, None)
    tokenizer.model_max_length = context_length
    # Named in `init_kwargs`, an option is saved with the tokenizer.
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "right" if keep == "start" else "left"
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    expected = [*([] if bos is None else [bos]), *tokenizer(PROBE, add_special_tokens=False).input_ids]
    if tokenizer(PROBE).input_ids != expected:
        raise ValueError(
            "the tokenizer of the model adds other tokens to a text than training did: it cannot be exported with "
            "equal scores"
        )
    return tokenizer


def hf_config(classifier: Classifier) -> dict[str, Any]:
    """Returns the content of `config.json` for LlamaForSequenceClassification, or its equivalent in another family."""
    from lightning_danube.model.architecture import family_of

    tokenizer = classifier.tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    config = classifier.decoder.config
    return config.to_hf(*ids) | {
        "architectures": [family_of(config).class_name("SequenceClassification")],
        "dtype": str(classifier.score_CD.dtype).removeprefix("torch."),
        "id2label": {str(number): label for number, label in enumerate(classifier.labels)},
        "label2id": {label: number for number, label in enumerate(classifier.labels)},
        "problem_type": "single_label_classification",
        "use_cache": False,
    }


def save_hf_classifier(classifier: Classifier, directory: str | Path, *, card: str, overwrite: bool = False) -> None:
    """Writes a directory that transformers' `pipeline("text-classification")` runs."""
    from lightning_danube.weights.export_places import EXPORTED_FILES, export_folder
    from lightning_danube.weights.huggingface import plain_tensors, write_hf_json, write_shards

    tensors = plain_tensors(classifier.decoder)
    # The head replaces the output embedding.
    tensors.pop("lm_head.weight", None)
    tensors["score.weight"] = classifier.score_CD
    with export_folder(directory, EXPORTED_FILES, overwrite) as partial:
        config = hf_config(classifier)
        write_hf_json(partial / "config.json", config)
        write_shards(partial, tensors, 5 * 10**9)
        classifier.tokenizer.save_pretrained(str(partial))
        (partial / "README.md").write_text(card, "utf-8")
