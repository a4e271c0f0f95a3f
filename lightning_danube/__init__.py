"""The H2O-Danube3 recipe as a PyTorch Lightning laboratory.

    import lightning_danube as danube

    print(danube.load("smollm2").generate("The capital of France is"))
    run = danube.fit("quickstart", trainer={"max_steps": 100})
    print(run.summary["val_loss"])

Names are imported when they are first used: torch and Lightning take seconds to import.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_danube.cli.python import Run, fit
    from lightning_danube.generation.language_model import LanguageModel, load
    from lightning_danube.model import Decoder, DecoderConfig
    from lightning_danube.training.trainer import make_trainer

__all__ = ["Decoder", "DecoderConfig", "LanguageModel", "Run", "__version__", "fit", "load", "make_trainer"]

# torch reads these once, when it is loaded. By default, OpenMP threads that wait for work spin a hundred times as long;
# where a core has something else to do as well, a step then takes a quarter longer. No spinning at all would be better
# still there, but costs a quarter on an idle machine (docs/speed.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    # CUDA's allocator lets its segments grow. Otherwise rows of new lengths leave holes that no later tensor fits into.
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
if sys.platform == "darwin":
    # What MPS cannot compute goes to the CPU, with a warning.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a `__getattr__` for a package (PEP 562) that imports a public name when it is first used.

    The rooms use it because torch, Lightning and transformers take seconds to import.

    Args:
        package: dotted name of the package.
        modules: public name → the package's module that defines it.
    """

    def __getattr__(name: str) -> Any:
        if name in modules:
            return getattr(import_module(f"{package}.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


_PLACES = {
    "Decoder": "model",
    "DecoderConfig": "model",
    "LanguageModel": "generation.language_model",
    "Run": "cli.python",
    "fit": "cli.python",
    "load": "generation.language_model",
    "make_trainer": "training.trainer",
}
_public = lazy_attributes(__name__, _PLACES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lightning-danube")
    return _public(name)
