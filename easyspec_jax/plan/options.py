"""Options of a plan, checked when they are made. Importing this module does not import JAX."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from easyspec_jax.options import (
    DraftTensorParallelSize,
    DType,
    KVDType,
    SpeculativeConfig,
    Weights,
    check_choice,
    check_weights,
)
from easyspec_jax.plan.machines import parse_topology

LP_SIZES = (2, 4, 7)
"""Sizes of layer-parallel groups that every plan compares."""

PROMPT_LENGTH = 2048
"""Tokens of the prompt that a plan prefills, unless `max_length` leaves room for fewer."""


@dataclass(frozen=True)
class PlanConfig:
    """The machine to plan for and the way of decoding to compile for it.

    A plan always compares plain decoding, an ordinary draft and layer-parallel groups of LP_SIZES
    layers, each with a replicated and with a split draft. `lp_size`, `mlp_lp_size`,
    `draft_tensor_parallel_size` and `refit` choose the layer-parallel round that is compiled.

    Attributes:
        topology: Devices by machine and number or torus, as `parse_topology` takes them.
        mesh: "layer=4,tensor=2", with as many devices as the topology has. None: the layer axis is
            the largest divisor of the number of devices that a group can fill.
        dtype: Type to compute in. "auto" is float32 on a CPU, else the target's own.
        weights: Type of the target's matrices; None for `dtype`.
        draft_weights: Likewise of the draft's.
        kv_dtype: Type of caches; "auto" is `dtype`.
        max_length: Most tokens of a text, its prompt included.
        num_speculative_tokens: Levels drafted per round.
        tree_width: Nodes per level; 1 is a chain.
        lp_size: Layers per group, compared in addition to LP_SIZES.
        mlp_lp_size: MLPs of a group that run at once.
        draft_tensor_parallel_size: Replicate ("1") the parts of the draft that are not
            layer-parallel, or split them over all devices ("all").
        refit: Count the projections of a refit in addition to the draft's own.
        measure: Measure the figures of the machine on this host's devices instead of taking them
            from the table.
        acceptance: Acceptance of the pair's drafts by depth, measured by `experiments.acceptance`
            or by `tune --json`. With it, the plan also looks for the best number of levels, tree
            width, groups and placement among all that the file has.
        compile: Compile the round, which takes up to minutes, to learn its memory for temporaries.

    Raises:
        EasySpecError: The topology is unknown or a number is out of range. `plan` checks whatever
            depends on the models.

    Examples:
        >>> config = PlanConfig("v5p:2x2x2", max_length=4096, compile=False)
        >>> config.lp_size, config.tree_width
        (4, 1)
    """

    topology: str
    mesh: str | None = None
    dtype: DType = "auto"
    weights: Weights | None = None
    draft_weights: Weights | None = None
    kv_dtype: KVDType = "auto"
    max_length: int = 3072
    num_speculative_tokens: int = SpeculativeConfig.num_speculative_tokens
    tree_width: int = 1
    lp_size: int = SpeculativeConfig.lp_size
    mlp_lp_size: int = SpeculativeConfig.mlp_lp_size
    draft_tensor_parallel_size: DraftTensorParallelSize = (
        SpeculativeConfig.draft_tensor_parallel_size
    )
    refit: bool = False
    measure: bool = False
    acceptance: str | Path | None = None
    compile: bool = True

    def __post_init__(self) -> None:
        parse_topology(self.topology)
        check_weights(self.weights, self.draft_weights)
        check_choice("kv_dtype", self.kv_dtype, get_args(KVDType))
        # Decoding and planning allow the same ranges, so the engine's options check them.
        SpeculativeConfig(
            num_speculative_tokens=self.num_speculative_tokens,
            tree_width=self.tree_width,
            lp_size=self.lp_size,
            mlp_lp_size=self.mlp_lp_size,
            draft_tensor_parallel_size=self.draft_tensor_parallel_size,
        )
