"""How to draft and verify."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options.checks import check_choice, check_whole

Method = Literal["vanilla", "sd", "tree", "easyspec", "ngram"]
Verifier = Literal["rejection", "coupled", "block"]
DraftTensorParallelSize = Literal["1", "all"]

MAX_LEVELS = 16
"""Largest num_speculative_tokens."""

MAX_WIDTH = 64
"""Largest tree_width."""

MAX_LOOKUP = 32
"""Largest prompt_lookup_max."""


@dataclass(frozen=True)
class SpeculativeConfig:
    """How a round drafts and verifies.

    Attributes:
        method: "vanilla" decodes without a draft, "sd" drafts a chain and "tree" a tree with an
            ordinary draft, and "easyspec" runs groups of the draft's layers at once. "ngram" needs
            no draft: a chain is whatever followed the text's last tokens where they stood before.
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
        verifier: "rejection", "coupled", "block", or a verifier of your own (see
            easyspec_jax.verify), which is used at every temperature. None stands for rejection
            sampling of chains and coupled sampling of trees, which accept more on average. Method
            "ngram" accepts as much with either, and samples coupled.
        bit_stable: Run every pass of the target over `stable_rows` tokens, so that greedy and
            coupled texts are those of plain decoding in the same mode, in any type.
        prompt_lookup: Look up repeats in addition to what the draft drafts; they become another
            branch of the tree, or all of it where prompt_lookup_max tokens match. Method "ngram"
            does this without a draft.
        prompt_lookup_max: Tokens at the end of a text that are looked for at most.
        prompt_lookup_min: Tokens that must stand somewhere else at least. Where fewer do, a round
            of method "ngram" is a step of plain decoding.
        prompt_lookup_corpus: A file of text, UTF-8, in which repeats are looked up as well. The
            longer match counts.
        adapt: Choose for every round whether to draft, and how many levels, by what has been
            accepted and by the time that rounds take. Greedy and coupled texts do not depend on it.
            So with True the default verifier is the coupled one, and the others are refused. "auto"
            adapts just those texts that stay the same: greedy and coupled ones, in float32 (caches
            included) or bit-stable.
        confidence_threshold: Draft a level only where the best path to the level above has this
            probability under the draft, from 0 (always) to 1. The first level always is. "auto"
            learns it while decoding, and samples as `adapt` does.

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
    bit_stable: bool = False
    prompt_lookup: bool = False
    prompt_lookup_max: int = 16
    prompt_lookup_min: int = 2
    prompt_lookup_corpus: str | None = None
    adapt: bool | Literal["auto"] = False
    confidence_threshold: float | Literal["auto"] = 0.0

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        if isinstance(self.verifier, str):
            check_choice("verifier", self.verifier, get_args(Verifier))
        sizes = get_args(DraftTensorParallelSize)
        check_choice("draft_tensor_parallel_size", self.draft_tensor_parallel_size, sizes)
        check_whole("lp_size", self.lp_size, 1)
        check_whole("mlp_lp_size", self.mlp_lp_size, 1)
        self._check_tree()
        self._check_lookups()
        self._check_chains()
        if self.adapt not in (True, False, "auto"):
            raise EasySpecError(f"`adapt` {self.adapt!r} is not one of True, False, auto")
        if self.times_rounds and self.verifier in ("rejection", "block"):
            # Which round a token is drafted in decides its noise, so that such texts would depend
            # on timing and on the other texts of a batch.
            option = "`adapt`" if self.always_adapts else "`confidence_threshold` auto"
            raise EasySpecError(
                f"{option} cannot sample by {self.verifier}, whose texts depend on how many tokens "
                "a round drafts; leave out `verifier`, or take coupled"
            )

    def _check_tree(self) -> None:
        check_whole("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_LEVELS)
        check_whole("tree_width", self.width, 1, MAX_WIDTH)
        if self.method in ("vanilla", "sd", "ngram") and (
            self.width > 1 or self.tree_nodes is not None
        ):
            raise EasySpecError(
                f"`method` {self.method} grows no trees: leave out `tree_width` and `tree_nodes`"
            )
        if self.tree_nodes is not None:
            # Every level needs a node, or a drafted path would end before the last level.
            fewest = self.num_speculative_tokens
            most = fewest * self.width
            check_whole("tree_nodes", self.tree_nodes, fewest, most, ": one node a level to all")
        threshold = self.confidence_threshold
        if threshold != "auto" and (isinstance(threshold, str) or not 0 <= threshold <= 1):
            raise EasySpecError(
                f"`confidence_threshold` {threshold} must be a probability from 0 (draft every "
                "level) to 1, or auto"
            )

    def _check_lookups(self) -> None:
        if self.prompt_lookup and not self.needs_draft:
            raise EasySpecError(
                f"`prompt_lookup` adds to a draft's trees, which `method` {self.method} has not; "
                "`method` ngram looks up by itself"
            )
        if self.prompt_lookup and not self.calibration:
            raise EasySpecError(
                "`prompt_lookup` needs calibration: a draft has no KV of what was looked up"
            )
        if self.prompt_lookup_corpus is not None and not self.looks_up:
            raise EasySpecError(
                "`prompt_lookup_corpus` needs `prompt_lookup` or `method` ngram, which look it up"
            )
        longest = self.prompt_lookup_max
        check_whole("prompt_lookup_max", longest, 1, MAX_LOOKUP)
        check_whole(
            "prompt_lookup_min", self.prompt_lookup_min, 1, longest, ", `prompt_lookup_max`"
        )

    def _check_chains(self) -> None:
        if self.width == 1 and not self.prompt_lookup:
            return
        if self.bit_stable:
            # A branch's keys lie apart from its text's, so they would be summed in another order.
            raise EasySpecError(
                "`bit_stable` needs a chain: leave out `tree_width`, `method` tree and "
                "`prompt_lookup`"
            )
        if self.verifier == "block":
            raise EasySpecError(
                "`verifier` block is for chains: leave out `tree_width`, `method` tree and "
                "`prompt_lookup`, or take coupled"
            )

    @property
    def needs_draft(self) -> bool:
        """Whether a draft model drafts."""
        return self.method not in ("vanilla", "ngram")

    @property
    def looks_up(self) -> bool:
        """Whether repeats of the text are drafts."""
        return self.method == "ngram" or self.prompt_lookup

    @property
    def times_rounds(self) -> bool:
        """Whether rounds draft more or less by the time that earlier ones took, in any text."""
        return self.always_adapts or self.confidence_threshold == "auto"

    @property
    def always_adapts(self) -> bool:
        """Whether rounds adapt even where the text depends on it."""
        return bool(self.adapt) and self.adapt != "auto"

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
            confidence_threshold=0.0,
            calibration=True,
            verifier=None,
            bit_stable=False,
            prompt_lookup=False,
            prompt_lookup_max=SpeculativeConfig.prompt_lookup_max,
            prompt_lookup_min=SpeculativeConfig.prompt_lookup_min,
            prompt_lookup_corpus=None,
            adapt=False,
        )

    @property
    def width(self) -> int:
        """Nodes drafted per level; 1 is a chain."""
        if self.tree_width is not None:
            return self.tree_width
        return 4 if self.method == "tree" else 1

    @property
    def stable_rows(self) -> int | None:
        """Tokens of every pass of the target if texts are to be bit-stable, else None.

        A power of two that holds a drafted chain and the token before it. Plain decoding takes as
        many, so it must be given the same `num_speculative_tokens`.

        Examples:
            >>> SpeculativeConfig(num_speculative_tokens=5, bit_stable=True).stable_rows
            8
        """
        if not self.bit_stable:
            return None
        return max(8, 1 << self.num_speculative_tokens.bit_length())

    @property
    def chosen_verifier(self) -> Verifier | Hashable:
        """The verifier; at temperature 0 the greedy one takes the place of a named one."""
        if self.verifier is not None:
            return self.verifier
        # A token that is proposed with certainty is accepted with its probability under the target,
        # either way; but coupled texts do not depend on the draft.
        chain = self.width == 1 and self.needs_draft
        return "rejection" if chain and not self.times_rounds else "coupled"


def check_prefix_cache(prefix_cache: int, speculative: SpeculativeConfig) -> None:
    """Raise EasySpecError unless a store of prefixes has a size, and may be used."""
    check_whole("prefix_cache", prefix_cache, 0)
    if prefix_cache and speculative.bit_stable:
        raise EasySpecError(
            "`bit_stable` needs `prefix_cache` 0: passes of other sizes filled what is kept"
        )
