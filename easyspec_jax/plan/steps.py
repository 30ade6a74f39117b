"""Cost of the steps of every way of decoding, from traces of the engine's own programs."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.round import append_chunk
from easyspec_jax.decode.state import RoundConfig, State
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.engine.abstract import abstract_pair, abstract_state, bytes_per_device
from easyspec_jax.model.transformer import Decoder, run_exact
from easyspec_jax.options import (
    DraftTensorParallelSize,
    KVDType,
    Method,
    SamplingParams,
    SpeculativeConfig,
    Weights,
)
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape, parse_mesh
from easyspec_jax.plan.cost import Cost, cost

MakeMesh = Callable[[MeshShape], Mesh]
"""Makes a mesh of absent devices, as `engine.abstract.absent_mesh` does, or of present ones."""


@dataclass(frozen=True)
class Pair:
    """Models, mesh and lengths to plan for.

    Attributes:
        dtype: Type to compute in.
        mesh: "8" or "layer=4,tensor=2", as `parse_mesh` takes it.
        num_speculative_tokens: Levels drafted per round.
        tree_width: Nodes per level; 1 is a chain.
        prompt_length: Tokens of the prompt.
        max_length: Most tokens of a text, its prompt included.
        weights: Types of the target's and the draft's matrices; None for `dtype`.
        kv_dtype: Type of caches; "auto" is `dtype`.
    """

    target: ModelConfig
    draft: ModelConfig
    dtype: np.dtype
    mesh: str
    num_speculative_tokens: int
    tree_width: int
    prompt_length: int
    max_length: int
    weights: tuple[Weights | None, Weights | None] = (None, None)
    kv_dtype: KVDType = "auto"


@dataclass(frozen=True)
class Way:
    """A way of decoding; fields are named as in SpeculativeConfig.

    Attributes:
        lp_size: Layers per group; 1 without groups.
        refit: The draft has the projections of a refit in addition to its own.
    """

    method: Method
    lp_size: int = 1
    draft_tensor_parallel_size: DraftTensorParallelSize = "all"
    mlp_lp_size: int = 1
    refit: bool = False

    @property
    def label(self) -> str:
        """The way in a few words, for people to read.

        Examples:
            >>> Way("easyspec", lp_size=4, mlp_lp_size=2).label
            'easyspec N=4 M=2, draft TP all'
        """
        if self.method == "vanilla":
            return "vanilla"
        name = f"{self.method} N={self.lp_size}" if self.method == "easyspec" else self.method
        name += f" M={self.mlp_lp_size}" if self.mlp_lp_size > 1 else ""
        name += " refit" if self.refit else ""
        return f"{name}, draft TP {self.draft_tensor_parallel_size}"

    def layout(self, num_layers: int) -> Layout:
        """Group the layers of a draft by the paper's rule."""
        return Layout.uniform(paper_groups(num_layers, self.lp_size), self.mlp_lp_size)


def ways(
    lp_sizes: Sequence[int], tree_width: int, mlp_lp_size: int = 1, refit: bool = False
) -> list[Way]:
    """List the ways that a plan compares.

    Args:
        lp_sizes: Sizes of layer-parallel groups.
        tree_width: Nodes per level; 1 compares with a chain, more with a tree of an ordinary draft.
        mlp_lp_size: MLPs of a group that run at once, at most the group's layers.
        refit: Layer-parallel drafts have a refit.

    Returns:
        Plain decoding, then an ordinary draft and layer-parallel ones, each replicated and split.

    Examples:
        >>> for way in ways([4], tree_width=1):
        ...     print(way.label)
        vanilla
        sd, draft TP 1
        sd, draft TP all
        easyspec N=4, draft TP 1
        easyspec N=4, draft TP all
    """
    ordinary: Method = "sd" if tree_width == 1 else "tree"
    found = [Way("vanilla"), Way(ordinary, 1, "1"), Way(ordinary, 1, "all")]
    for lp_size in lp_sizes:
        mlps = min(mlp_lp_size, lp_size)
        found.append(Way("easyspec", lp_size, "1", mlps, refit))
        found.append(Way("easyspec", lp_size, "all", mlps, refit))
    return found


@dataclass(frozen=True)
class Costs:
    """Costs of one way of decoding. Bytes are per device.

    Attributes:
        capacity: Entries of each cache, in tokens.
        target_bytes: Weights of the target.
        draft_bytes: Weights of the draft; 0 without one.
        cache_bytes: Caches of both models.
        step: One pass of the draft over a level, fuzzy with groups, else exact. Without a draft,
            one pass of the target over a token.
        calibration: The draft's exact pass over the pending tokens, or None if there is none.
        first_token: The target's passes over the whole prompt.
        prefill: Both models' passes over it; the draft's come after the first token.
        round: A whole round: calibration, steps, verification, and choosing tokens.
    """

    way: Way
    mesh: MeshShape
    capacity: int
    target_bytes: int
    draft_bytes: int
    cache_bytes: int
    step: Cost
    calibration: Cost | None
    first_token: Cost
    prefill: Cost
    round: Cost

    @property
    def memory(self) -> int:
        """Bytes of weights and caches."""
        return self.target_bytes + self.draft_bytes + self.cache_bytes


def programs(pair: Pair, way: Way, make_mesh: MakeMesh) -> Programs:
    """Make the programs that the engine would make for greedy decoding, without weights."""
    drafted = way.method != "vanilla"
    layout = way.layout(pair.draft.num_hidden_layers) if drafted else Layout.uniform(())
    # A bare "8" is split to suit the groups: (layer=4, tensor=2) for N = 4, (1, 8) without groups.
    mesh = make_mesh(parse_mesh(pair.mesh, group_size=layout.lp_size))
    # Without axes the draft's dense parts are on every device, whole, and need no collective.
    axes = ALL_AXES if way.draft_tensor_parallel_size == "all" else ()
    draft = pair.draft if drafted else None
    speculative = SpeculativeConfig(
        method=way.method,
        num_speculative_tokens=pair.num_speculative_tokens,
        tree_width=pair.tree_width if drafted else None,  # "vanilla" refuses trees
    )
    config = RoundConfig.of(speculative, SamplingParams(), pair.target.stop_ids)
    models = abstract_pair(
        pair.target,
        draft,
        mesh,
        layout,
        way.refit,
        axes,
        pair.dtype,
        weights=pair.weights,
        kv_dtype=pair.kv_dtype,
        tokens=config.split_for,
    )
    return Programs(mesh, *models, config, pair.max_length)


def keeping_windows(run: Programs) -> Programs:
    """Return the programs with caches as the engine makes them without a store of prefixes.

    Sliding layers keep only what may still be read. Moving on is a loop, which cost() cannot count;
    it is for one step in a hundred.
    """
    models = (run.target, run.draft)
    slides = any(model is not None and model.config.has_windows for model in models)
    return replace(run, config=replace(run.config, keeps_windows=slides))


def _bytes_of_caches(run: Programs, capacity: int) -> int:
    """Return the bytes of one row's caches on a device."""
    state = abstract_state(keeping_windows(run), 1, capacity)
    return bytes_per_device((state.target, state.draft))


def costs(pair: Pair, way: Way, make_mesh: MakeMesh) -> Costs:
    """Count the costs of a way of decoding from traces alone; nothing is compiled."""
    run = programs(pair, way, make_mesh)
    state = abstract_state(run, 1, run.sizes.capacity(pair.max_length))
    measure = partial(cost, mesh_shape=run.mesh.shape)
    one_pass = partial(pass_cost, run, state)
    if run.draft is None:
        step = one_pass("target", 1)
    else:
        step = one_pass("draft", pair.tree_width, fuzzy=True)
    calibration = None
    if run.config.calibration:
        # Pending: all tokens that the round before accepted, and its last one. Only what follows
        # the last token is drafted, so only that token gets logits.
        calibration = one_pass("draft", run.config.pending_size, scored=1)
    target, draft = prefill_costs(run, state, pair.prompt_length)
    return Costs(
        way=way,
        mesh=MeshShape(run.mesh.shape["layer"], run.mesh.shape["tensor"]),
        capacity=run.sizes.capacity(pair.max_length),
        target_bytes=bytes_per_device(run.target),
        draft_bytes=bytes_per_device(run.draft),
        cache_bytes=_bytes_of_caches(run, state.capacity),
        step=step,
        calibration=calibration,
        first_token=target,
        prefill=target if draft is None else target + draft,
        round=measure(run.compiled.round, run.leaves, state),
    )


@dataclass(frozen=True)
class Round:
    """A round of some number of levels.

    Attributes:
        cost: All of it.
        memory: Bytes of weights and caches per device.
    """

    cost: Cost
    memory: int


def rounds(pair: Pair, way: Way, make_mesh: MakeMesh, deepest: int) -> list[Round]:
    """Count rounds of 1, 2, … `deepest` levels; the pair's own number of levels plays no part.

    As long as caches keep their size, a round's cost is a straight line over its levels, except for
    a little of the choosing: each level adds one pass of the draft, `tree_width` tokens to the
    target's pass and one to the calibration's. So only the ends of a line are traced.
    """
    made = programs(replace(pair, num_speculative_tokens=deepest), way, make_mesh)

    def run(levels: int) -> Programs:
        # Another depth drafts with the same models, so they are made once.
        return replace(made, config=replace(made.config, levels=levels))

    def capacity(levels: int) -> int:
        return run(levels).sizes.capacity(pair.max_length)

    counted = []
    for _, same in groupby(range(1, deepest + 1), capacity):
        depths = list(same)
        shallow, deep = depths[0], depths[-1]
        ends = {levels: _round(run(levels), pair) for levels in {shallow, deep}}
        for levels in depths:
            share = (levels - shallow) / max(deep - shallow, 1)
            # A few pending tokens are all that memory differs by.
            between = ends[shallow].cost.towards(ends[deep].cost, share)
            counted.append(Round(between, ends[deep].memory))
    return counted


def _round(run: Programs, pair: Pair) -> Round:
    state = abstract_state(run, 1, run.sizes.capacity(pair.max_length))
    counted = cost(run.compiled.round, run.leaves, state, mesh_shape=run.mesh.shape)
    caches = _bytes_of_caches(run, state.capacity)
    return Round(counted, bytes_per_device((run.target, run.draft)) + caches)


def prefill_costs(run: Programs, state: State, prompt: int) -> tuple[Cost, Cost | None]:
    """Count each model's passes over a prompt; only the target's last hidden state gets logits.

    Args:
        run: The programs, which have the models and the mesh.
        state: A state of one row.
        prompt: Tokens of the prompt.

    Returns:
        The target's cost and the draft's, None without one.
    """
    measure = partial(cost, mesh_shape=run.mesh.shape)

    def body(target: Decoder, draft: Decoder | None, *args: Any) -> State:
        return append_chunk(target, *args)[0]

    append = run.compiled.mapped(body, (run.compiled.state_spec, P(), P()), run.compiled.state_spec)
    # One row's chunk: its ids, how many of them count, and whether the prompt ends with it.
    count, last = jax.ShapeDtypeStruct((1,), np.int32), jax.ShapeDtypeStruct((1,), bool)
    chunks = [
        jax.ShapeDtypeStruct((1, size), np.int32)
        for size in run.sizes.chunks(prompt, state.capacity)
    ]
    target = measure(run.compiled.prefill, run.leaves, state, chunks[-1], count, last)
    # Each chunk attends to the whole cache, so chunks of one size cost the same.
    for chunk, times in Counter(chunks[:-1]).items():
        target += measure(append, run.leaves, state, chunk, count) * times
    if run.draft is None:
        return target, None
    drafts = (
        measure(run.compiled.prefill_draft, run.leaves, state, chunk, count) * times
        for chunk, times in Counter(chunks).items()
    )
    return target, sum(drafts, Cost())


def verification_cost(pair: Pair, make_mesh: MakeMesh, capacity: int) -> Cost:
    """Count the target's pass over the text's last token and all drafted ones, logits included.

    Args:
        pair: The models and the way they are used.
        make_mesh: Makes a mesh of the topology.
        capacity: Entries of the caches of a way that drafts.
    """
    # With a draft, because a target's experts are split for what its rounds verify.
    run = programs(pair, Way("sd" if pair.tree_width == 1 else "tree"), make_mesh)
    state = abstract_state(run, 1, capacity)
    return pass_cost(run, state, "target", 1 + pair.num_speculative_tokens * pair.tree_width)


def pass_cost(
    run: Programs,
    state: State,
    which: str,
    tokens: int,
    scored: int | None = None,
    fuzzy: bool = False,
) -> Cost:
    """Count one pass of a model.

    Args:
        run: The programs, which have the models and the mesh.
        state: The state that the pass reads.
        which: "target" or "draft".
        tokens: Tokens that the pass reads.
        scored: How many of them, the last ones, get logits. None: all.
        fuzzy: Run the layers of a group at once.
    """

    def body(target: Decoder, draft: Decoder | None, state: State) -> Any:
        model = target if which == "target" else draft
        assert model is not None
        ids = jnp.zeros((1, tokens), jnp.int32)
        order = run_fuzzy if fuzzy else run_exact
        # [1, tokens] -> hidden [1, tokens, D] -> logits [1, scored, this device's vocabulary]
        hidden, caches = model(ids, getattr(state, which), state.length, order)
        return model.logits(hidden if scored is None else hidden[:, -scored:]), caches

    model = run.target if which == "target" else run.draft
    assert model is not None
    # Logits stay split over the vocabulary, on whichever axes the model's head is.
    specs = P(None, None, model.axes or None), getattr(run.compiled.state_spec, which)
    program = run.compiled.mapped(body, (run.compiled.state_spec,), specs)
    return cost(program, run.leaves, state, mesh_shape=run.mesh.shape)
