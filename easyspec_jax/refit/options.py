"""Options of a refit, checked when they are made. Importing this module does not import JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from easyspec_jax.draft.grouping import Layout, layout_of
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams, SpeculativeConfig, check_choice, check_whole

Borders = Literal["measured", "paper"]
AnsweredBy = Literal["draft", "target"]


@dataclass(frozen=True)
class RefitConfig:
    """The groups to refit a draft for, the texts to fit on, and how to fit.

    Without `text` or `prompts` the draft writes the texts itself.

    Attributes:
        lp_size: Layers of the largest group.
        lp_strategy: Explicit groups such as "0,1-3,4-7x2", which override `lp_size`; their borders
            are kept.
        mlp_lp_size: MLPs of a group that run at once; on average, if borders are measured.
        borders: "measured" chooses the groups that cost least, with no more collectives and no more
            MLPs in a row than the paper's rule has. "paper" keeps the rule.
        text: A file to cut texts from.
        prompts: Prompts whose answers are the texts, ideally like those you will ask.
        answered_by: Model of the pair that answers the prompts. A draft continues what the target
            has written, so the target's answers are what it will see.
        chat: Wrap each prompt in the chat template.
        tokens: Tokens of all texts together; a file may hold fewer.
        temperature: Temperature at which the texts are written or the prompts answered.
        seed: Seed of these texts.
        ridge: Weight of the penalty for moving away from the plain projections.
        distill: Steps of gradient descent after the fit, towards the exact draft's distribution.
        resume: Begin with the refit in `out` instead of a fit, and distil that.
        out: Directory to keep the refit in. None is `refit/` in the draft's directory, where
            drafting finds it.

    Raises:
        EasySpecError: A value is out of range, or two options contradict each other. `refit` checks
            whatever depends on the draft.

    Examples:
        >>> RefitConfig(ridge=0)
        Traceback (most recent call last):
        ...
        easyspec_jax.errors.EasySpecError: `ridge` 0 must be a number above 0
    """

    lp_size: int = SpeculativeConfig.lp_size
    lp_strategy: str | None = None
    mlp_lp_size: int = SpeculativeConfig.mlp_lp_size
    borders: Borders = "measured"
    text: str | Path | None = None
    prompts: Sequence[str] | None = None
    answered_by: AnsweredBy = "draft"
    chat: bool = False
    tokens: int = 30_000
    temperature: float = 0.8
    seed: int = 0
    ridge: float = 0.03
    distill: int = 0
    resume: bool = False
    out: str | Path | None = None

    def __post_init__(self) -> None:
        # Decoding allows the same groups and temperatures, so the engine's options check them.
        self.speculative_config()
        self.sampling_params()
        check_whole("tokens", self.tokens, 1000)
        check_whole("distill", self.distill, 0)
        check_choice("borders", self.borders, get_args(Borders))
        check_choice("answered_by", self.answered_by, get_args(AnsweredBy))
        if isinstance(self.prompts, str):
            raise EasySpecError("`prompts` takes several prompts: put one into a list")
        if self.prompts is not None and not self.prompts:
            raise EasySpecError("`prompts` is empty; give at least one")
        if self.text is not None and self.prompts is not None:
            raise EasySpecError("`text` and `prompts` exclude each other; give one")
        if self.chat and self.prompts is None:
            raise EasySpecError("`chat` needs `prompts`; texts are taken as they are")
        if self.answered_by == "target" and self.prompts is None:
            raise EasySpecError("`answered_by` target needs `prompts` for the target to answer")
        if self.resume and not self.distill:
            raise EasySpecError("`resume` only continues a distillation: give `distill` STEPS")
        # Stated so that NaN fails too.
        if not 0 < self.ridge < float("inf"):
            raise EasySpecError(f"`ridge` {self.ridge} must be a number above 0")

    def speculative_config(self) -> SpeculativeConfig:
        """Return the options of a draft that these groups are for."""
        return SpeculativeConfig(
            lp_size=self.lp_size, lp_strategy=self.lp_strategy, mlp_lp_size=self.mlp_lp_size
        )

    def sampling_params(self) -> SamplingParams:
        """Return how the draft samples the texts it writes."""
        return SamplingParams(self.temperature, seed=self.seed)

    def layout(self, num_layers: int) -> Layout:
        """Group the layers of a draft as configured, before any border is measured.

        Raises:
            EasySpecError: The draft cannot have these groups, or all of them are single layers.

        Examples:
            >>> RefitConfig(lp_size=3).layout(num_layers=8).groups
            (range(0, 1), range(1, 3), range(3, 6), range(6, 7), range(7, 8))
        """
        layout = layout_of(self.speculative_config(), num_layers)
        if layout.lp_size == 1:
            raise EasySpecError(
                "in groups of one layer nothing is stale; give an `lp_size` of at least 2"
            )
        return layout
