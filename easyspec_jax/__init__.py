"""EasySpec on JAX: layer-parallel speculative decoding with exactly the target model's distribution."""

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
    "Completion", "Conversation", "EasySpecError", "Engine", "SamplingParams", "SpeculativeConfig", "open_model",
]  # fmt: skip

_MODULES = {
    "Completion": "engine.completion",
    "Conversation": "tokenizer.conversation",
    "Engine": "engine.engine",
    "open_model": "engine.pair",
}
"""Where each public name is that is imported when it is first used: importing JAX takes a second."""


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
