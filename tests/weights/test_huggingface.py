import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_danube.files import InUse
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.weights.export_places import exporting
from lightning_danube.weights.gguf.files import load_gguf, save_gguf
from lightning_danube.weights.huggingface import assemble, is_host, load_checkpoint, load_hf, save_hf
from tests.tiny_models import tiny_decoder

CONFIG = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101, initializer_range=0.2)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
IDS = torch.arange(30).view(2, 15)
# The largest tensor has 25,856 bytes, all together have about 190,000: some shards hold several tensors.
SHARD = 40_000


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG)


@pytest.fixture
def exported(decoder: Decoder, tmp_path: Path) -> Path:
    save_hf(decoder, tmp_path / "export")
    return tmp_path / "export"


def assert_same_parameters(one: torch.nn.Module, other: torch.nn.Module) -> None:
    others = dict(other.named_parameters())
    assert dict(one.named_parameters()).keys() == others.keys()
    for name, parameter in one.named_parameters():
        assert parameter.dtype == others[name].dtype and torch.equal(parameter, others[name]), name


@pytest.mark.parametrize("max_shard_bytes", [10**9, SHARD, 1])
@pytest.mark.parametrize("config", [CONFIG, TIED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_loads_in_transformers_and_here(
    config: DecoderConfig, dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path
) -> None:
    decoder = Decoder(config).to(dtype)
    save_hf(decoder, tmp_path / "export", max_shard_bytes=max_shard_bytes)
    shards = list((tmp_path / "export").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 10**9)
    names = [name for shard in shards for name in load_file(shard)]
    assert ("lm_head.weight" in names) == (not config.tie_word_embeddings)
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "something temporary was left behind"

    here = load_hf(tmp_path / "export")
    assert here.config == config
    assert_same_parameters(here, decoder)
    assert torch.equal(here(IDS), decoder(IDS))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert isinstance(theirs, LlamaForCausalLM)
    assert_same_parameters(theirs, decoder)
    assert (theirs.generation_config.eos_token_id, theirs.config.pad_token_id) == (2, 0)
    if dtype == torch.float32:
        # See test_parity.py.
        reference = theirs(IDS).logits
        assert (decoder(IDS) - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_theirs_loads_here(tied: bool, shard_size: str, tmp_path: Path) -> None:
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    )
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "40KB")
    ours = load_hf(tmp_path)
    assert_same_parameters(ours, theirs)
    reference = theirs(IDS).logits
    # See test_parity.py.
    assert (ours(IDS) - reference).abs().max() <= 1e-5 * reference.abs().max()
    assert ours.training and all(parameter.requires_grad for parameter in ours.parameters())


def test_loading_in_another_type(exported: Path, decoder: Decoder) -> None:
    assert_same_parameters(load_hf(exported, dtype=torch.bfloat16, device="cpu"), decoder.bfloat16())


def test_of_several_types_the_one_that_holds_them_all(exported: Path, decoder: Decoder) -> None:
    change_tensors(exported, **{name: t.bfloat16() for name, t in load_file(exported / "model.safetensors").items()})
    assert_same_parameters(load_hf(exported), decoder.bfloat16())
    change_tensors(exported, **{"model.norm.weight": torch.ones(64, dtype=torch.float16)})
    loaded = load_hf(exported)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded(IDS), decoder.float()(IDS))


def test_weights_larger_than_the_memory_are_refused_before_they_are_read(
    exported: Path, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From each kind of file, in the type that is asked for. A GPU has a memory of its own."""
    checkpoint, file = tmp_path / "step_1.ckpt", tmp_path / "model.gguf"
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    torch.save({"decoder_config": decoder.config.facts(), "state_dict": state}, checkpoint)
    save_gguf(decoder, file, dtype=torch.float32)
    needed = 4 * decoder.config.parameters
    for load, source in ((load_hf, exported), (load_checkpoint, checkpoint), (load_gguf, file)):
        monkeypatch.setattr("lightning_danube.device.usable_memory", lambda: needed)
        load(source, dtype=torch.float32)
        monkeypatch.setattr("lightning_danube.device.usable_memory", lambda: needed - 1)
        load(source, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(source))} has [\d.]+ GB of weights, more than the"):
            load(source, dtype=torch.float32)
    assert [is_host(device) for device in (None, "cpu", torch.device("cpu"), "cuda:1")] == [True, True, True, False]


def test_weights_that_are_no_numbers_are_refused_whatever_file_holds_them(decoder: Decoder) -> None:
    tensors = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    tensors["model.norm.weight"][3] = torch.nan
    with pytest.raises(ValueError, match=r"^x.gguf: its weight model.norm.weight holds NaN or infinity"):
        assemble(decoder.config, tensors, Path("x.gguf"))


def test_the_model_does_not_live_on_the_files(exported: Path, decoder: Decoder) -> None:
    loaded = load_hf(exported)
    for file in exported.glob("*.safetensors"):
        file.write_bytes(b"")
    assert_same_parameters(loaded, decoder)


def test_ids_and_tokenizer_go_along(decoder: Decoder, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, save_directory: str) -> None:
            (Path(save_directory) / "tokenizer.json").write_text("{}")

    save_hf(decoder, tmp_path / "export", Tokenizer(), bos_id=5, eos_id=6, pad_id=None)
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (5, 6, None)
    assert json.loads((tmp_path / "export/generation_config.json").read_text()) == {
        "bos_token_id": 5,
        "eos_token_id": 6,
    }
    assert (tmp_path / "export/tokenizer.json").exists()


def test_settings_of_generation_and_a_card_go_along(decoder: Decoder, tmp_path: Path) -> None:
    save_hf(decoder, tmp_path / "export", generation={"eos_token_id": [2, 7], "temperature": 0.5}, card="# A card\n")
    settings = json.loads((tmp_path / "export/generation_config.json").read_text())
    assert settings == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0, "temperature": 0.5}
    assert (tmp_path / "export/README.md").read_text().startswith("# A card\n\n<!-- export replaces this file while ")
    save_hf(decoder, tmp_path / "export", overwrite=True)
    assert not (tmp_path / "export/README.md").exists()


def test_a_failed_save_leaves_nothing_and_spoils_nothing(decoder: Decoder, exported: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, save_directory: str) -> None:
            raise OSError("disk full")

    before = load_hf(exported)
    with pytest.raises(OSError, match="disk full"):
        save_hf(Decoder(CONFIG), exported, Tokenizer(), overwrite=True)
    assert [path.name for path in exported.parent.iterdir()] == ["export"]
    assert_same_parameters(load_hf(exported), before)


def test_an_export_is_overwritten_only_when_asked(decoder: Decoder, exported: Path) -> None:
    other = Decoder(CONFIG)
    with pytest.raises(ValueError, match=r"export is not empty \(config.json, generation_config.json, model.safe"):
        save_hf(other, exported)
    assert_same_parameters(load_hf(exported), decoder)
    save_hf(other, exported, overwrite=True)
    assert_same_parameters(load_hf(exported), other)
    assert [path.name for path in exported.parent.iterdir()] == ["export"]


def test_a_model_can_be_saved_over_the_files_it_came_from(exported: Path, decoder: Decoder) -> None:
    loaded = load_hf(exported)
    save_hf(loaded, exported, overwrite=True)
    assert_same_parameters(load_hf(exported), decoder)
    assert_same_parameters(loaded, decoder)


def test_an_empty_directory_is_no_obstacle(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    save_hf(decoder, tmp_path / "export")
    assert_same_parameters(load_hf(tmp_path / "export"), decoder)


def test_what_is_no_export_is_never_overwritten(decoder: Decoder, exported: Path, tmp_path: Path) -> None:
    (exported / "thesis.tex").write_text("")
    (exported / "photos").mkdir()
    with pytest.raises(ValueError, match=r"more than an exported model \(photos, thesis.tex\); it is not overwritten"):
        save_hf(decoder, exported, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; give a directory that does not exist yet"):
        save_hf(decoder, tmp_path / "file")


def test_a_decoder_with_adapters_is_not_saved(decoder: Decoder, tmp_path: Path) -> None:
    decoder.model.layers[0].register_parameter("lora_A", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"not a plain one: model.layers.0.lora_A; merge its adapters"):
        save_hf(decoder, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_refused(exported: Path) -> None:
    names = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "kqvo"]
    change_tensors(exported, **dict.fromkeys(names))
    message = r"export: 4 tensors are missing: model.layers.1.*k_proj.weight, .*o_proj.weight, .*q_proj.* and 1 more$"
    with pytest.raises(ValueError, match=message):
        load_hf(exported)


def test_surplus_tensors_are_refused(exported: Path) -> None:
    change_tensors(exported, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"1 tensor has no place in the model of its config: .*q_proj.bias$"):
        load_hf(exported)


def test_tables_of_old_versions_are_no_surplus(exported: Path, decoder: Decoder) -> None:
    change_tensors(exported, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert_same_parameters(load_hf(exported), decoder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused(dtype: torch.dtype, exported: Path) -> None:
    change_tensors(exported, **{"lm_head.weight": torch.zeros(101, 64).to(dtype)})
    with pytest.raises(ValueError, match=r"model.safetensors: 1 tensor is quantized or no floats \(lm_head.weight \w+"):
        load_hf(exported)
    config = json.loads((exported / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: quantization_config is set; load the unquantized weights"):
        load_hf(exported)


def test_a_tensor_that_two_files_have_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    save_hf(decoder, tmp_path / "export", max_shard_bytes=SHARD)
    first, second, *_ = sorted((tmp_path / "export").glob("*.safetensors"))
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name] + 1}, second)
    with pytest.raises(ValueError, match=rf"export: 1 tensor is in two of its files: {name}$"):
        load_hf(tmp_path / "export")


def test_wrong_shapes_are_refused(exported: Path) -> None:
    change_tensors(exported, **{"lm_head.weight": torch.zeros(102, 64)})
    with pytest.raises(
        ValueError, match=r"1 tensor has another shape .*: lm_head.weight \(102, 64\), not \(101, 64\)$"
    ):
        load_hf(exported)


def test_a_tied_model_with_two_embeddings_is_refused(tmp_path: Path) -> None:
    save_hf(Decoder(TIED), tmp_path / "export")
    embedding = load_file(tmp_path / "export/model.safetensors")["model.embed_tokens.weight"]
    change_tensors(tmp_path / "export", **{"lm_head.weight": embedding.clone()})
    load_hf(tmp_path / "export")
    change_tensors(tmp_path / "export", **{"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"tie_word_embeddings, yet lm_head.weight is not the embedding"):
        load_hf(tmp_path / "export")


def test_truncated_weights_are_refused(exported: Path) -> None:
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated, or no safetensors file"):
        load_hf(exported)


def test_directories_without_a_model_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such directory"):
        load_hf(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r": no config.json in it"):
        load_hf(tmp_path)
    (exported / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors and no model.safetensors.index.json in it"):
        load_hf(exported)
    (exported / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\), which can run anything"):
        load_hf(exported)


def test_broken_config_files_are_refused(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    for content, message in (
        ("{", r"config.json: not JSON"),
        ("[]", r"config.json: holds a list, not an object"),
        (json.dumps(config | {"model_type": "gpt2"}), r"config.json: model_type is 'gpt2'; these can be"),
        (json.dumps(config | {"head_dim": 15}), r"config.json: head_dim 15 is odd"),
    ):
        (exported / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_hf(exported)


def test_a_stale_index_does_not_count(decoder: Decoder, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_hf(Decoder(decoder.config), tmp_path / "export", max_shard_bytes=20_000)
    index = (tmp_path / "export/model.safetensors.index.json").read_text()
    save_hf(decoder, tmp_path / "export", overwrite=True)
    (tmp_path / "export/model.safetensors.index.json").write_text(index)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    for name, tensor in load_hf(tmp_path / "export").state_dict().items():
        assert torch.equal(tensor, expected[name]) and torch.equal(tensor, decoder.state_dict()[name])


def test_broken_indexes_are_refused(decoder: Decoder, tmp_path: Path) -> None:
    save_hf(decoder, tmp_path / "export", max_shard_bytes=SHARD)
    next((tmp_path / "export").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"1 file of its index is missing: model-00002-of-"):
        load_hf(tmp_path / "export")
    for weight_map in ({"lm_head.weight": "../elsewhere.safetensors"}, {}, {"lm_head.weight": 3}):
        (tmp_path / "export/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"index.json: (no weight_map from tensors to files|.* that is a path)"):
            load_hf(tmp_path / "export")


def lightning_checkpoint(decoder: Decoder, **changes: Any) -> dict[str, Any]:
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    state["classifier.weight"] = torch.zeros(2, 2)
    content = {
        "decoder_config": dataclasses.asdict(decoder.config),
        "state_dict": state,
        "optimizer_states": [{"a": 1}],
    }
    return content | changes


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_our_checkpoints_load(config: DecoderConfig, tmp_path: Path) -> None:
    decoder = Decoder(config)
    torch.save(lightning_checkpoint(decoder), tmp_path / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").write_bytes(b"")  # the model does not live on the file
    assert loaded.config == config
    assert_same_parameters(loaded, decoder)
    assert torch.equal(loaded(IDS), decoder(IDS))
    torch.save(lightning_checkpoint(decoder), tmp_path / "last.ckpt")
    assert_same_parameters(load_checkpoint(tmp_path / "last.ckpt", torch.bfloat16, "cpu"), decoder.bfloat16())


def test_foreign_checkpoints_are_refused(decoder: Decoder, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match=r"last.ckpt: no such file"):
        load_checkpoint(file)
    torch.save(lightning_checkpoint(decoder), file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"^[^\n]*last.ckpt: truncated, or no checkpoint that holds only [^\n]*$"):
            load_checkpoint(file)
    torch.save(lightning_checkpoint(decoder, hook=shutil.rmtree), file)
    with pytest.raises(
        ValueError, match=r"last.ckpt holds more than tensors and plain data \(it asks for shutil.rmtree\)"
    ):
        load_checkpoint(file)
    torch.save({"state_dict": {}}, file)
    with pytest.raises(ValueError, match=r"last.ckpt: not a checkpoint of this project"):
        load_checkpoint(file)
    torch.save(lightning_checkpoint(decoder, decoder_config={"hidden": 3}), file)
    with pytest.raises(ValueError, match=r"last.ckpt: decoder_config: .*'hidden'"):
        load_checkpoint(file)
    torch.save(lightning_checkpoint(decoder, state_dict={}), file)
    with pytest.raises(ValueError, match=r"last.ckpt: 21 tensors are missing: lm_head.weight, .* and 18 more"):
        load_checkpoint(file)


def test_importing_the_model_imports_neither_transformers_nor_safetensors() -> None:
    code = "import sys, lightning_danube.model; print([m for m in ('transformers', 'safetensors') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("limit", [20_000, SHARD, 10**5])
def test_shards_are_no_larger_than_asked_for_and_the_index_counts_bytes(
    limit: int, decoder: Decoder, tmp_path: Path
) -> None:
    """A tensor that is larger has a file of its own. No two neighbours would fit into one file."""
    save_hf(decoder.bfloat16(), tmp_path / "export", max_shard_bytes=limit)
    shards = [load_file(file) for file in sorted((tmp_path / "export").glob("model-*.safetensors"))]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert len(shards) > 1
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    names = list(decoder.state_dict())
    begins = [min(map(names.index, shard)) for shard in shards]
    for size, begin in zip(sizes, sorted(begins)[1:], strict=False):
        assert size + decoder.state_dict()[names[begin]].nbytes > limit
    index = json.loads((tmp_path / "export/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in decoder.parameters())
    assert index["weight_map"].keys() == set(names)


def test_a_loaded_checkpoint_has_its_own_memory(decoder: Decoder, tmp_path: Path) -> None:
    """The memory map of the file would show what another process writes into it."""
    file = tmp_path / "last.ckpt"
    torch.save(lightning_checkpoint(decoder), file)
    loaded = load_checkpoint(file)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert_same_parameters(loaded, decoder)


def test_a_card_that_the_user_has_changed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, card = tiny_decoder(), tmp_path / "export" / "README.md"
    save_hf(decoder, tmp_path / "export", card="# First\n")
    save_hf(decoder, tmp_path / "export", card="# Second\n", overwrite=True)
    assert card.read_text().startswith("# Second\n") and not capsys.readouterr().err
    written = card.read_text()
    for mine in (written.replace("Second", "My model"), f"{written}\nMore.\n", "# Mine\n", ""):
        card.write_text(mine)
        for new in ("# Third\n", None):
            save_hf(decoder, tmp_path / "export", card=new, overwrite=True)
            assert card.read_text() == mine
            assert capsys.readouterr().err == f"{card} is kept: it was changed after an export, or written by hand\n"


def test_an_export_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("v1")
    save_hf(tiny_decoder(), tmp_path / "link")
    first = (tmp_path / "v1" / "model.safetensors").stat().st_ino
    save_hf(tiny_decoder(), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "v1").is_symlink()
    assert (tmp_path / "v1" / "model.safetensors").stat().st_ino != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "v1"]


@pytest.mark.parametrize("name", [".", "..", "../here", "link"])
def test_the_working_directory_is_not_replaced(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "link").symlink_to(tmp_path)
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match=f"--out {re.escape(name)}: an export replaces the directory, and you are in"):
        save_hf(tiny_decoder(), name, overwrite=True)
    assert Path.cwd() == here and [path.name for path in here.iterdir()] == ["link"]


def test_a_place_takes_one_export_at_a_time(tmp_path: Path) -> None:
    with exporting(tmp_path / "new" / "a"):
        with pytest.raises(InUse, match=r"--out .*/a is in use by process"), exporting(tmp_path / "new" / "a"):
            pass
        with exporting(tmp_path / "new" / "b"):
            pass
    assert not list(tmp_path.iterdir())
