"""Candidates: ways to speculate, each with a split of the mesh."""

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from easyspec_jax.draft.grouping import paper_groups
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import (
    MAX_LEVELS,
    MAX_WIDTH,
    DraftTensorParallelSize,
    SpeculativeConfig,
    check_whole,
)
from easyspec_jax.parallel.mesh import MeshShape, parse_mesh
from easyspec_jax.tune.options import TuneConfig

LP_SIZES = (1, 2, 3, 4, 7)


@dataclass(frozen=True)
class Draft:
    """A draft as it lies on the devices.

    Attributes:
        shape: Split of the mesh.
        layout: SpeculativeConfig.weights_key of everything that drafts with it.
    """

    shape: MeshShape
    layout: SpeculativeConfig

    @property
    def lp_size(self) -> int:
        """Layers per group; 1 for an ordinary draft."""
        return self.layout.lp_size if self.layout.method == "easyspec" else 1

    @property
    def drafting(self) -> SpeculativeConfig:
        """Key of a draft's acceptance: equal for drafts that compute the same numbers."""
        return replace(self.layout, draft_tensor_parallel_size="all")


@dataclass(frozen=True)
class Candidate:
    """A way to speculate, and a split of the mesh."""

    shape: MeshShape
    speculative: SpeculativeConfig

    @property
    def draft(self) -> Draft:
        return Draft(self.shape, self.speculative.weights_key)


@dataclass(frozen=True)
class Space:
    """The axes along which candidates differ.

    Attributes:
        lp_sizes: Layers per group; 1 for an ordinary draft.
        tree_widths: Nodes per level; 1 for a chain.
        max_levels: Every depth from 1 to this is a candidate.
        draft_tensor_parallel_sizes: See SpeculativeConfig.
        mlp_lp_sizes: MLPs of a group that run at once, tried where that saves communication.
        refits: Sizes (lp_size, mlp_lp_size) that the draft has a refit for; it is then used.
    """

    lp_sizes: Sequence[int]
    tree_widths: Sequence[int] = TuneConfig.tree_widths
    max_levels: int = TuneConfig.max_levels
    draft_tensor_parallel_sizes: Sequence[DraftTensorParallelSize] = (
        TuneConfig.draft_tensor_parallel_sizes
    )
    mlp_lp_sizes: Sequence[int] = TuneConfig.mlp_lp_sizes
    refits: Set[tuple[int, int]] = frozenset()

    @classmethod
    def of(cls, num_layers: int, refits: Set[tuple[int, int]] = frozenset()) -> "Space":
        """Return the default space for a draft of this many layers with these refits."""
        fitting = [size for size in LP_SIZES if size <= num_layers]
        fitted = [lp_size for lp_size, _ in refits]
        return cls(sorted({*fitting, *fitted}), refits=refits)

    def check(self, num_layers: int) -> None:
        """Raise EasySpecError for a value that a draft of this many layers cannot have."""
        check_whole("max_levels", self.max_levels, 1, MAX_LEVELS)
        for width in self.tree_widths:
            check_whole("tree_widths", width, 1, MAX_WIDTH)
        for size in self.lp_sizes:
            check_whole("lp_sizes", size, 1, num_layers, ", the draft's layers")
        for size in self.mlp_lp_sizes:
            check_whole("mlp_lp_sizes", size, 1)

    def speculations(self, num_layers: int) -> list[SpeculativeConfig]:
        """Return every way to draft; of sizes that give the same groups only the first."""
        found: dict[Any, tuple[int, int]] = {}
        for size, most in product(sorted(self.lp_sizes), sorted(self.mlp_lp_sizes)):
            mlps = min(most, size)
            groups = paper_groups(num_layers, size)
            found.setdefault((groups, mlps, (size, mlps) in self.refits), (size, mlps))
        levels = range(1, self.max_levels + 1)
        axes = (found.values(), self.draft_tensor_parallel_sizes, self.tree_widths, levels)
        return [self._speculation(*values) for values in product(*axes)]

    def _speculation(
        self, sizes: tuple[int, int], tp: DraftTensorParallelSize, width: int, levels: int
    ) -> SpeculativeConfig:
        lp_size, mlp_lp_size = sizes
        shared = SpeculativeConfig(num_speculative_tokens=levels, draft_tensor_parallel_size=tp)
        if lp_size > 1:
            refit = "auto" if sizes in self.refits else "none"
            return replace(
                shared, lp_size=lp_size, mlp_lp_size=mlp_lp_size, refit=refit, tree_width=width
            )
        if width == 1:
            return replace(shared, method="sd")
        return replace(shared, method="tree", tree_width=width)


def splits(mesh: str, group_size: int) -> list[MeshShape]:
    """Return the shapes that a mesh allows for groups of this many layers, if it names none.

    A layer axis longer than a group would leave devices idle.

    Examples:
        >>> [shape.name for shape in splits("8", group_size=4)]
        ['layer=4,tensor=2', 'layer=2,tensor=4', 'layer=1,tensor=8']
    """
    if not re.fullmatch(r"\d+", mesh):
        return [parse_mesh(mesh)]
    devices = parse_mesh(mesh).size
    return [
        MeshShape(n, devices // n)
        for n in range(min(group_size, devices), 0, -1)
        if devices % n == 0
    ]


def candidates(mesh: str, num_layers: int, space: Space) -> list[Candidate]:
    """Return every split with every way to draft. Raises EasySpecError if there is none."""
    space.check(num_layers)
    found = []
    for speculative in space.speculations(num_layers):
        replicated = speculative.draft_tensor_parallel_size == "1"
        one_device = parse_mesh(mesh).size == 1
        # On one device both sizes mean the same.
        if replicated and one_device and "all" in space.draft_tensor_parallel_sizes:
            continue
        # MLPs that no collective follows gain nothing by running at once.
        if speculative.mlp_lp_size > min(space.mlp_lp_sizes) and (replicated or one_device):
            continue
        size = speculative.lp_size if speculative.method == "easyspec" else 1
        group = max(map(len, paper_groups(num_layers, size)))
        found += [Candidate(shape, speculative) for shape in splits(mesh, group)]
    if not found:
        raise EasySpecError("nothing to choose from: give at least one value of every list")
    return found
