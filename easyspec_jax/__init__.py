"""EasySpec on JAX: layer-parallel speculative decoding with exactly the target model's distribution."""

from typing import TYPE_CHECKING

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams, SpeculativeConfig

if TYPE_CHECKING:
    from easyspec_jax.engine import Completion, Engine, open_model

__all__ = ["Completion", "EasySpecError", "Engine", "SamplingParams", "SpeculativeConfig", "open_model"]


def __getattr__(name: str):
    # The engine imports JAX, which a command's --help need not wait for.
    if name in ("Completion", "Engine", "open_model"):
        from easyspec_jax import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
