"""What there is to choose from: ways to speculate, each on a split of the mesh."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from easyspec_jax.draft.grouping import paper_groups
from easyspec_jax.errors import EasySpecError
from easyspec_jax.mesh import MeshShape, parse_mesh
from easyspec_jax.options import DraftTensorParallelSize, SpeculativeConfig, check_whole

LP_SIZES = (1, 2, 3, 4, 7)


@dataclass(frozen=True)
class Draft:
    """A draft as it lies on the devices; layout: SpeculativeConfig.layout."""

    shape: MeshShape
    layout: SpeculativeConfig

    @property
    def drafting(self) -> SpeculativeConfig:
        """What acceptance depends on besides the tree: equal for drafts that compute the same numbers."""
        return replace(self.layout, draft_tensor_parallel_size="all")


@dataclass(frozen=True)
class Candidate:
    """A way to speculate, and a split of the mesh to do it on."""

    shape: MeshShape
    speculative: SpeculativeConfig

    @property
    def draft(self) -> Draft:
        return Draft(self.shape, self.speculative.layout)


@dataclass(frozen=True)
class Space:
    """The axes along which candidates differ.

    lp_sizes: layers a group, 1 for an ordinary draft; tree_widths: nodes a level, 1 for a chain; max_levels: the most
    tokens to draft ahead, of which every number from 1 on is a candidate.
    """

    lp_sizes: Sequence[int]
    tree_widths: Sequence[int] = (1, 4, 8)
    max_levels: int = 8
    draft_tensor_parallel_sizes: Sequence[DraftTensorParallelSize] = ("all", "1")

    @classmethod
    def of(cls, num_layers: int) -> "Space":
        """What is tried by default for a draft of so many layers."""
        return cls([size for size in LP_SIZES if size <= num_layers])

    def check(self, num_layers: int) -> None:
        """Raises EasySpecError for what no draft of so many layers can be."""
        check_whole("max-levels", self.max_levels, 1, 16)
        for width in self.tree_widths:
            SpeculativeConfig(tree_width=width)
        for size in self.lp_sizes:
            check_whole("lp-sizes", size, 1, num_layers, ", the draft's layers")

    def speculations(self, num_layers: int) -> list[SpeculativeConfig]:
        """Every way to draft with so many layers; of sizes that give the same groups only the first."""
        sizes = {paper_groups(num_layers, size): size for size in sorted(self.lp_sizes, reverse=True)}.values()
        axes = sorted(sizes), self.draft_tensor_parallel_sizes, self.tree_widths, range(1, self.max_levels + 1)
        return [_speculation(*values) for values in product(*axes)]


def _speculation(lp_size: int, tp: DraftTensorParallelSize, width: int, levels: int) -> SpeculativeConfig:
    shared = SpeculativeConfig(num_speculative_tokens=levels, draft_tensor_parallel_size=tp)
    if lp_size > 1:
        return replace(shared, lp_size=lp_size, tree_width=width)
    return replace(shared, method="sd") if width == 1 else replace(shared, method="tree", tree_width=width)


def splits(mesh: str, group_size: int) -> list[MeshShape]:
    """The shapes that --mesh allows for groups of so many layers: one if it names one.

    A layer axis longer than a group would leave devices idle.
    """
    if not re.fullmatch(r"\d+", mesh):
        return [parse_mesh(mesh)]
    devices = parse_mesh(mesh).size
    return [MeshShape(n, devices // n) for n in range(min(group_size, devices), 0, -1) if devices % n == 0]


def candidates(mesh: str, num_layers: int, space: Space) -> list[Candidate]:
    """Every split with every way to draft. Raises EasySpecError if there is none."""
    space.check(num_layers)
    found = []
    for speculative in space.speculations(num_layers):
        replicated = speculative.draft_tensor_parallel_size == "1"
        if replicated and parse_mesh(mesh).size == 1 and "all" in space.draft_tensor_parallel_sizes:
            continue  # on one device both are the same
        size = speculative.lp_size if speculative.method == "easyspec" else 1
        group = max(map(len, paper_groups(num_layers, size)))
        found += [Candidate(shape, speculative) for shape in splits(mesh, group)]
    if not found:
        raise EasySpecError("nothing to choose from: give at least one value of every list")
    return found
