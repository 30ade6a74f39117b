"""Choice of group borders: measured fidelity of every candidate alone, then dynamic programming.

Layers differ in how much it costs to run them at once. A layout of as many groups as the paper's rule makes, none of
them larger, with no more MLPs in a row, is as fast; the best of them is found by minimising the sum of -log(overlap)
over its groups, as if what groups lose alone were independent. Overlaps are those of whole drafts: what a group gets
wrong in the KV that it leaves behind costs nothing at the first depth, but the first depth is what all others hang on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.draft.grouping import Group, Layout, paper_groups, runs
from easyspec_jax.draft.layer_group import LayerGroup, load_block
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.norm import rms_norm
from easyspec_jax.model.transformer import Block, Decoder, Hidden, Layer
from easyspec_jax.progress import Advance, Bar, no_bar
from easyspec_jax.refit.device import run
from easyspec_jax.refit.fidelity import DEPTHS, overlap
from easyspec_jax.refit.fit import TEXTS_A_BATCH, embed, fit_attentions, fit_mlps
from easyspec_jax.refit.teacher import exact_window, sampled_positions, sampled_window

FITTED, COMPARED = 40, 32
"""Texts, at most, that candidates are fitted on, and others on which they are compared."""

EVERY = 16
"""Tokens from one draft to the next: neighbours tell the same, and carrying them takes the time."""

_CARRIED = 32  # candidates, at most, that go through a layer in one call

Candidate = tuple[Group, int]
"""A group of two layers or more, and how many of its MLPs run at a time."""

Overlaps = Mapping[Candidate, float]
"""What of the exact distribution is left if this group alone is fuzzy, refit: a geometric mean over the depths, each of
which counts as often as there are tokens that are lost with it."""


def best_layout(overlaps: Overlaps, num_layers: int, lp_size: int, mlp_lp_size: int = 1) -> Layout:
    """The layout of these candidates whose overlaps have the greatest product, with groups of at most lp_size layers.

    It has no more MLPs in a row than mlp_lp_size at a time would leave, and no more collectives than these in as many
    groups as paper_groups() makes: where more layers go together, others can go alone.
    """
    most = runs(num_layers, min(mlp_lp_size, lp_size))
    collectives = most + len(paper_groups(num_layers, lp_size))
    # By number of groups: the least loss over the layers before an end, by number of MLPs in a row.
    best: list[dict[tuple[int, int], tuple[float, Layout]]] = [{(0, 0): (0.0, Layout((), ()))}]
    while best[-1]:
        reached: dict[tuple[int, int], tuple[float, Layout]] = {}
        for (in_a_row, begin), (loss, layout) in best[-1].items():
            single = (range(begin, begin + 1), 1), 1.0
            for (group, mlps), kept in (single, *_beginning(overlaps, begin)):
                total, place = loss - np.log(kept), (in_a_row + runs(len(group), mlps), group.stop)
                fits = place[0] <= min(most, collectives - len(best)) and place[1] <= num_layers
                if fits and total < reached.get(place, (np.inf,))[0]:
                    reached[place] = (
                        total,
                        Layout((*layout.groups, group), (*layout.mlp_lp_sizes, mlps)),
                    )
        best.append(reached)
    whole = [found for behind in best for (_, end), found in behind.items() if end == num_layers]
    return min(whole, key=lambda found: found[0])[1]


def sizes_to_try(lp_size: int, mlp_lp_size: int) -> tuple[int, ...]:
    """How many MLPs at a time are worth trying where it is mlp_lp_size on average: one, so many, or a whole group."""
    return tuple(sorted({1, min(mlp_lp_size, lp_size), lp_size})) if mlp_lp_size > 1 else (1,)


def _beginning(overlaps: Overlaps, begin: int) -> list[tuple[Candidate, float]]:
    return [
        (candidate, kept) for candidate, kept in overlaps.items() if candidate[0].start == begin
    ]


def measure_groups(
    loader: Loader,
    lp_size: int,
    mlp_lp_sizes: Sequence[int],
    texts: Int[np.ndarray, "texts tokens"],
    ridge: float,
    bar: Bar = no_bar,
) -> Overlaps:
    """The overlap of every group of 2 to lp_size layers, by how many of its MLPs run at a time.

    texts: at least two, of which some are only compared on.
    """
    compared = min(COMPARED, len(texts) // 2)
    texts = texts[: FITTED + compared]
    layers = loader.config.num_hidden_layers
    carried: dict[Candidate, np.ndarray] = {}
    with TemporaryDirectory() as directory, bar("Measuring groups", 2 * layers) as advance:
        inputs = LayerInputs(Path(directory))
        inputs.fill(loader, texts, advance)
        for start in range(layers):
            exact = inputs[start][-compared:]
            _carry(loader, start, exact, carried)
            # Where a group ends does not matter to its projections.
            largest, fed = (
                range(start, min(start + lp_size, layers)),
                _batches(inputs[start][:-compared]),
            )
            block = load_block(loader, largest)
            if isinstance(block, LayerGroup):
                attentions = fit_attentions(loader, largest, block, fed, ridge)
                for mlps in sorted({min(size, len(largest)) for size in mlp_lp_sizes}):
                    block.mlp_lp_size = mlps
                    fit_mlps(loader, largest, block, attentions, fed, ridge)
                    found = zip(
                        range(2, len(largest) + 1), _alone(loader, block, exact), strict=True
                    )
                    carried |= {(largest[:size], min(size, mlps)): h for size, h in found}
            advance(1)
        return _overlaps(loader, inputs[layers][-compared:], carried)


class LayerInputs:
    """The exact pass's hidden states before every layer and after the last, on disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __getitem__(self, layer: int) -> Float[np.ndarray, "texts tokens hidden"]:
        return np.load(self._directory / f"{layer}.npy")

    def fill(
        self, loader: Loader, texts: Int[np.ndarray, "texts tokens"], advance: Advance
    ) -> None:
        """Goes through the model once."""
        states = list(embed(loader, texts))
        for layer in range(loader.config.num_hidden_layers + 1):
            np.save(self._directory / f"{layer}.npy", np.concatenate(states))
            if layer < loader.config.num_hidden_layers:
                block = loader.layer(layer)
                states = [
                    np.asarray(run(loader, _exact, block, (h,), P()), np.float32) for h in states
                ]
                advance(1)


def _exact(layer: Layer, config: ModelConfig, h: Hidden) -> Hidden:
    batch, tokens = h.shape[:2]
    return layer(h, layer.init_cache(batch, tokens), exact_window(batch, tokens, tokens, config))[0]


def _alone(
    loader: Loader, block: Block, exact: Float[np.ndarray, "texts tokens hidden"]
) -> Float[np.ndarray, "sizes texts sampled hidden"]:
    """Outputs of the fuzzy pass over the first two, three, … layers of a group that nothing fuzzy precedes."""
    fuzzy = [run(loader, _through_prefixes, block, (batch,), P()) for batch, _ in _batches(exact)]
    return np.concatenate([np.asarray(h, np.float32) for h in fuzzy], axis=1)


def _through_prefixes(
    block: LayerGroup, config: ModelConfig, h: Hidden
) -> Float[Array, "sizes batch sampled hidden"]:
    batch, tokens = h.shape[:2]
    _, cache = block(
        h, block.init_cache(batch, 2 * tokens), exact_window(batch, tokens, 2 * tokens, config)
    )
    window = sampled_window(EVERY, DEPTHS, batch, tokens, 2 * tokens, config)
    fed = block.trace_fuzzy(h[:, sampled_positions(EVERY, DEPTHS, tokens)], cache, window)[2]
    return jnp.stack([block.after(size, fed) for size in range(2, len(fed) + 1)])


def _batches(
    exact: Float[np.ndarray, "texts tokens hidden"],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs of the exact and the fuzzy pass where nothing before was fuzzy."""
    batches = (
        exact[first : first + TEXTS_A_BATCH] for first in range(0, len(exact), TEXTS_A_BATCH)
    )
    return [(batch, batch) for batch in batches]


def _carry(
    loader: Loader,
    layer: int,
    exact: Float[np.ndarray, "texts tokens hidden"],
    carried: dict[Candidate, np.ndarray],
) -> None:
    """Takes the candidates that end before a layer through it."""
    passing = [candidate for candidate in carried if candidate[0].stop <= layer]
    block = loader.layer(layer)
    for first in range(0, len(passing), _CARRIED):
        some = passing[first : first + _CARRIED]
        streams = np.stack([carried[candidate] for candidate in some])
        streams = np.pad(
            streams, [(0, _CARRIED - len(some)), *[(0, 0)] * 3]
        )  # one shape, compiled once
        arrays = exact, streams, np.asarray(len(some))
        after = np.asarray(run(loader, _through_layer, block, arrays, P()), np.float32)
        carried.update(zip(some, after, strict=False))


def _through_layer(
    layer: Layer,
    config: ModelConfig,
    exact: Hidden,
    streams: Float[Array, "streams texts sampled hidden"],
    count: Int[Array, ""],
) -> Float[Array, "streams texts sampled hidden"]:
    """The first `count` streams behind a layer."""
    batch, tokens = exact.shape[:2]
    cache = layer.init_cache(batch, 2 * tokens)
    _, cache = layer(exact, cache, exact_window(batch, tokens, 2 * tokens, config))
    window = sampled_window(EVERY, DEPTHS, batch, tokens, 2 * tokens, config)

    def through(stream: Int[Array, ""], streams: Array) -> Array:
        return streams.at[stream].set(layer(streams[stream], cache, window)[0])

    return jax.lax.fori_loop(0, count, through, streams)


def _overlaps(
    loader: Loader,
    exact: Float[np.ndarray, "texts tokens hidden"],
    carried: Mapping[Candidate, np.ndarray],
) -> Overlaps:
    decoder = loader.decoder(())
    texts = []
    for place, own in enumerate(exact):
        streams = np.stack([fuzzy[place] for fuzzy in carried.values()])
        sampled = own[sampled_positions(EVERY, DEPTHS, len(own))]
        texts.append(np.asarray(run(loader, _overlap, decoder, (sampled, streams), P())))
    of_depths = np.mean(texts, axis=0)
    hanging = range(DEPTHS, 0, -1)  # on each depth's token: itself and those behind it
    means = np.exp(np.average(np.log(of_depths), axis=1, weights=hanging))
    return dict(zip(carried, means.tolist(), strict=True))


def _overlap(
    decoder: Decoder,
    config: ModelConfig,
    exact: Float[Array, "sampled hidden"],
    streams: Float[Array, "streams sampled hidden"],
) -> Float[Array, "streams depths"]:
    def logits(h: Float[Array, "sampled hidden"]) -> Float[Array, "sampled vocab_shard"]:
        return decoder.logits(rms_norm(h, decoder.norm[...], config.rms_norm_eps)[None])[0]

    expected = logits(exact)
    found = jax.lax.map(lambda h: overlap(expected, logits(h), decoder.axes), streams)
    return jnp.mean(found.reshape(len(streams), -1, DEPTHS), axis=1)
