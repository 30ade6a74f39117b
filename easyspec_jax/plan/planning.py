"""From a pair of models and a PlanConfig to a Plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.engine.abstract import absent_mesh
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import resolve_dtype
from easyspec_jax.parallel.mesh import open_mesh, parse_mesh
from easyspec_jax.plan.acceptance import read_acceptance
from easyspec_jax.plan.ahead import (
    CannotCompile,
    Compiled,
    TooLarge,
    compile_round,
    topology_mesh,
)
from easyspec_jax.plan.best import Best, find_best
from easyspec_jax.plan.configurations import check_pair, find_config
from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.machines import Topology, parse_topology
from easyspec_jax.plan.measure import measured
from easyspec_jax.plan.options import LP_SIZES, PROMPT_LENGTH, PlanConfig
from easyspec_jax.plan.steps import (
    Costs,
    Pair,
    Way,
    costs,
    keeping_windows,
    programs,
    verification_cost,
    ways,
)
from easyspec_jax.plan.tiers import Tier, tiers
from easyspec_jax.progress import Bar, no_bar


@dataclass(frozen=True)
class Plan:
    """Costs of every way of decoding for a pair of models on a machine.

    Attributes:
        target_name: The target's bundled name, or the name of its file or directory.
        draft_name: The draft's.
        verification: One pass of the target over the text's last token and all drafted ones.
        costs: One entry for each way of decoding, plain decoding first.
        compiled_way: The way whose round is compiled.
        compiled: That round's figures, or XLA's refusal, or one line that says why this
            installation cannot compile it, or None if it was not asked to.
        best: Choices by measured acceptance, or None without any.
        tiers: The rounds that `compiled_way` has with `--adapt on`, fewest levels first.
    """

    target_name: str
    draft_name: str
    pair: Pair
    topology: Topology
    verification: Cost
    costs: Sequence[Costs]
    compiled_way: Way
    compiled: Compiled | TooLarge | str | None
    best: Best | None
    tiers: Sequence[Tier]


def plan(target: str | Path, draft: str | Path, config: PlanConfig, *, bar: Bar = no_bar) -> Plan:
    """Estimate what a pair of models needs and gains on a machine, without weights.

    The engine's own programs are traced with shapes instead of arrays, and only the round of
    `config` is compiled. JAX looks for this host's accelerators when it starts; where only absent
    ones are planned for, JAX_PLATFORMS=cpu keeps it from waiting for them.

    Args:
        target: A bundled configuration such as "Llama-3.3-70B", a `config.json`, or a checkpoint
            directory, of which no weight is read.
        draft: The draft, likewise.
        config: The machine and the way of decoding.
        bar: Shows progress.

    Returns:
        The plan. `report.as_dict` turns it into JSON's types and `report.print_plan` into tables.

    Raises:
        EasySpecError: A model is unknown, the two cannot share token ids, `config` does not suit
            them, its file of acceptance is not one, or devices that are to be measured or compiled
            for do not exist.

    Examples:
        Which way is the fastest on eight TPU v5p at an acceptance rate of 0.8?

            from easyspec_jax.plan import PlanConfig, plan
            from easyspec_jax.plan.report import as_dict

            found = plan("Llama-3.3-70B", "Llama-3.2-1B", PlanConfig("v5p:2x2x2", compile=False))
            ways = as_dict(found)["ways"]
            print(max(ways, key=lambda way: way["tokens_per_second"]["0.8"])["label"])
    """
    topology = parse_topology(config.topology)
    target_name, target_config = find_config(target, "target")
    draft_name, draft_config = find_config(draft, "draft")
    check_pair(target_config, draft_config)
    pair = _pair(config, topology, target_config, draft_config)
    # Before anything that takes time.
    acceptance = None
    if config.acceptance is not None:
        acceptance = read_acceptance(Path(config.acceptance), draft_config.num_hidden_layers)
    if config.measure:
        # Only the figures change. The programs are traced for absent devices all the same.
        topology = _measured(topology, pair)
    mlp_lp_size = min(config.mlp_lp_size, config.lp_size)
    tensor_parallel = config.draft_tensor_parallel_size
    way = Way("easyspec", config.lp_size, tensor_parallel, mlp_lp_size, config.refit)
    compiled = None
    if config.compile:
        # Before the counting: a slice that does not exist is then reported at once.
        with bar("Compiling"):
            compiled = _compile(pair, way, topology)
    make_mesh = partial(absent_mesh, platform=topology.machine.platform)
    # lp_size 3 -> [2, 3, 4, 7], each with the draft replicated and split.
    lp_sizes = sorted({*LP_SIZES, config.lp_size})
    candidates = ways(lp_sizes, pair.tree_width, config.mlp_lp_size, config.refit)
    counted = []
    with bar("Counting", len(candidates)) as advance:
        for candidate in candidates:
            counted.append(costs(pair, candidate, make_mesh))
            advance(1)
    verification = verification_cost(pair, make_mesh, counted[-1].capacity)
    best = None
    if acceptance is not None:
        best = find_best(pair, acceptance, make_mesh, topology.machine, bar)
    of_way = tiers(pair, way, counted[0].round, make_mesh, topology.machine)
    return Plan(
        target_name,
        draft_name,
        pair,
        topology,
        verification,
        counted,
        way,
        compiled,
        best,
        of_way,
    )


def _pair(config: PlanConfig, topology: Topology, target: ModelConfig, draft: ModelConfig) -> Pair:
    """Check the options against the topology and the models, and complete them."""
    if config.lp_size > draft.num_hidden_layers:
        raise EasySpecError(
            f"`lp_size` {config.lp_size} must be from 1 to "
            f"the draft's {draft.num_hidden_layers} layers"
        )
    positions = min(target.longest_text, draft.longest_text)
    if not 2 <= config.max_length <= positions:
        raise EasySpecError(
            f"`max_length` {config.max_length} must be from 2 to "
            f"the {positions} positions that both models were made for"
        )
    mesh = config.mesh or str(topology.devices)
    devices = parse_mesh(mesh).size
    if devices != topology.devices:
        raise EasySpecError(
            f"`mesh` {mesh} has {devices} devices, but {topology.name} has {topology.devices}"
        )
    return Pair(
        target=target,
        draft=draft,
        dtype=np.dtype(resolve_dtype(config.dtype, topology.machine.platform, target.dtype)),
        mesh=mesh,
        num_speculative_tokens=config.num_speculative_tokens,
        tree_width=config.tree_width,
        # At least one position is left for a generated token.
        prompt_length=min(PROMPT_LENGTH, config.max_length - 1),
        max_length=config.max_length,
        weights=(config.weights, config.draft_weights),
        kv_dtype=config.kv_dtype,
    )


def _measured(topology: Topology, pair: Pair) -> Topology:
    """Return the topology with figures measured on this host's devices."""
    mesh = open_mesh(parse_mesh(pair.mesh), topology.machine.platform)
    return replace(topology, machine=measured(topology.machine, mesh, pair.dtype))


def _compile(pair: Pair, way: Way, topology: Topology) -> Compiled | TooLarge | str:
    try:
        # Tracing needs no real devices, so only this makes a mesh of those that XLA describes.
        run = programs(pair, way, partial(topology_mesh, topology))
        return compile_round(keeping_windows(run), pair.max_length)
    except CannotCompile as reason:
        return str(reason)
