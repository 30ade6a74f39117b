"""Conversion of Hugging Face directories and GGUF files into Orbax checkpoints, and back.

A model is converted once; the result opens straight into the shards of any mesh. Any checkpoint can
also be exported as a Hugging Face directory. `python -m convert --help` describes the command;
`convert.convert(source, out, ConvertConfig(...))` does the same from Python.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.converting import ConvertConfig, convert

__all__ = ["ConvertConfig", "convert"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the libraries of a conversion take a second, which --help need not.
    if name in __all__:
        return getattr(import_module("convert.converting"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
