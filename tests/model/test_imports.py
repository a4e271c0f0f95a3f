"""What loading a model imports: the first token of `generate` waits for it."""

import subprocess
import sys
from pathlib import Path

import pytest

LOAD = """
import sys
import torch
from lightning_danube.generation import generate
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.weights.gguf.files import load_gguf, save_gguf
from lightning_danube.generation.packing import pack_for_generation

config = DecoderConfig(64, 96, 2, 4, 2, vocab_size=101)
save_gguf(Decoder(config), sys.argv[1], dtype=torch.float32)
decoder = load_gguf(sys.argv[1])
pack_for_generation(decoder)
generate(decoder, [[1, 2, 3]], 4)
print(*(name for name in ("torch._dynamo", "mistral_common", "transformers", "lightning") if name in sys.modules))
"""


@pytest.mark.medium
def test_a_model_loads_and_generates_without_the_compiler(tmp_path: Path) -> None:
    """PyTorch's compiler takes 1.4 CPU seconds to import, mistral_common 0.4."""
    run = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "a.gguf")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
