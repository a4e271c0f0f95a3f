"""Generation: sampling, token streams, compiled steps, packed layers, text and conversations."""

from .compiled_steps import CompiledStep
from .sampling import GREEDY, Sampling, sample
from .token_stream import TokenStream, evaluation_mode, generate

__all__ = ["GREEDY", "CompiledStep", "Sampling", "TokenStream", "evaluation_mode", "generate", "sample"]
