"""Verifiers: how a draft proposes tokens and how the target's distribution decides about them.

A new verifier is one module with the two methods of `Verifier` and one line in `choose`.
"""

from easyspec_jax.verify.base import Request, Verdict, Verifier
from easyspec_jax.verify.greedy import Greedy
from easyspec_jax.verify.rejection import Rejection

__all__ = ["Greedy", "Rejection", "Request", "Verdict", "Verifier", "choose"]


def choose(temperature: float) -> Verifier:
    """The verifier for a temperature: at 0 every one is the same comparison with the arg-max."""
    return Greedy() if temperature == 0 else Rejection()
