"""LoRA adapters on the plain decoder against PEFT's own model around transformers' LlamaForCausalLM."""

import copy
import dataclasses
import json
from inspect import getsource, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.weights.adapters import (
    add_adapter,
    base_digest,
    load_adapter,
    merge_adapter,
    save_adapter,
    weights_digest,
)
from lightning_danube.weights.huggingface import load_hf, save_hf
from lightning_danube.weights.lora import Lora

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
IDS = torch.arange(30).view(2, 15)
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "ranks and alphas of its own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 32}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "some layers": {"layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*layers\.\d+\.(self_attn\.k|mlp\.gate)_proj"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
}


def norm_in_its_own_precision(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def save_base(directory: Path, config: DecoderConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    save_hf(Decoder(config).to(dtype), directory / "base")
    return directory / "base"


def save_theirs(base: Path, **settings: Any) -> Path:
    """An adapter as PEFT writes it, with every tensor far from where it starts."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **settings}
    peft_model = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    peft_model.save_pretrained(str(base.parent / "adapter"))
    return base.parent / "adapter"


def their_logits(base: Path, adapter: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()(IDS).logits


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.float64) for kind in KINDS), ("lora", torch.float32)])
def test_theirs_loads_here(kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # See test_parity.py: theirs drops to float32 inside the norm.
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_its_own_precision)
    base = save_base(tmp_path, dtype=dtype)
    adapter = save_theirs(base, **KINDS[kind])
    reference = their_logits(base, adapter)
    decoder = load_hf(base).eval()
    alone = decoder(IDS)
    load_adapter(decoder, adapter)
    assert (decoder(IDS) - alone).abs().max() > 0.1 * reference.abs().max(), "the adapter does not do much"
    # As in test_parity.py; merging adds the same products in another order.
    tolerance = (1e-10 if dtype == torch.float64 else 1e-5) * reference.abs().max()
    assert (decoder(IDS) - reference).abs().max() <= tolerance
    merge_adapter(decoder)
    assert (decoder(IDS) - reference).abs().max() <= tolerance
    assert list(decoder.state_dict()) == list(Decoder(CONFIG).state_dict())
    assert all(parameter.requires_grad for parameter in decoder.parameters())
    save_hf(decoder, tmp_path / "merged")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    assert (merged - reference).abs().max() <= tolerance


def test_what_is_trained_here_loads_in_theirs(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    decoder = load_hf(base)
    add_adapter(decoder, r=4, lora_alpha=16, target_modules=PROJECTIONS, rank_pattern={"v_proj": 6}, use_rslora=True)
    with torch.no_grad():
        assert torch.equal(decoder(IDS), load_hf(base)(IDS)), "a fresh adapter changes something"
    trainable = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 3 * 2 and all("lora_" in name for name in trainable)
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves B alone: A's gradient goes through B, which begins at 0
        decoder(IDS).square().mean().backward()
        optimizer.step()
    save_adapter(decoder, tmp_path / "adapter", base="owner/base", card="# card\n")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["task_type"]) == ("owner/base", "CAUSAL_LM")
    assert settings["inference_mode"] and settings["target_modules"] == sorted(PROJECTIONS)
    ours = decoder.eval()(IDS)
    reference = their_logits(base, tmp_path / "adapter")
    assert (ours - load_hf(base)(IDS)).abs().max() > 1e-2, "training did nothing"
    # See test_parity.py.
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()

    again = load_hf(base).eval()
    load_adapter(again, tmp_path / "adapter", trainable=True)
    assert torch.equal(again(IDS), ours)
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trainable


def test_an_adapter_stays_float32_on_a_16_bit_base(tmp_path: Path) -> None:
    base = save_base(tmp_path, dtype=torch.bfloat16)
    adapter = save_theirs(base)
    decoder = load_hf(base).eval()
    load_adapter(decoder, adapter)
    types = {parameter.dtype for name, parameter in decoder.named_parameters() if "lora_" in name}
    assert types == {torch.float32}
    # The same operations in the same types; the norms alone round otherwise, see test_parity.py.
    exact = load_hf(base, dtype=torch.float64).eval()
    load_adapter(exact, adapter)
    truth, reference = exact(IDS), their_logits(base, adapter)
    assert (decoder(IDS) - truth).square().mean() <= 1.5 * (reference - truth).square().mean()
    merge_adapter(decoder)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}


def change_settings(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensors(adapter: Path, **changes: Tensor | None) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_theirs(save_base(tmp_path))


def refused(adapter: Path, message: str, config: DecoderConfig = CONFIG) -> None:
    """An adapter is refused, and the decoder is as it was."""
    decoder = Decoder(config)
    names, logits = list(decoder.state_dict()), decoder(IDS)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(decoder, adapter)
    assert "\n" not in str(caught.value)
    assert list(decoder.state_dict()) == names and torch.equal(decoder(IDS), logits)
    assert not hasattr(decoder, "peft_config")


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_missing_tensors_are_refused(adapter: Path) -> None:
    change_tensors(adapter, **{A: None})
    refused(adapter, r"adapter: 1 tensor of the adapter .* is missing: model.layers.0.self_attn.q_proj.lora_A.weight$")


def test_surplus_tensors_are_refused(adapter: Path) -> None:
    change_tensors(adapter, **{A.replace("q_proj", "k_proj"): torch.zeros(4, 64)})
    refused(adapter, r"1 tensor of the adapter \(made for .*base\) has no place in this model: .*k_proj.lora_A.weight$")
    change_tensors(
        adapter, **{A.replace("q_proj", "k_proj"): None, "base_model.model.score.weight": torch.zeros(2, 64)}
    )
    refused(adapter, r"has no place in this model: score.weight$")


def test_an_adapter_of_another_base_is_refused(adapter: Path) -> None:
    wider = dataclasses.replace(CONFIG, hidden_size=128, head_dim=None)
    refused(adapter, r"10 tensors .* have another shape .*: .*lora_B.weight \(64, 4\), not \(128, 4\)", wider)
    deeper = dataclasses.replace(CONFIG, num_hidden_layers=3)
    refused(adapter, r"6 tensors of the adapter .* are missing: model.layers.2.mlp.down_proj.lora_A", deeper)
    shallower = dataclasses.replace(CONFIG, num_hidden_layers=1)
    refused(adapter, r"6 tensors .* have no place in this model: model.layers.1.mlp.down_proj.lora_A", shallower)


def test_a_rank_that_is_not_the_tensors_is_refused(adapter: Path) -> None:
    change_settings(adapter, r=8)
    refused(
        adapter,
        r"another shape than this model's layers and its settings say: .*lora_A.weight \(4, 96\), not \(8, 96\)",
    )


def test_a_tied_embedding_is_not_adapted(tmp_path: Path) -> None:
    decoder = Decoder(TIED)
    with pytest.raises(ValueError, match=r"it adapts lm_head, and this model's embedding and head share one weight"):
        add_adapter(decoder, target_modules=["q_proj", "lm_head"])
    assert list(decoder.state_dict()) == list(Decoder(TIED).state_dict())
    add_adapter(decoder, target_modules=["q_proj"])
    save_adapter(decoder, tmp_path / "adapter")
    merge_adapter(decoder)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_embedding_of_its_own_is_refused(tmp_path: Path) -> None:
    adapter = save_theirs(save_base(tmp_path), target_modules=["embed_tokens"])
    assert any("base_layer" in name for name in load_file(adapter / "adapter_model.safetensors")), "PEFT saves a copy"
    refused(adapter, r"adapter: it brings another model.embed_tokens than the model has")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' can be loaded"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which may change the base's own weights"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]; only LoRA on whole"),
        ({"bias": "all"}, "bias is 'all'; only LoRA on whole"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication is \[\[0, 1\]\]; only LoRA on whole"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is {'a': 1}; only LoRA"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow is 3; only LoRA on whole"),
        ({"target_modules": ["qkv_proj"]}, "it fits no layer of this model .*Target modules"),
        ({"r": 0}, "it fits no layer of this model .*r"),
        ({"r": "four"}, "adapter_config.json: it fits no layer"),
        ({"task_type": "POETRY"}, "adapter_config.json: Invalid task type: 'POETRY'"),
    ],
)
def test_settings_that_are_not_known_here_are_refused(settings: dict[str, Any], message: str, adapter: Path) -> None:
    change_settings(adapter, **settings)
    refused(adapter, message)


def test_a_setting_of_tomorrow_that_is_off_is_none(adapter: Path) -> None:
    change_settings(adapter, a_setting_of_tomorrow=None, another={})
    load_adapter(Decoder(CONFIG), adapter)


def test_broken_files_are_refused(adapter: Path) -> None:
    change_tensors(adapter, **{A: torch.full((4, 64), float("nan"))})
    refused(adapter, r"1 tensor holds values that are not finite: .*q_proj.lora_A.weight$")
    change_tensors(adapter, **{A: None, A.removeprefix("base_model.model."): torch.zeros(4, 64)})
    refused(adapter, r"1 names do not begin with base_model.model., as PEFT's do: model.layers.0")
    tensors = adapter / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    refused(adapter, r"adapter_model.safetensors: truncated, or no safetensors file")
    tensors.unlink()
    refused(adapter, r"adapter: no adapter_model.safetensors in it")
    (adapter / "adapter_model.bin").write_bytes(b"")
    refused(adapter, r"only pickled weights \(adapter_model.bin\), which can run anything")
    (adapter / "adapter_config.json").write_text("{")
    refused(adapter, r"adapter_config.json: not JSON")
    (adapter / "adapter_config.json").unlink()
    refused(adapter, r"no adapter_config.json in it, so no adapter in PEFT's layout")


def test_a_second_adapter_is_refused(adapter: Path) -> None:
    decoder = Decoder(CONFIG)
    load_adapter(decoder, adapter)
    with pytest.raises(ValueError, match="the decoder has an adapter already; merge that one first"):
        load_adapter(decoder, adapter)
    with pytest.raises(ValueError, match=r"not a plain one: .*merge its adapters"):
        save_hf(decoder, adapter.parent / "export")
    merge_adapter(decoder)
    load_adapter(decoder, adapter)


def test_a_merge_that_overflows_is_refused(adapter: Path) -> None:
    name = A.replace("lora_A", "lora_B")
    change_tensors(adapter, **{name: load_file(adapter / "adapter_model.safetensors")[name] * 1e6})
    decoder = Decoder(CONFIG).half()
    load_adapter(decoder, adapter)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: the adapter cannot be merged: NaNs detected"):
        merge_adapter(decoder)


def test_only_an_adapter_is_saved_and_overwritten(adapter: Path, tmp_path: Path) -> None:
    decoder = Decoder(CONFIG)
    with pytest.raises(ValueError, match="the decoder has no adapter to save"):
        save_adapter(decoder, tmp_path / "new")
    load_adapter(decoder, adapter)
    with pytest.raises(ValueError, match=r"adapter is not empty \(README.md, adapter_config.json"):
        save_adapter(decoder, adapter)
    save_adapter(decoder, adapter, overwrite=True)
    load_adapter(Decoder(CONFIG), adapter)
    with pytest.raises(ValueError, match=r"base holds more than an exported model"):
        save_adapter(decoder, tmp_path / "base", overwrite=True)


def test_peft_still_has_the_undocumented_parts_that_are_used() -> None:
    assert list(signature(cast_adapter_dtype).parameters)[:2] == ["model", "adapter_name"]
    assert {"merge", "get_base_layer"} <= vars(BaseTunerLayer).keys()
    assert "is_loaded_in_4bit" in getsource(LoraModel), "asked of a model before its 4-bit layers are looked at"
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 2))
    inject_adapter_in_model(LoraConfig(target_modules=["0"]), decoder)
    adapters: Any = decoder.peft_config
    assert list(adapters) == ["default"]


# --- settings and digests ---------------------------------------------------------------------------------------------


def test_settings_of_an_adapter_are_those_of_peft() -> None:
    lora = Lora(rank=3, alpha=7, dropout=0.25, targets=("k_proj", "up_proj"), dora=True, rslora=False)
    config = LoraConfig(**lora.settings())
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7, 0.25)
    assert set(config.target_modules or ()) == {"k_proj", "up_proj"} and config.use_dora and not config.use_rslora
    plain = LoraConfig(**Lora(rslora=True).settings())
    assert plain.use_rslora and not plain.use_dora and (plain.r, plain.lora_alpha, plain.lora_dropout) == (16, 32, 0.05)


def test_a_base_is_the_same_in_wider_types() -> None:
    decoder = Decoder(CONFIG).bfloat16()
    digest = base_digest(decoder)
    assert base_digest(copy.deepcopy(decoder).float()) == digest == base_digest(decoder)
    decoder.lm_head.weight.data[0, 3] += 1
    assert base_digest(decoder) != digest


def test_every_weight_is_in_the_digest_of_all() -> None:
    decoder = Decoder(CONFIG)
    digests = {weights_digest(decoder)}
    for name, parameter in decoder.named_parameters():
        if "layers.1" not in name:
            parameter.data.view(-1)[-1] += 1
            digests.add(weights_digest(decoder))
    digests.add(weights_digest(decoder.bfloat16()))
    assert len(digests) == 1 + 12 + 1
    assert weights_digest(copy.deepcopy(decoder)) in digests


def test_a_loaded_adapter_is_frozen_unless_it_is_to_train(adapter: Path) -> None:
    for trainable in (False, True):
        decoder = Decoder(CONFIG)
        load_adapter(decoder, adapter, trainable=trainable)
        training = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
        assert bool(training) == trainable and all(".lora_" in name for name in training)
