"""Verifiers: how a draft proposes tokens and how the target's distribution decides about them.

A new verifier is one class with the methods of `Verifier`, passed as `SpeculativeConfig.verifier`.
To give it a name on the command line, add it to `choose` and to the type `Verifier` of
options/speculative.py.
"""

from typing import Any

from easyspec_jax.options import SamplingParams
from easyspec_jax.verify.block import Block
from easyspec_jax.verify.coupled import Coupled
from easyspec_jax.verify.greedy import Greedy
from easyspec_jax.verify.rejection import Rejection
from easyspec_jax.verify.verifier import Branches, RowSampling, Verdict, Verifier

__all__ = [
    "Block",
    "Branches",
    "Coupled",
    "Greedy",
    "Rejection",
    "RowSampling",
    "Verdict",
    "Verifier",
    "choose",
]


def choose(verifier: Any, sampling: SamplingParams) -> Verifier:
    """Return a verifier by name, specialised to a request's sampling, or one as it is.

    Args:
        verifier: "rejection", "coupled" or "block"; anything else is a verifier already.
        sampling: Temperature, top-k and top-p. At temperature 0 every name means Greedy().

    Returns:
        The verifier.

    Examples:
        >>> choose("rejection", SamplingParams(temperature=0.8, top_p=0.9))
        Rejection(truncates=True)
        >>> choose("rejection", SamplingParams(temperature=0))
        Greedy()
    """
    if not isinstance(verifier, str):
        return verifier
    if sampling.temperature == 0:
        return Greedy()
    truncates = sampling.top_k > 0 or sampling.top_p < 1
    return {"rejection": Rejection, "coupled": Coupled, "block": Block}[verifier](truncates)
