"""Verifiers: how a draft proposes tokens and how the target's distribution decides about them.

A new verifier is one module with the methods of `Verifier` and one line in `choose`.
"""

from easyspec_jax.options import SamplingParams
from easyspec_jax.verify.coupled import Coupled
from easyspec_jax.verify.greedy import Greedy
from easyspec_jax.verify.rejection import Rejection
from easyspec_jax.verify.verifier import Branches, RowSampling, Verdict, Verifier

__all__ = [
    "Branches",
    "Coupled",
    "Greedy",
    "Rejection",
    "RowSampling",
    "Verdict",
    "Verifier",
    "choose",
]


def choose(name: str, sampling: SamplingParams) -> Verifier:
    """Choose a verifier by name, specialised to a request's sampling.

    Args:
        name: "rejection" or "coupled".
        sampling: Temperature, top-k and top-p. At temperature 0 both names mean Greedy().

    Returns:
        The verifier.

    Examples:
        >>> choose("rejection", SamplingParams(temperature=0.8, top_p=0.9))
        Rejection(truncates=True)
        >>> choose("rejection", SamplingParams(temperature=0))
        Greedy()
    """
    if sampling.temperature == 0:
        return Greedy()
    truncates = sampling.top_k > 0 or sampling.top_p < 1
    return {"rejection": Rejection, "coupled": Coupled}[name](truncates)
