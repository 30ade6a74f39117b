"""Candidates: ways to speculate, each on a split of the mesh."""

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from easyspec_jax.draft.grouping import paper_groups
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import DraftTensorParallelSize, SpeculativeConfig, check_whole
from easyspec_jax.parallel.mesh import MeshShape, parse_mesh

LP_SIZES = (1, 2, 3, 4, 7)


@dataclass(frozen=True)
class Draft:
    """A draft as it lies on the devices; layout: SpeculativeConfig.layout."""

    shape: MeshShape
    layout: SpeculativeConfig

    @property
    def lp_size(self) -> int:
        """Layers a group, 1 for an ordinary draft."""
        return self.layout.lp_size if self.layout.method == "easyspec" else 1

    @property
    def drafting(self) -> SpeculativeConfig:
        """Key of a draft's acceptance besides the tree: equal for drafts that compute the same numbers."""
        return replace(self.layout, draft_tensor_parallel_size="all")


@dataclass(frozen=True)
class Candidate:
    """A way to speculate, and a split of the mesh to do it on."""

    shape: MeshShape
    speculative: SpeculativeConfig

    @property
    def draft(self) -> Draft:
        return Draft(self.shape, self.speculative.weights_key)


@dataclass(frozen=True)
class Space:
    """The axes along which candidates differ.

    lp_sizes: layers a group, 1 for an ordinary draft; mlp_lp_sizes: MLPs of a group that run at once, tried where that
    saves communication; tree_widths: nodes a level, 1 for a chain; max_levels: the most tokens to draft ahead, of which
    every number from 1 on is a candidate. refits: sizes (lp_size, mlp_lp_size) that the draft has a refit for, which
    then is taken.
    """

    lp_sizes: Sequence[int]
    tree_widths: Sequence[int] = (1, 4, 8)
    max_levels: int = 8
    draft_tensor_parallel_sizes: Sequence[DraftTensorParallelSize] = ("all", "1")
    mlp_lp_sizes: Sequence[int] = (1, 2)
    refits: Set[tuple[int, int]] = frozenset()

    @classmethod
    def of(cls, num_layers: int, refits: Set[tuple[int, int]] = frozenset()) -> "Space":
        """Default space for a draft of this many layers with these refits."""
        sizes = {size for size in LP_SIZES if size <= num_layers} | {
            lp_size for lp_size, _ in refits
        }
        return cls(sorted(sizes), refits=refits)

    def check(self, num_layers: int) -> None:
        """Check a space against a draft's number of layers. Raises EasySpecError for what it cannot be."""
        check_whole("max_levels", self.max_levels, 1, 16)
        for width in self.tree_widths:
            SpeculativeConfig(tree_width=width)
        for size in self.lp_sizes:
            check_whole("lp_sizes", size, 1, num_layers, ", the draft's layers")
        for size in self.mlp_lp_sizes:
            check_whole("mlp_lp_sizes", size, 1)

    def speculations(self, num_layers: int) -> list[SpeculativeConfig]:
        """Every way to draft with this many layers; of sizes that give the same groups only the first."""
        found: dict[Any, tuple[int, int]] = {}
        for size, most in product(sorted(self.lp_sizes), sorted(self.mlp_lp_sizes)):
            mlps = min(most, size)
            found.setdefault(
                (paper_groups(num_layers, size), mlps, (size, mlps) in self.refits), (size, mlps)
            )
        axes = (
            found.values(),
            self.draft_tensor_parallel_sizes,
            self.tree_widths,
            range(1, self.max_levels + 1),
        )
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
        return (
            replace(shared, method="sd")
            if width == 1
            else replace(shared, method="tree", tree_width=width)
        )


def splits(mesh: str, group_size: int) -> list[MeshShape]:
    """The shapes that --mesh allows for groups of this many layers: one if it names one.

    A layer axis longer than a group would leave devices idle.
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
    """Every split with every way to draft. Raises EasySpecError if there is none."""
    space.check(num_layers)
    found = []
    for speculative in space.speculations(num_layers):
        replicated, one_device = (
            speculative.draft_tensor_parallel_size == "1",
            parse_mesh(mesh).size == 1,
        )
        if replicated and one_device and "all" in space.draft_tensor_parallel_sizes:
            continue  # on one device both are the same
        if speculative.mlp_lp_size > min(space.mlp_lp_sizes) and (replicated or one_device):
            continue  # MLPs that no collective follows gain nothing by running at once
        size = speculative.lp_size if speculative.method == "easyspec" else 1
        group = max(map(len, paper_groups(num_layers, size)))
        found += [Candidate(shape, speculative) for shape in splits(mesh, group)]
    if not found:
        raise EasySpecError("nothing to choose from: give at least one value of every list")
    return found
