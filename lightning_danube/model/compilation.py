"""What PyTorch's compiler needs on this machine."""

import importlib.util
import os
import shutil


def check_compiler(asked_by: str, instead: str) -> None:
    """Checks that there is a C++ compiler.

    Args:
        asked_by: the option that needs compiled code on a CPU.
        instead: what the user can do without the option.

    Raises:
        ValueError: there is no C++ compiler.
    """
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise ValueError(
            f"{asked_by} needs a C++ compiler on a CPU, and there is no {' or '.join(compilers)}: install one, name it "
            f"in CXX, or {instead}"
        )


def has_triton() -> bool:
    """Returns whether Triton is installed, which PyTorch for CUDA brings on Linux."""
    return importlib.util.find_spec("triton") is not None


def missing_for_gpu_code() -> str | None:
    """Returns what PyTorch's compiler lacks to make code for a GPU; None if nothing is missing."""
    if not has_triton():
        return "Triton"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    # Triton compiles a small C module at its first start.
    return None if any(map(shutil.which, compilers)) else f"C compiler ({' or '.join(compilers)})"
