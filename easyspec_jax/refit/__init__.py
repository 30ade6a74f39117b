"""Fit projections that keep a layer-parallel draft close to itself, in closed form.

A refit is a file of stand-ins for the projections that a group of layers feeds with stale inputs.
They add no latency. The target still verifies every token, so its distribution stays exact.

    from easyspec_jax import SpeculativeConfig, open_model
    from easyspec_jax.refit import RefitConfig, refit

    draft = open_model("DIR", speculative=SpeculativeConfig(method="vanilla"))
    fitted = refit(draft, RefitConfig(lp_size=4))
"""

from importlib import import_module
from typing import TYPE_CHECKING

from easyspec_jax.refit.options import RefitConfig

if TYPE_CHECKING:
    from easyspec_jax.refit.refitting import Refitted, refit

__all__ = ["RefitConfig", "Refitted", "refit"]


def __getattr__(name: str):
    # Imported on first use: importing JAX takes a second, which `--help` need not wait for.
    if name in __all__:
        return getattr(import_module(f"{__name__}.refitting"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
