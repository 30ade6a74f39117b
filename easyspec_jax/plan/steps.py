"""Cost of the steps of every way of decoding for a pair of models, from traces of the real programs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.decode.programs import PREFILL_CHUNK, Programs
from easyspec_jax.decode.round import RoundConfig, State
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.engine.abstract import abstract_pair, abstract_state, bytes_per_device
from easyspec_jax.model.transformer import Decoder, run_exact
from easyspec_jax.options import DraftTensorParallelSize, Method, SamplingParams, SpeculativeConfig
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape, parse_mesh
from easyspec_jax.plan.cost import Cost, cost

MakeMesh = Callable[[MeshShape], Mesh]


@dataclass(frozen=True)
class Pair:
    """Models and mesh to plan for. mesh: as for `--mesh`; max_length: prompt and generated tokens together."""

    target: ModelConfig
    draft: ModelConfig
    dtype: np.dtype
    mesh: str
    num_speculative_tokens: int
    tree_width: int
    prompt_length: int
    max_length: int


@dataclass(frozen=True)
class Way:
    """A way of decoding, as in SpeculativeConfig; lp_size: 1 without groups; refit: whether the draft has one."""

    method: Method
    lp_size: int = 1
    draft_tensor_parallel_size: DraftTensorParallelSize = "all"
    mlp_lp_size: int = 1
    refit: bool = False

    @property
    def label(self) -> str:
        if self.method == "vanilla":
            return "vanilla"
        name = f"{self.method} N={self.lp_size}" if self.method == "easyspec" else self.method
        name += f" M={self.mlp_lp_size}" if self.mlp_lp_size > 1 else ""
        name += " refit" if self.refit else ""
        return f"{name}, draft TP {self.draft_tensor_parallel_size}"

    def layout(self, num_layers: int) -> Layout:
        """Layout of a draft with this many layers."""
        return Layout.uniform(paper_groups(num_layers, self.lp_size), self.mlp_lp_size)


def ways(
    lp_sizes: Sequence[int], tree_width: int, mlp_lp_size: int = 1, refit: bool = False
) -> list[Way]:
    """All that are compared: plain decoding, an ordinary draft and layer-parallel ones, each with both placements."""
    ordinary: Method = "sd" if tree_width == 1 else "tree"
    sizes: tuple[DraftTensorParallelSize, ...] = ("1", "all")
    drafted = [Way(ordinary, 1, size) for size in sizes]
    parallel = [
        Way("easyspec", n, size, min(mlp_lp_size, n), refit) for n in lp_sizes for size in sizes
    ]
    return [Way("vanilla"), *drafted, *parallel]


@dataclass(frozen=True)
class Costs:
    """Costs of one way of decoding. The bytes are per device. A vanilla `step` is one of the target's.

    step: one pass of the draft over a level, exact without groups, else fuzzy. calibration: the exact pass over the
    pending tokens, None where there is none. prefill: of the whole prompt, both models. round: everything.
    """

    way: Way
    mesh: MeshShape
    capacity: int
    target_bytes: int
    draft_bytes: int
    cache_bytes: int
    step: Cost
    calibration: Cost | None
    prefill: Cost
    round: Cost

    @property
    def memory(self) -> int:
        return self.target_bytes + self.draft_bytes + self.cache_bytes


def programs(pair: Pair, way: Way, make_mesh: MakeMesh) -> Programs:
    """As the engine would make them for greedy decoding, without weights."""
    drafted = way.method != "vanilla"
    layout = way.layout(pair.draft.num_hidden_layers) if drafted else Layout.uniform(())
    mesh = make_mesh(parse_mesh(pair.mesh, group_size=layout.lp_size))
    axes = ALL_AXES if way.draft_tensor_parallel_size == "all" else ()
    draft = pair.draft if drafted else None
    speculative = SpeculativeConfig(
        method=way.method,
        num_speculative_tokens=pair.num_speculative_tokens,
        tree_width=pair.tree_width if drafted else None,
    )
    config = RoundConfig.of(speculative, SamplingParams(), pair.target.stop_ids)
    return Programs(
        mesh, *abstract_pair(pair.target, draft, mesh, layout, way.refit, axes, pair.dtype), config
    )


def costs(pair: Pair, way: Way, make_mesh: MakeMesh) -> Costs:
    """From traces alone; nothing is compiled."""
    run = programs(pair, way, make_mesh)
    state = abstract_state(run, 1, run.capacity(pair.max_length))
    measure = partial(cost, mesh_shape=run.mesh.shape)
    one_pass = partial(pass_cost, run, state)
    chunk = [
        jax.ShapeDtypeStruct(*shape)
        for shape in (((1, PREFILL_CHUNK), np.int32), ((1,), np.int32), ((1,), bool))
    ]
    chunks = -(-pair.prompt_length // PREFILL_CHUNK)
    calibration = None
    if run.config.calibration:
        calibration = one_pass("draft", run.config.pending_size, scored=1)
    return Costs(
        way=way,
        mesh=MeshShape(run.mesh.shape["layer"], run.mesh.shape["tensor"]),
        capacity=run.capacity(pair.max_length),
        target_bytes=bytes_per_device(run.target),
        draft_bytes=bytes_per_device(run.draft),
        cache_bytes=bytes_per_device((state.target, state.draft)),
        step=one_pass("target", 1)
        if run.draft is None
        else one_pass("draft", pair.tree_width, fuzzy=True),
        calibration=calibration,
        prefill=measure(run._prefill, run.leaves, state, *chunk) * chunks,
        round=measure(run._round, run.leaves, state),
    )


def verification_cost(pair: Pair, make_mesh: MakeMesh) -> Cost:
    """Cost of the target's pass over the text's last token and all drafted ones, logits included."""
    run = programs(pair, Way("vanilla"), make_mesh)
    state = abstract_state(run, 1, run.capacity(pair.max_length))
    return pass_cost(run, state, "target", 1 + pair.num_speculative_tokens * pair.tree_width)


def pass_cost(
    run: Programs,
    state: State,
    which: str,
    tokens: int,
    scored: int | None = None,
    fuzzy: bool = False,
) -> Cost:
    """Cost of one pass of "target" or "draft", with the logits of its last `scored` tokens (None: of all)."""

    def body(target: Decoder, draft: Decoder | None, state: State) -> Any:
        model = target if which == "target" else draft
        assert model is not None
        ids = jnp.zeros((1, tokens), jnp.int32)
        h, caches = model(
            ids, getattr(state, which), state.length, run_fuzzy if fuzzy else run_exact
        )
        return model.logits(h if scored is None else h[:, -scored:]), caches

    model = run.target if which == "target" else run.draft
    assert model is not None
    specs = P(None, None, model.axes or None), getattr(run.state_spec, which)
    return cost(
        run.mapped(body, (run.state_spec,), specs), run.leaves, state, mesh_shape=run.mesh.shape
    )
