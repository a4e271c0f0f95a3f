"""Whole runs under a limit of the address space (`ulimit -v`): no traceback, nothing lost or half-written."""

import dataclasses
import re
import shutil
import signal
from pathlib import Path

import pytest

from lightning_danube.checkpoints.files import damage
from lightning_danube.weights.loading import load_model
from tests.evaluation.test_run import YAML as EVALUATION
from tests.forked import Forked
from tests.quantization.test_run import CONFIG as QUANTIZATION
from tests.rows import write_rows
from tests.tiny_models import CONFIG, save_tiny

pytestmark = pytest.mark.faults

LIMITED = """
import resource, sys
from lightning_danube.__main__ import main

taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = taken + int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""


def commands(tiny: Path, tiny_run: Path, place: Path) -> dict[str, list[str]]:
    """Writes what the commands read."""
    tiny_config, weights = ["--config", str(tiny / "tiny.yaml")], ["--weights", str(tiny_run)]
    save_tiny(place / "model", dataclasses.replace(CONFIG, max_position_embeddings=512))
    (place / "text.txt").write_text(" ".join(f"the {number} things of them" for number in range(300)))
    write_rows(place / "texts.jsonl", *({"text": f"{n}: the river and the other stones. " * 4} for n in range(6)))
    questions = ({"question": "Which river?", "answers": "Nile", "passages": ["It is the Nile."]} for _ in range(4))
    write_rows(place / "questions.jsonl", *questions)
    levels = re.sub(r"levels: .*", "levels: [rounding:4/64, rounding:2/64]", QUANTIZATION)
    (place / "bits.yaml").write_text(levels.replace("TMP", str(place)))
    (place / "asked.yaml").write_text(EVALUATION.replace("TMP", str(place)))
    shutil.copytree(tiny_run, place / "resumed" / "tiny" / "version_0")
    more = "      - {name: more, tokens: 1K, mix: {web: 1}}\nmodel:\n"
    (place / "longer.yaml").write_text((tiny / "tiny.yaml").read_text().replace("model:\n", more))
    resumed = ["--runs", str(place / "resumed"), "--ckpt_path", "last"]
    return {
        "fit": ["fit", *tiny_config, "--runs", str(place)],
        "resume": ["fit", "--config", str(place / "longer.yaml"), *resumed],
        "test": ["test", *tiny_config, *resumed],
        "generate": ["generate", *weights, "--prompt", "The river", "--max-new-tokens", "8"],
        "export": ["export", *weights, "--out", str(place / "exported")],
        "gguf": ["export", *weights, "--format", "gguf", "--out", str(place / "exported.gguf")],
        "prepare": ["prepare", *tiny_config, "--data.init_args.cache_dir", str(place / "c"), "--processes", "1"],
        "evaluation": ["test", "--config", str(place / "asked.yaml")],
        "quantization": ["test", "--config", str(place / "bits.yaml")],
    }


@pytest.mark.parametrize(
    "verb", ["fit", "resume", "test", "generate", "export", "gguf", "prepare", "evaluation", "quantization"]
)
def test_a_verb_without_memory_ends_and_loses_nothing(tiny: Path, tiny_run: Path, tmp_path: Path, verb: str) -> None:
    """Each limit leaves some MiB beside what the process has when its work begins. The program keeps 8 MiB of them.

    A library in Rust or C++ that gets no memory aborts the process with lines of its own. Before a tokenizer is loaded,
    its memory is asked for. Later, while rows are encoded and files are written, no program can prevent that.
    """
    checkpoints = {path.name for path in tiny_run.glob("checkpoints/*.ckpt")}
    codes = []
    for mebibytes in (4, 8, 12, 13, 14, 16, 64, 128, 256, 4096):
        place = tmp_path / f"{mebibytes}"
        place.mkdir()
        command = commands(tiny, tiny_run, place)[verb]
        process = Forked([str(mebibytes), *command], place / "said.txt", place, program=LIMITED)
        codes.append(process.wait(300))
        said = (place / "said.txt").read_text()
        assert "Traceback" not in said and "damaged" not in said, (mebibytes, said)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if codes[-1] == 2:
            told = re.search("out of memory|annot allocate memory", said)
            assert len(errors) == 1 and told, (mebibytes, said)
        else:
            aborted = codes[-1] == -signal.SIGABRT and re.search("memory allocation of|std::bad_alloc", said)
            assert not aborted or verb not in ("generate", "export", "gguf"), (mebibytes, said)
            assert not errors and (codes[-1] == 0 or aborted), (mebibytes, codes, said)
        assert not process.family_lives(10)
        if codes[-1] != -signal.SIGABRT:  # as after kill -9, the next start clears up
            assert not [path for path in place.rglob(".*") if path.suffix == ".partial"], mebibytes
        assert not [path for path in place.rglob("*.ckpt") if damage(path) is not None], mebibytes
        if verb != "resume":
            assert {path.name for path in place.glob("resumed/tiny/version_0/checkpoints/*.ckpt")} == checkpoints
        else:
            assert list(place.glob("resumed/tiny/version_0/checkpoints/*.ckpt")), mebibytes
        for exported in place.glob("exported*"):
            load_model(str(exported))
    assert codes[0] != 0 and codes[-1] == 0, codes
