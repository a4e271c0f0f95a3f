"""What PyTorch's compiler needs on this machine."""

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
