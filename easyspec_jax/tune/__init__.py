"""Find the fastest way of decoding for a pair of models on the machine at hand, by measuring.

from easyspec_jax import open_model
from easyspec_jax.tune import TuneConfig, tune

pair = open_model("TARGET", "DRAFT", mesh="8")
tune(pair, TuneConfig(seconds=60)).store()
engine = open_model("TARGET", "DRAFT", mesh="8", speculative="tuned")
"""

from importlib import import_module
from typing import TYPE_CHECKING

from easyspec_jax.tune.options import TuneConfig

if TYPE_CHECKING:
    from easyspec_jax.tune.tuning import Tuned, tune

__all__ = ["TuneConfig", "Tuned", "tune"]


def __getattr__(name: str):
    # Imported on first use: importing JAX takes a second, which `--help` need not wait for.
    if name in __all__:
        return getattr(import_module(f"{__name__}.tuning"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
