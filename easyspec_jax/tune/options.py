"""Options of tuning, checked when they are made. Importing this module does not import JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import DraftTensorParallelSize, check_whole

SECONDS = 150.0
"""Default time for measuring. Loading the target, and finishing the last text, come on top."""

MAX_NEW_TOKENS = 64
"""Default length of the texts to measure on."""


@dataclass(frozen=True)
class TuneConfig:
    """Candidates to try and time to measure them.

    Attributes:
        mesh: "8" tries all splits of eight devices, "layer=4,tensor=2" only that one. By default
            the splits of all devices of the pair.
        prompts: Prompts to measure on; by default a few of our own.
        chat: Put prompts that are text as a user's message.
        max_new_tokens: Length of each text.
        lp_sizes: Layers that run at once, 1 for an ordinary draft; by default 1, 2, 3, 4 and 7, and
            those that the draft has refits for.
        mlp_lp_sizes: MLPs of a group that run at once, where devices share them.
        tree_widths: Tokens drafted at each depth, 1 for a chain.
        max_levels: Depth of the deepest draft of a round.
        draft_tensor_parallel_sizes: See SpeculativeConfig.
        confirm: How many of the best predictions to run.
        seconds: Time for measuring; what is not reached is left out.

    Raises:
        EasySpecError: A value is out of range.
    """

    mesh: str | None = None
    prompts: Sequence[Any] | None = None
    chat: bool = False
    max_new_tokens: int = MAX_NEW_TOKENS
    lp_sizes: Sequence[int] | None = None
    mlp_lp_sizes: Sequence[int] = (1, 2)
    tree_widths: Sequence[int] = (1, 4, 8)
    max_levels: int = 8
    draft_tensor_parallel_sizes: Sequence[DraftTensorParallelSize] = ("all", "1")
    confirm: int = 3
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        check_whole("confirm", self.confirm, 1)
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("max_levels", self.max_levels, 1)
        if self.max_new_tokens <= self.max_levels:
            raise EasySpecError(
                f"`max_new_tokens` {self.max_new_tokens} must be more than `max_levels` "
                f"{self.max_levels}, or no text has room for the deepest draft"
            )
        if not 0 < self.seconds < float("inf"):
            raise EasySpecError(f"`seconds` {self.seconds} must be a number above 0")
        if self.prompts is not None and not self.prompts:
            raise EasySpecError("`prompts` is empty; leave it out to measure on the built-in ones")
        if self.chat and self.prompts is None:
            raise EasySpecError(
                "`chat` needs `prompts`; the built-in ones use the chat template if there is one"
            )
