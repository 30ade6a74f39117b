"""Estimate how a pair of models fits a machine and how fast it decodes there.

Neither weights nor the machine's devices are needed:

    from easyspec_jax.plan import PlanConfig, plan

    found = plan("Llama-3.3-70B", "Llama-3.2-1B", PlanConfig("v5p:2x2x2", compile=False))
"""

from importlib import import_module
from typing import TYPE_CHECKING

from easyspec_jax.plan.options import PlanConfig

if TYPE_CHECKING:
    from easyspec_jax.plan.planning import Plan, plan

__all__ = ["Plan", "PlanConfig", "plan"]


def __getattr__(name: str):
    # Imported on first use: importing JAX takes a second, which `--help` need not wait for.
    if name in __all__:
        return getattr(import_module(f"{__name__}.planning"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
