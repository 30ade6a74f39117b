"""Choice of group borders: measure every candidate group alone, then search by dynamic programming.

Layers differ in how much it costs to run them at once. A layout is as fast as the paper's if it
has no more collectives, no larger group and no more MLPs in a row. The search finds the one among
them that minimises the sum of -log(overlap) over its groups, as if the groups' losses were
independent.

An overlap is measured on whole drafts of several tokens. A group also leaves inexact KV behind:
that costs nothing at the first depth, but a little more at every further one. Shallow depths count
more, because a token is kept only if all tokens before it are.
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
from easyspec_jax.model.device import run
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.transformer import Block, Decoder, Hidden, Layer
from easyspec_jax.progress import Advance, Bar, no_bar
from easyspec_jax.refit.fidelity import DEPTHS, overlap
from easyspec_jax.refit.fit import TEXTS_A_BATCH, embed, fit_attentions, fit_mlps
from easyspec_jax.refit.teacher import exact_window, sampled_positions, sampled_window

FITTED = 24
"""Most texts that candidates are fitted on."""

COMPARED = 16
"""Most texts that candidates are compared on; none of them is fitted on."""

EVERY = 16
"""Tokens between the starts of two drafts: neighbours say much the same, and each costs time."""

_CARRIED = 32
"""Most candidates that go through a layer in one call."""

Candidate = tuple[Group, int]
"""A group of two layers or more, and how many of its MLPs run at a time."""

Overlaps = Mapping[Candidate, float]
"""Σ min(p fuzzy, p exact) of a draft in which this group alone is fuzzy, and refit.

It is the geometric mean over the depths, each weighted by the number of tokens that depend on it.
"""

_Place = tuple[int, int]
"""A state of the search: turns of MLPs taken so far, and the first layer that has no group yet."""

_Found = tuple[float, Layout]
"""Sum of -log(overlap) over the groups of a layout, and the layout."""


def best_layout(overlaps: Overlaps, num_layers: int, lp_size: int, mlp_lp_size: int = 1) -> Layout:
    """Find the layout whose groups' overlaps have the greatest product.

    It takes no more turns of MLPs than `mlp_lp_size` at a time everywhere would, and makes no more
    collectives than that many turns and the paper's number of groups do together. So where more
    layers run together, others can run alone.

    Args:
        overlaps: Overlap of every candidate group; a single layer loses nothing.
        num_layers: Layers of the draft.
        lp_size: Layers of the largest candidate.
        mlp_lp_size: MLPs that run at a time, on average.

    Examples:
        The paper's rule makes five groups of six layers, 0 | 1 | 2-3 | 4 | 5, so one pair must run
        together:

        >>> overlaps = {(range(2, 4), 1): 0.9, (range(3, 5), 1): 0.95}
        >>> best_layout(overlaps, num_layers=6, lp_size=2).groups
        (range(0, 1), range(1, 2), range(2, 3), range(3, 5), range(5, 6))
    """
    most_turns = runs(num_layers, min(mlp_lp_size, lp_size))
    most_collectives = most_turns + len(paper_groups(num_layers, lp_size))
    # best[g] has the best layouts of g groups that cover the first layers, one for every place.
    best: list[dict[_Place, _Found]] = [{(0, 0): (0.0, Layout((), ()))}]
    while best[-1]:
        # A group makes one collective for its attentions and one for each turn of its MLPs.
        turns = min(most_turns, most_collectives - len(best))
        best.append(_with_another_group(best[-1], overlaps, num_layers, turns))
    whole: list[_Found] = []
    for reached in best:
        whole += [found for (_, end), found in reached.items() if end == num_layers]
    return min(whole, key=lambda found: found[0])[1]


def _with_another_group(
    best: Mapping[_Place, _Found], overlaps: Overlaps, num_layers: int, most_turns: int
) -> dict[_Place, _Found]:
    """Append every group that fits to every layout, and keep the best layout for each place."""
    reached: dict[_Place, _Found] = {}
    for (turns, begin), (loss, layout) in best.items():
        for (group, mlps), kept in _beginning(overlaps, begin):
            place = turns + runs(len(group), mlps), group.stop
            if place[0] > most_turns or group.stop > num_layers:
                continue
            total = loss - np.log(kept)
            least, _ = reached.get(place, (np.inf, None))
            if total < least:
                groups, sizes = (*layout.groups, group), (*layout.mlp_lp_sizes, mlps)
                reached[place] = total, Layout(groups, sizes)
    return reached


def _beginning(overlaps: Overlaps, begin: int) -> list[tuple[Candidate, float]]:
    """List the groups that begin with a layer, that layer alone first, and their overlaps."""
    found: list[tuple[Candidate, float]] = [((range(begin, begin + 1), 1), 1.0)]
    found += [item for item in overlaps.items() if item[0][0].start == begin]
    return found


def sizes_to_try(lp_size: int, mlp_lp_size: int) -> tuple[int, ...]:
    """Return the numbers of MLPs at a time that are worth measuring.

    One, the average asked for and a whole group are enough for a mixture to reach that average.

    Examples:
        >>> sizes_to_try(lp_size=4, mlp_lp_size=2)
        (1, 2, 4)
        >>> sizes_to_try(lp_size=4, mlp_lp_size=1)
        (1,)
    """
    return tuple(sorted({1, min(mlp_lp_size, lp_size), lp_size})) if mlp_lp_size > 1 else (1,)


def candidates(num_layers: int, lp_size: int, mlp_lp_sizes: Sequence[int]) -> set[Candidate]:
    """List what `measure_groups` measures.

    Examples:
        >>> sorted((*group, mlps) for group, mlps in candidates(3, 2, (1, 2)))
        [(0, 1, 1), (0, 1, 2), (1, 2, 1), (1, 2, 2)]
    """
    found: set[Candidate] = set()
    for size in range(2, lp_size + 1):
        for start in range(num_layers - size + 1):
            group = range(start, start + size)
            found |= {(group, min(size, mlps)) for mlps in mlp_lp_sizes}
    return found


def measure_groups(
    loader: Loader,
    lp_size: int,
    mlp_lp_sizes: Sequence[int],
    texts: Int[np.ndarray, "texts tokens"],
    ridge: float,
    bar: Bar = no_bar,
) -> Overlaps:
    """Measure the overlap of every group of 2 to lp_size layers, refit, all others being exact.

    Args:
        loader: Loader of the draft.
        lp_size: Layers of the largest group.
        mlp_lp_sizes: Numbers of MLPs at a time to measure each group with.
        texts: Token ids of at least two texts. The last ones are compared on, the others fitted on.
        ridge: As for `fit`.
        bar: Shows progress.
    """
    compared = min(COMPARED, len(texts) // 2)
    texts = texts[: FITTED + compared]
    layers = loader.config.num_hidden_layers
    # The fuzzy outputs of every candidate that has ended, carried on exactly to the last layer.
    carried: dict[Candidate, np.ndarray] = {}
    with TemporaryDirectory() as directory, bar("Measuring groups", 2 * layers) as advance:
        inputs = LayerInputs(Path(directory))
        inputs.fill(loader, texts, advance)
        for start in range(layers):
            exact = inputs[start][-compared:]
            _carry(loader, start, exact, carried)
            # A projection's fit depends on the group's first layer and on the MLPs' turns, but not
            # on where the group ends. So one fit of the largest group serves all its prefixes.
            largest = range(start, min(start + lp_size, layers))
            fed = _batches(inputs[start][:-compared])
            block = load_block(loader, largest)
            if isinstance(block, LayerGroup):
                attentions = fit_attentions(loader, largest, block, fed, ridge)
                for mlps in sorted({min(size, len(largest)) for size in mlp_lp_sizes}):
                    block.mlp_lp_size = mlps
                    fit_mlps(loader, largest, block, attentions, fed, ridge)
                    for size, h in enumerate(_alone(loader, block, exact), start=2):
                        carried[largest[:size], min(size, mlps)] = h
            advance(1)
        return _overlaps(loader, inputs[layers][-compared:], carried)


class LayerInputs:
    """Hidden states of the exact pass before every layer and after the last, on disk.

    Item i is float32 [texts, tokens, hidden], the input of layer i.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __getitem__(self, layer: int) -> Float[np.ndarray, "texts tokens hidden"]:
        return np.load(self._directory / f"{layer}.npy")

    def fill(
        self, loader: Loader, texts: Int[np.ndarray, "texts tokens"], advance: Advance
    ) -> None:
        """Run the model once over all texts, layer by layer."""
        states = list(embed(loader, texts))
        for layer in range(loader.config.num_hidden_layers + 1):
            np.save(self._directory / f"{layer}.npy", np.concatenate(states))
            if layer < loader.config.num_hidden_layers:
                block = loader.layer(layer)
                for number, h in enumerate(states):
                    states[number] = np.asarray(run(loader, _exact, block, (h,), P()), np.float32)
                advance(1)


def _exact(layer: Layer, config: ModelConfig, h: Hidden) -> Hidden:
    """Return one layer's outputs for whole texts."""
    batch, tokens = h.shape[:2]
    return layer(h, layer.init_cache(batch, tokens), exact_window(batch, tokens, tokens, config))[0]


def _alone(
    loader: Loader, block: Block, exact: Float[np.ndarray, "texts tokens hidden"]
) -> Float[np.ndarray, "sizes texts sampled hidden"]:
    """Run a group fuzzily on exact inputs; return the outputs of its first 2, 3, … layers."""
    batches = []
    for batch, _ in _batches(exact):
        fuzzy = run(loader, _through_prefixes, block, (batch,), P())
        batches.append(np.asarray(fuzzy, np.float32))
    return np.concatenate(batches, axis=1)


def _through_prefixes(
    block: LayerGroup, config: ModelConfig, h: Hidden
) -> Float[Array, "sizes batch sampled hidden"]:
    batch, tokens = h.shape[:2]
    # Of 2 · tokens entries the exact pass fills the first half; sampled drafts fill the second.
    cache = block.init_cache(batch, 2 * tokens)
    _, cache = block(h, cache, exact_window(batch, tokens, 2 * tokens, config))
    window = sampled_window(EVERY, DEPTHS, batch, tokens, 2 * tokens, config)
    drafted = h[:, sampled_positions(EVERY, DEPTHS, tokens)]
    # One pass over the whole group says what each MLP is fed, and so what any prefix comes to.
    _, _, fed = block.trace_fuzzy(drafted, cache, window)
    return jnp.stack([block.after(size, fed) for size in range(2, len(fed) + 1)])


def _batches(
    exact: Float[np.ndarray, "texts tokens hidden"],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut texts into batches for `fit_attentions`; exact and fuzzy inputs are still the same."""
    batches = []
    for first in range(0, len(exact), TEXTS_A_BATCH):
        batch = exact[first : first + TEXTS_A_BATCH]
        batches.append((batch, batch))
    return batches


def _carry(
    loader: Loader,
    layer: int,
    exact: Float[np.ndarray, "texts tokens hidden"],
    carried: dict[Candidate, np.ndarray],
) -> None:
    """Take the hidden states of all candidates that end before a layer through it."""
    passing = [candidate for candidate in carried if candidate[0].stop <= layer]
    block = loader.layer(layer)
    for first in range(0, len(passing), _CARRIED):
        some = passing[first : first + _CARRIED]
        streams = np.stack([carried[candidate] for candidate in some])
        # [some, texts, sampled, hidden] -> [_CARRIED, …]: one shape, so it compiles only once.
        missing = _CARRIED - len(some)
        streams = np.pad(streams, [(0, missing), (0, 0), (0, 0), (0, 0)])
        arrays = exact, streams, np.asarray(len(some))
        after = np.asarray(run(loader, _through_layer, block, arrays, P()), np.float32)
        for candidate, h in zip(some, after[: len(some)], strict=True):
            carried[candidate] = h


def _through_layer(
    layer: Layer,
    config: ModelConfig,
    exact: Hidden,
    streams: Float[Array, "streams texts sampled hidden"],
    count: Int[Array, ""],
) -> Float[Array, "streams texts sampled hidden"]:
    """Take the first `count` streams through a layer; the rest is padding and stays as it is."""
    batch, tokens = exact.shape[:2]
    cache = layer.init_cache(batch, 2 * tokens)
    _, cache = layer(exact, cache, exact_window(batch, tokens, 2 * tokens, config))
    window = sampled_window(EVERY, DEPTHS, batch, tokens, 2 * tokens, config)

    def through(stream: Int[Array, ""], streams: Array) -> Array:
        # Every stream starts from the same cache, which holds exact KV only.
        return streams.at[stream].set(layer(streams[stream], cache, window)[0])

    return jax.lax.fori_loop(0, count, through, streams)


def _overlaps(
    loader: Loader,
    exact: Float[np.ndarray, "texts tokens hidden"],
    carried: Mapping[Candidate, np.ndarray],
) -> Overlaps:
    """Compare the candidates' final hidden states with the exact ones, text by text."""
    decoder = loader.decoder(())
    texts = []
    for number, own in enumerate(exact):
        streams = np.stack([fuzzy[number] for fuzzy in carried.values()])
        sampled = own[sampled_positions(EVERY, DEPTHS, len(own))]
        texts.append(np.asarray(run(loader, _overlap, decoder, (sampled, streams), P())))
    by_depth = np.mean(texts, axis=0)  # [texts, candidates, depths] -> [candidates, depths]
    # A token at depth 1 of 4 takes all four with it if it is rejected: weights 4, 3, 2, 1.
    dependent = range(DEPTHS, 0, -1)
    means = np.exp(np.average(np.log(by_depth), axis=1, weights=dependent))
    return dict(zip(carried, means.tolist(), strict=True))


def _overlap(
    decoder: Decoder,
    config: ModelConfig,
    exact: Float[Array, "sampled hidden"],
    streams: Float[Array, "streams sampled hidden"],
) -> Float[Array, "streams depths"]:
    """Return each stream's mean overlap with the exact distribution, by depth."""

    def logits(h: Float[Array, "sampled hidden"]) -> Float[Array, "sampled vocab_shard"]:
        return decoder.logits(decoder.norm(h)[None])[0]

    expected = logits(exact)
    found = jax.lax.map(lambda h: overlap(expected, logits(h), decoder.axes), streams)
    # Positions lie chain by chain: [streams, chains * depths] -> [streams, chains, depths].
    return jnp.mean(found.reshape(len(streams), -1, DEPTHS), axis=1)
