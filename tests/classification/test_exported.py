"""A classifier as other programs take it. The programs themselves: test_run.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_danube.checkpoints.files import REST
from lightning_danube.classification import ClassificationData, exported
from lightning_danube.classification.exported import (
    Classifier,
    _as_in_training,
    hf_config,
    is_classifier,
    load_classifier,
)
from lightning_danube.classification.labelled_texts import LabelledText
from lightning_danube.tokens.tokenizer import begin_token, load_hf_tokenizer
from lightning_danube.weights.names import Located
from tests.tiny_models import CONFIG, tiny_decoder, tiny_tokenizer


def test_a_text_is_cut_at_its_end_and_begins_as_in_training() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side, tokenizer.pad_token = "left", None
    found = _as_in_training(tokenizer, 6, "start", begin=True)
    text = "a text of many more tokens than six"
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    assert found(text, truncation=True).input_ids == ids[:6]
    assert found("ab").input_ids == [tokenizer.bos_token_id, *tokenizer("ab", add_special_tokens=False).input_ids]
    assert found.pad_token == "<eos>"
    # The tokenizer that was given stays as it was.
    assert tokenizer.truncation_side == "left" and tokenizer.model_max_length == 128 and tokenizer.pad_token is None


def test_a_text_keeps_its_end_without_the_bos_token_as_in_training(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = "a text of many more tokens than six"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for begin, head in ((False, []), (True, [tokenizer.bos_token_id])):
        _as_in_training(tokenizer, 6, "end", begin=begin).save_pretrained(tmp_path / str(begin))
        saved = load_hf_tokenizer(str(tmp_path / str(begin)))
        assert saved(text, truncation=True).input_ids == [*head, *ids[len(head) - 6 :]]
        assert begin_token(saved) == (tokenizer.bos_token_id if begin else None)


def test_an_exported_classifier_reads_special_tokens_in_a_text_as_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = "a<eos>b"
    assert tokenizer.eos_token_id in tokenizer(text).input_ids
    data: Any = ClassificationData.__new__(ClassificationData)
    data.tokenizer, data.context_length, data.keep, data.begin, data.labels = tokenizer, 64, "start", True, []
    trained = data._encode([LabelledText(text, None, "file", 1)]).ids.tolist()
    _as_in_training(tokenizer, 64, "start", begin=True).save_pretrained(tmp_path)
    saved = load_hf_tokenizer(str(tmp_path))
    assert saved(text).input_ids == saved([text], truncation=True).input_ids[0] == trained
    assert tokenizer.eos_token_id not in trained


def test_labels_keep_their_numbers() -> None:
    classifier = Classifier(tiny_decoder(), torch.zeros(3, 64), ["far", "hard", "wet"], tiny_tokenizer())
    config = hf_config(classifier)
    assert config["id2label"] == {"0": "far", "1": "hard", "2": "wet"}
    assert config["label2id"] == {"far": 0, "hard": 1, "wet": 2}
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["dtype"] == "float32"
    assert config["pad_token_id"] == classifier.tokenizer.pad_token_id


@pytest.mark.parametrize("head", ["hidden", "logits"])
def test_a_head_on_logits_is_one_layer_on_states(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    torch.manual_seed(0)
    decoder = tiny_decoder()
    weight = torch.randn(3, CONFIG.hidden_size if head == "hidden" else CONFIG.vocab_size)
    facts = {"head": head, "labels": ["a", "b", "c"], "context_length": 9}
    checkpoint = {"classifier": facts, "state_dict": {"head.weight": weight}}
    monkeypatch.setattr("lightning_danube.weights.huggingface.read_checkpoint", lambda path: checkpoint)
    monkeypatch.setattr("lightning_danube.weights.loading.load_decoder", lambda weights, dtype: decoder)
    monkeypatch.setattr(exported, "load_tokenizer", lambda weights: tiny_tokenizer())
    located: Any = SimpleNamespace(path=Path("unused"))
    found = load_classifier(located, dtype="float32")
    states = torch.randn(5, CONFIG.hidden_size)
    with torch.no_grad():
        expected = (states if head == "hidden" else decoder.lm_head(states)) @ weight.T
    torch.testing.assert_close(states @ found.score_CD.T, expected, rtol=1e-4, atol=1e-4)
    assert found.labels == ["a", "b", "c"] and found.tokenizer.model_max_length == 9


def test_whether_many_ranks_wrote_a_classifier_is_asked_without_its_tensors(tmp_path: Path) -> None:
    for name, extra in (("classifier", {"classifier": {"labels": ["a", "b"]}}), ("other", {})):
        (tmp_path / name).mkdir()
        torch.save({"decoder_config": {}, "optimizer_groups": [], **extra}, tmp_path / name / REST)
        assert is_classifier(Located(name, "checkpoint", tmp_path / name, None)) == bool(extra)
    assert not is_classifier(Located("x", "gguf", tmp_path, None))
