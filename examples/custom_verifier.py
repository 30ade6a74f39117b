"""Decode with a verifier of your own.

    python examples/custom_verifier.py [TARGET DRAFT]

A verifier says how the draft proposes tokens and which of them the target accepts. The ones that
come with the package keep the target's distribution. This one gives up some of it for speed: it
accepts a drafted token that the target likes *almost* as well as its favourite, as in typical
acceptance (Medusa, arXiv 2401.10774).
"""

import sys
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.sampling.vocabulary import choice, normaliser, take
from easyspec_jax.verify import Greedy, RowSampling, Verdict
from easyspec_jax.verify.tree import Tree, deepest

PROMPT = "def read_lines(path):\n"


# A verifier is part of the compiled program, so it must be hashable: a frozen dataclass is.
@dataclass(frozen=True)
class Lenient(Greedy):
    """Accept a token whose logit is at most `margin` below the target's best.

    With a margin of 0 this is greedy decoding. `Greedy` supplies the other two methods of the
    `Verifier` protocol, `candidates` and `branch`, which grow the tree from the draft's likeliest
    tokens.
    """

    margin: float = 0.0

    def verify(
        self,
        target: Float[Array, "batch nodes vocab_shard"],
        tree: Tree,
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Verdict:
        # This runs on every device at once, inside `shard_map`: each holds a slice of the
        # vocabulary, and the functions of `sampling.vocabulary` talk to the others.
        batch, nodes = tree.tokens.shape
        rows = target.reshape(batch * nodes, -1)
        greatest, _ = normaliser(rows, ALL_AXES)
        greatest = greatest.reshape(batch, nodes)
        favourite = choice(rows, ALL_AXES).reshape(batch, nodes)

        # A node's token follows its parent, so the parent's row of logits decides about it.
        #   tree:   root ── a ── b        tree.parent: [0, 0, 1]
        #   rows read for [root, a, b]:   [root, root, a]   (the root passes anyway)
        of_parent = jnp.take_along_axis(target, tree.parent[:, :, None], axis=1)
        offered = take(of_parent.reshape(rows.shape), tree.tokens.reshape(-1, 1), ALL_AXES)
        best = jnp.take_along_axis(greatest, tree.parent, axis=1)
        accept = offered.reshape(batch, nodes) >= best - self.margin

        # The deepest node whose whole path was accepted, and the target's token after that.
        leaf = deepest(tree, accept)
        return Verdict(leaf, jnp.take_along_axis(favourite, leaf[:, None], axis=1)[:, 0])


def main(target: str | None = None, draft: str | None = None) -> None:
    for margin in (0.0, 2.0):
        speculative = SpeculativeConfig(verifier=Lenient(margin))
        engine = open_model(target, draft, speculative=speculative)
        for completion in engine.generate([PROMPT], SamplingParams(max_new_tokens=24)):
            length = completion.stats.mean_acceptance_length
            print(f"margin {margin}: {length:.2f} tokens per pass of the target")
            print(PROMPT + completion.text, end="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
