"""The first steps on a machine without what only Linux has. No Mac was at hand: this takes away what a Mac lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_danube.device import widest_float

ROOT = Path(__file__).resolve().parents[1]

# Python reads this file at the start of every process, also of those that the first one starts.
SITE = """
import errno, multiprocessing, os, signal, sys

for module, names in {
    os: ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "memfd_create", "pidfd_open",
         "O_DIRECT", "O_TMPFILE", "copy_file_range", "splice", "eventfd"),
    signal: ("sigtimedwait", "sigwaitinfo", "SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGPOLL"),
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
multiprocessing.set_start_method("spawn", force=True)

def refuse(event, args):
    if event == "open" and str(args[0]).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(args[0]))
    if event == "ctypes.dlopen" and "libc.so" in str(args[0]):
        raise OSError(f"{args[0]}: no such library")
    if event == "ctypes.dlsym" and args[1] in ("mallopt", "malloc_trim", "prctl"):
        raise AttributeError(args[1])

sys.addaudithook(refuse)
"""

# All verbs in one process, which saves two starts.
PROGRAM = """
import os, sys
import torch

class Missing:
    def __getattr__(self, name):
        raise AttributeError(f"no operator {name}: this PyTorch is built without oneDNN")

if __name__ == "__main__":
    torch._C._set_mkldnn_enabled(False)
    torch.backends.mkldnn.is_available = lambda: False
    torch.ops.mkldnn = Missing()
    from lightning_danube.__main__ import main
    from lightning_danube.tokens import preparation

    preparation.WORTH_PROCESSES = 1
    fitting = ["--config", "quickstart", "--config", "small.yaml"]
    assert main(["prepare", *fitting, "--processes", "2"]) == 0
    assert main(["fit", *fitting]) == 0
    writing = ["--weights", "runs/quickstart/version_0", "--prompt", "The river", "--max-new-tokens", "4"]
    assert main(["generate", *writing]) == 0
"""

SMALL = """
data:
  init_args:
    tokenizer: mistral
    context_length: 32
    batch_tokens: 128
    micro_batch_size: 4
    validation_rows: 2
    workers: 1
    cache_dir: cache
    sources: {one: {path: one.jsonl}, two: {path: two.jsonl}}
    stages: [{name: first, tokens: 512, mix: {one: 90, two: 10}}]
model:
  init_args:
    decoder:
      {num_hidden_layers: 2, hidden_size: 32, intermediate_size: 64, num_attention_heads: 4, num_key_value_heads: 2}
    learning_rate: {peak: 1.0e-3, final: 1.0e-4, warmup: 128}
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="takes away what POSIX systems have")
def test_the_first_steps_need_nothing_of_linux(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "small.yaml").write_text(SMALL)
    for name in ("one", "two"):
        rows = (f'{{"text": "{name} {n}: the river runs {"on and " * (n % 7)}on"}}\n' for n in range(400))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    done = subprocess.run(
        [sys.executable, "program.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("The river")
    assert list((tmp_path / "runs" / "quickstart" / "version_0" / "checkpoints").glob("*.ckpt"))


def test_what_the_test_above_takes_away_is_gone(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    code = """
import ctypes, multiprocessing, os
assert not hasattr(os, "sched_getaffinity") and multiprocessing.get_start_method() == "spawn"
for attempt in (lambda: ctypes.CDLL("libc.so.6"), lambda: open("/proc/self/status")):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit(1)
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_mps_gets_no_float64() -> None:
    """Apple's GPUs have none, and PyTorch raises a TypeError instead of computing such a tensor elsewhere."""
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda:0")) == torch.float64


def test_what_mps_lacks_goes_to_the_cpu() -> None:
    """Torch reads the variable when it is loaded, so the package sets it when it is imported."""
    code = "import os, sys; sys.platform = 'darwin'; from lightning_danube.__main__ import main; main(['--version']); "
    code += "assert 'torch' not in sys.modules; print(os.environ['PYTORCH_ENABLE_MPS_FALLBACK'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTORCH_ENABLE_MPS_FALLBACK", None)
    for given, expected in ((None, "1"), ("0", "0")):
        asked = environment if given is None else {**environment, "PYTORCH_ENABLE_MPS_FALLBACK": given}
        done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected
