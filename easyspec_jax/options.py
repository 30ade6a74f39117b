"""Options of decoding: how to speculate, how to sample, on which platform and in which type.

Every value is checked when an option object is made. Messages name fields in backticks, which the
commands replace by their flags: `top_p` becomes --top-p.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, SupportsIndex, get_args

from easyspec_jax.errors import EasySpecError

Method = Literal["vanilla", "sd", "tree", "easyspec"]
Verifier = Literal["rejection", "coupled"]
DraftTensorParallelSize = Literal["1", "all"]
Platform = Literal["cpu", "gpu", "tpu"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
FLOAT_DTYPES = get_args(DType)[1:]
KVDType = Literal["auto", "int8"]
"""Types that key-value caches can be kept in; "auto" is the one that is computed in."""

Weights = Literal["bfloat16", "int8", "int4"]
"""Types that matrices can be kept in, apart from the one that is computed in."""

MAX_LEVELS = 16
"""Largest num_speculative_tokens."""

MAX_WIDTH = 64
"""Largest tree_width."""


@dataclass(frozen=True)
class SpeculativeConfig:
    """How a round drafts and verifies.

    Attributes:
        method: "vanilla" decodes without a draft, "sd" drafts a chain and "tree" a tree with an
            ordinary draft, and "easyspec" runs groups of the draft's layers at once.
        num_speculative_tokens: Levels drafted per round.
        tree_width: Nodes per level. None stands for 1, a chain, or for 4 with method "tree".
        tree_nodes: How many of a tree's nodes, the likeliest, the target verifies. None: all.
        lp_size: Layers per group, for the paper's grouping rule.
        lp_strategy: Explicit groups such as "0,1-3,4-7x2", which override lp_size.
        mlp_lp_size: MLPs of a group that run at once, for groups whose strategy does not say.
        refit: "auto" uses projections refitted for these groups if the draft's directory holds
            them, "none" never does, and anything else is a directory that must hold them.
        calibration: Rebuild the draft's exact KV cache after every round.
        draft_tensor_parallel_size: Replicate ("1") the parts of the draft that are not
            layer-parallel, or split them over all devices ("all").
        verifier: "rejection", "coupled", or a verifier of your own (see easyspec_jax.verify), which
            is used at every temperature. None stands for rejection sampling of chains and coupled
            sampling of trees, which accept more on average.

    Raises:
        EasySpecError: A value is out of range, or two of them conflict.

    Examples:
        >>> SpeculativeConfig(method="tree").width
        4
    """

    method: Method = "easyspec"
    num_speculative_tokens: int = 5
    tree_width: int | None = None
    tree_nodes: int | None = None
    lp_size: int = 4
    lp_strategy: str | None = None
    mlp_lp_size: int = 1
    refit: str = "auto"
    calibration: bool = True
    draft_tensor_parallel_size: DraftTensorParallelSize = "all"
    verifier: Verifier | Hashable | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        if isinstance(self.verifier, str):
            check_choice("verifier", self.verifier, get_args(Verifier))
        sizes = get_args(DraftTensorParallelSize)
        check_choice("draft_tensor_parallel_size", self.draft_tensor_parallel_size, sizes)
        check_whole("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_LEVELS)
        check_whole("tree_width", self.width, 1, MAX_WIDTH)
        if self.method in ("vanilla", "sd") and (self.width > 1 or self.tree_nodes is not None):
            raise EasySpecError(
                f"`method` {self.method} grows no trees: leave out `tree_width` and `tree_nodes`"
            )
        if self.tree_nodes is not None:
            # Every level needs a node, or a drafted path would end before the last level.
            fewest = self.num_speculative_tokens
            most = fewest * self.width
            check_whole("tree_nodes", self.tree_nodes, fewest, most, ": one node a level to all")
        check_whole("lp_size", self.lp_size, 1)
        check_whole("mlp_lp_size", self.mlp_lp_size, 1)

    @property
    def weights_key(self) -> Self:
        """A configuration equal to that of any other that needs the same draft weights.

        Equal keys on the same mesh mean the same arrays in the same places, so engines can share
        them. What only changes how a round drafts or verifies is set to one value for all.
        """
        return replace(
            self,
            method="sd" if self.method == "tree" else self.method,
            num_speculative_tokens=1,
            tree_width=None,
            tree_nodes=None,
            calibration=True,
            verifier=None,
        )

    @property
    def width(self) -> int:
        """Nodes drafted per level; 1 is a chain."""
        if self.tree_width is not None:
            return self.tree_width
        return 4 if self.method == "tree" else 1

    @property
    def chosen_verifier(self) -> Verifier | Hashable:
        """The verifier; at temperature 0 the greedy one takes the place of a named one."""
        if self.verifier is not None:
            return self.verifier
        return "rejection" if self.width == 1 else "coupled"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen: the distribution that speculation preserves.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep only the likeliest ids; 0 keeps all.
        top_p: After top_k, keep the likeliest ids up to this probability; 1 keeps all.
        seed: Determines the noise of a request, 0 <= seed < 2**32.
        max_new_tokens: Tokens to generate at most, a stop token included.
        stop: Strings that end a text. It is cut before the one that is completed first.

    Raises:
        EasySpecError: A value is out of range.

    Examples:
        >>> SamplingParams(temperature=0.8, top_p=0.95, seed=1).max_new_tokens
        128
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Logits divided by less than 0.001 can overflow float32.
        if self.temperature != 0 and not 1e-3 <= self.temperature < float("inf"):
            raise EasySpecError(
                f"`temperature` {self.temperature} must be 0 (greedy) or a number of at least 0.001"
            )
        check_whole("top_k", self.top_k, 0, 2**31 - 1, " ids (0: all)")
        if not 0 < self.top_p <= 1:
            raise EasySpecError(
                f"`top_p` {self.top_p} must be a probability above 0, up to 1 (all)"
            )
        check_whole("seed", self.seed, 0, 2**32 - 1)
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        if isinstance(self.stop, str):
            raise EasySpecError("`stop` takes several strings: put one into a tuple")
        if not all(self.stop):
            raise EasySpecError("`stop` '' would end every text; give at least one character")


def resolve_dtype(requested: DType, platform: str, stored: str) -> str:
    """Choose the type to compute in.

    Args:
        requested: The user's choice. "auto" is the checkpoint's type, but float32 on a CPU, where
            XLA has no fast products of narrower types.
        platform: JAX's name of the devices' platform.
        stored: The checkpoint's type.

    Raises:
        EasySpecError: The type is not one of FLOAT_DTYPES.

    Examples:
        >>> resolve_dtype("auto", "gpu", "bfloat16")
        'bfloat16'
    """
    if requested != "auto":
        check_choice("dtype", requested, FLOAT_DTYPES)
        return requested
    if platform == "cpu":
        return "float32"
    if stored not in FLOAT_DTYPES:
        raise EasySpecError(f"the checkpoint's dtype {stored!r} is not supported; give `dtype`")
    return stored


def check_weights(weights: Weights | None, draft_weights: Weights | None) -> None:
    """Raise EasySpecError unless each is None or one of Weights."""
    for field, value in (("weights", weights), ("draft_weights", draft_weights)):
        if value is not None:
            check_choice(field, value, get_args(Weights))


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise EasySpecError unless a field's value is one of some choices."""
    if value not in choices:
        raise EasySpecError(f"`{field}` {value!r} is not one of {', '.join(choices)}")


def check_whole(
    field: str, value: Any, least: int, most: int | None = None, note: str = ""
) -> None:
    """Raise EasySpecError unless a field's value is a whole number within bounds.

    Args:
        field: The field's name.
        value: Its value, of any type.
        least: The smallest value allowed.
        most: The largest one, or None.
        note: What the message says after the bounds.

    Raises:
        EasySpecError: The value is not a whole number, or out of bounds.
    """
    if not isinstance(value, SupportsIndex):
        raise EasySpecError(f"`{field}` {value!r} must be a whole number")
    if value.__index__() < least or (most is not None and value.__index__() > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise EasySpecError(f"`{field}` {value} must be {limits}{note}")
