"""EasySpec on JAX: layer-parallel speculative decoding with exactly the target's distribution.

Examples:
    The bundled pair completes a Python function on eight devices (virtual ones on a CPU)::

        from easyspec_jax import SamplingParams, open_model

        engine = open_model(mesh="8")
        for completion in engine.generate(["def main("], SamplingParams(max_new_tokens=32)):
            print(completion.text)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams, SpeculativeConfig

if TYPE_CHECKING:
    from easyspec_jax.engine.completion import Completion
    from easyspec_jax.engine.engine import Engine
    from easyspec_jax.engine.pair import open_model
    from easyspec_jax.tokenizer.conversation import Conversation

__all__ = [
    "Completion",
    "Conversation",
    "EasySpecError",
    "Engine",
    "SamplingParams",
    "SpeculativeConfig",
    "__version__",
    "open_model",
]

__version__ = "0.1.0"

_MODULES = {
    "Completion": "engine.completion",
    "Conversation": "tokenizer.conversation",
    "Engine": "engine.engine",
    "open_model": "engine.pair",
}
"""Modules of the names that are imported on first use, because importing JAX takes a second."""


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
