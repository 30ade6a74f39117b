"""Conversion of Hugging Face directories and GGUF files into Orbax checkpoints, and back.

A model is converted once; the result opens straight into the shards of any mesh. Any checkpoint can
also be exported as a Hugging Face directory. `python -m convert --help` describes the command;
`convert.convert(source, out, ConvertConfig(...))` does the same from Python. `convert.fetch_pair`
fetches a known pair with pip first, as `easyspec pair` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.converting import ConvertConfig, convert
    from convert.pairs import fetch_pair

__all__ = ["ConvertConfig", "convert", "fetch_pair"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the libraries of a conversion take a second, which --help need not.
    if name in __all__:
        module = "convert.pairs" if name == "fetch_pair" else "convert.converting"
        return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
