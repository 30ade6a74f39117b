"""Options: how to speculate, how to sample, where and in what type to compute."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self, SupportsIndex, get_args

from easyspec_jax.errors import EasySpecError

Method = Literal["vanilla", "sd", "tree", "easyspec"]
Verifier = Literal["rejection", "coupled"]
DraftTensorParallelSize = Literal["1", "all"]
Platform = Literal["cpu", "gpu", "tpu"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
FLOAT_DTYPES = get_args(DType)[1:]

MAX_WIDTH = 64


@dataclass(frozen=True)
class SpeculativeConfig:
    """How a round drafts and verifies.

    num_speculative_tokens: levels drafted per round. tree_width: nodes a level, of which the best tree_nodes are
    verified; None stands for a chain, or 4 with method "tree", and for all of them. lp_size: layers a group, for the
    paper's grouping rule; lp_strategy: explicit groups such as "0,1-3,4-7x2", which override lp_size; mlp_lp_size: how
    many MLPs of a group run at once, where a strategy does not say. refit: "auto" takes projections refitted for these
    groups where the draft's directory holds them, "none" does not, and anything else is a directory that must.
    calibration: rebuild exact draft KV every round. draft_tensor_parallel_size: whatever of the draft is not
    layer-parallel is replicated ("1") or split over all devices ("all"). verifier: None stands for rejection sampling
    of chains and coupled sampling of trees, which accept more on average.
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
    verifier: Verifier | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_choice("verifier", self.chosen_verifier, get_args(Verifier))
        check_choice(
            "draft-tensor-parallel-size",
            self.draft_tensor_parallel_size,
            get_args(DraftTensorParallelSize),
        )
        check_whole("num-speculative-tokens", self.num_speculative_tokens, 1, 16)
        check_whole("tree-width", self.width, 1, MAX_WIDTH)
        if self.method in ("vanilla", "sd") and (self.width > 1 or self.tree_nodes is not None):
            raise EasySpecError(
                f"--method {self.method} grows no trees: leave out --tree-width and --tree-nodes"
            )
        if self.tree_nodes is not None:
            levels = self.num_speculative_tokens
            check_whole(
                "tree-nodes",
                self.tree_nodes,
                levels,
                levels * self.width,
                ": one node a level to all",
            )
        check_whole("lp-size", self.lp_size, 1)
        check_whole("mlp-lp-size", self.mlp_lp_size, 1)

    @property
    def weights_key(self) -> Self:
        """Equal for two configurations if the draft's weights, and their places on a mesh, are."""
        method = "sd" if self.method == "tree" else self.method
        chain = replace(
            self, method=method, num_speculative_tokens=1, tree_width=None, tree_nodes=None
        )
        return replace(chain, calibration=True, verifier=None)

    @property
    def width(self) -> int:
        """Nodes drafted a level."""
        return self.tree_width if self.tree_width is not None else 4 if self.method == "tree" else 1

    @property
    def chosen_verifier(self) -> Verifier:
        """The verifier where the temperature is above 0."""
        if self.verifier is not None:
            return self.verifier
        return "rejection" if self.width == 1 else "coupled"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; the distribution that speculation preserves.

    temperature 0 is greedy. top_k and then top_p keep only the likeliest ids; 0 and 1 keep all. max_new_tokens counts
    generated tokens, the stop token included. seed: the request's noise, 0 <= seed < 2**32. stop: strings that end the
    text, which is cut before the one completed first.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-3 <= self.temperature < float(
            "inf"
        ):  # below, logits overflow float32
            raise EasySpecError(
                f"--temperature {self.temperature} must be 0 (greedy) or a number of at least 0.001"
            )
        check_whole("top-k", self.top_k, 0, 2**31 - 1, " ids (0: all)")
        if not 0 < self.top_p <= 1:
            raise EasySpecError(
                f"--top-p {self.top_p} must be a probability above 0, up to 1 (all)"
            )
        check_whole("seed", self.seed, 0, 2**32 - 1)
        check_whole("max-new-tokens", self.max_new_tokens, 1)
        if isinstance(self.stop, str):
            raise EasySpecError("stop takes several strings: put one into a tuple")
        if not all(self.stop):
            raise EasySpecError("--stop '' would end every text; give at least one character")


def resolve_dtype(requested: DType, platform: str, stored: str) -> str:
    """Choose the type to compute in: the one requested or, for "auto", the checkpoint's, but float32 on a CPU.

    Args:
        requested: What the user asks for.
        platform: JAX's name of the devices' platform.
        stored: The checkpoint's type.

    Raises:
        EasySpecError: That is not one of FLOAT_DTYPES.
    """
    if requested != "auto":
        check_choice("dtype", requested, FLOAT_DTYPES)
        return requested
    if platform == "cpu":  # where XLA has no fast products of narrower types
        return "float32"
    if stored not in FLOAT_DTYPES:
        raise EasySpecError(f"the checkpoint's dtype {stored!r} is not supported; give --dtype")
    return stored


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises EasySpecError if value is none of choices; name is the flag without dashes."""
    if value not in choices:
        raise EasySpecError(f"--{name} {value!r} is not one of {', '.join(choices)}")


def check_whole(name: str, value: Any, least: int, most: int | None = None, note: str = "") -> None:
    """Raise EasySpecError unless value is a whole number from least to most; name is the flag without dashes."""
    if not isinstance(value, SupportsIndex):
        raise EasySpecError(f"--{name} {value!r} must be a whole number")
    if value.__index__() < least or (most is not None and value.__index__() > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise EasySpecError(f"--{name} {value} must be {limits}{note}")
