"""`python -m easyspec_jax.plan`: will a pair of models fit a machine, and what will it gain? No weights, no devices."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.cli.flags import add_shared
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig, resolve_dtype
from easyspec_jax.plan.machines import MACHINES, Topology, parse_topology

# Importing JAX takes a second, which --help and a mistyped flag need not wait for.
if TYPE_CHECKING:
    from easyspec_jax.plan.ahead import Compiled, TooLarge
    from easyspec_jax.plan.report import Plan
    from easyspec_jax.plan.steps import Pair, Way

PROGRAM = "easyspec_jax.plan"
LP_SIZES = (2, 4, 7)
PROMPT_LENGTH = 2048


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(PROGRAM, _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    parser.add_argument("--topology", required=True, metavar="T",
                        help=f"v5e:2x4, v5p:2x2x2, h100:8, …; machines: {', '.join(MACHINES)}")  # fmt: skip
    models = parser.add_argument_group("models")
    for flag in ("--target-config", "--draft-config"):
        models.add_argument(flag, required=True, metavar="NAME|FILE|DIR",
                            help="a bundled configuration such as Llama-3.3-70B (a wrong name lists them), a "
                            "config.json, or a checkpoint directory, of which no weight is read")  # fmt: skip
    add_shared(models, "--dtype", help="default: float32 on a CPU, else the target's")
    add_shared(
        models,
        "--max-length",
        default=3072,
        help="the most tokens of a text, its prompt included (default: %(default)s)",
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--mesh", help='"layer=4,tensor=2" (default: as --mesh with the number of devices)'
    )
    add_shared(decoding, "--num-speculative-tokens")
    add_shared(
        decoding,
        "--tree-width",
        default=1,
        help="tokens drafted at each depth (default: %(default)s, a chain)",
    )
    sizes = ", ".join(map(str, LP_SIZES))
    add_shared(
        decoding,
        "--lp-size",
        help="layers that run at once in the round that is compiled; the tables show it next to "
        f"{sizes} (default: %(default)s)",
    )
    add_shared(
        decoding,
        "--draft-tensor-parallel-size",
        help="likewise; the tables show both (default: %(default)s)",
    )
    add_shared(decoding, "--mlp-lp-size")
    decoding.add_argument(
        "--refit", action="store_true", help="count a refit's projections beside the draft's own"
    )
    parser.add_argument("--measure", action="store_true",
                        help="measure the machine's figures on the devices that are here")  # fmt: skip
    parser.add_argument(
        "--no-compile", action="store_true", help="count only: no memory of temporaries"
    )
    add_shared(parser, "--json")
    return parser


def _run(args: argparse.Namespace) -> None:
    topology = parse_topology(args.topology)
    _prepare_jax(topology, args.measure)

    from rich.console import Console

    from easyspec_jax.plan.report import as_dict, print_plan

    printed = as_dict(_plan(args, topology))
    if args.json:
        print(json.dumps(printed))
    else:
        print_plan(printed, Console(highlight=False, width=None if sys.stdout.isatty() else 120))


def _prepare_jax(topology: Topology, measure: bool) -> None:
    """Configure JAX before it starts, so that planning for absent devices does not look for them."""
    if measure:
        return
    quiet = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_LOG_DIR": "disabled",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Otherwise two commands at once would fight over a lock of a TPU that neither has.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def _plan(args: argparse.Namespace, topology: Topology) -> "Plan":
    from easyspec_jax.engine.abstract import absent_mesh
    from easyspec_jax.plan.configurations import check_pair, find_config
    from easyspec_jax.plan.report import Plan
    from easyspec_jax.plan.steps import Way, costs, verification_cost, ways
    from easyspec_jax.progress import bar, no_bar

    target_name, target = find_config(args.target_config, "--target-config")
    draft_name, draft = find_config(args.draft_config, "--draft-config")
    check_pair(target, draft)
    pair = _pair(args, topology, target, draft)
    mlp_lp_size = min(args.mlp_lp_size, args.lp_size)
    way = Way("easyspec", args.lp_size, args.draft_tensor_parallel_size, mlp_lp_size, args.refit)
    show = no_bar if args.json else bar
    if args.measure:
        topology = _measured(topology, pair)
    compiled = "--no-compile"
    if (
        not args.no_compile
    ):  # before the counting, which need not wait for a slice that does not exist
        with show("Compiling"):
            compiled = _compile(pair, way, topology)
    absent = partial(absent_mesh, platform=topology.machine.platform)
    sizes, counted = sorted({*LP_SIZES, args.lp_size}), []
    candidates = ways(sizes, pair.tree_width, args.mlp_lp_size, args.refit)
    with show("Counting", len(candidates)) as advance:
        for candidate in candidates:
            counted.append(costs(pair, candidate, absent))
            advance(1)
    verification = verification_cost(pair, absent)
    return Plan(target_name, draft_name, pair, topology, verification, counted, way, compiled)


def _compile(pair: "Pair", way: "Way", topology: Topology) -> "Compiled | TooLarge | str":
    from easyspec_jax.plan.ahead import CannotCompile, compile_round, topology_mesh
    from easyspec_jax.plan.steps import programs

    try:
        return compile_round(programs(pair, way, partial(topology_mesh, topology)), pair.max_length)
    except CannotCompile as reason:
        return str(reason)


def _pair(
    args: argparse.Namespace, topology: Topology, target: ModelConfig, draft: ModelConfig
) -> "Pair":
    """Checked against the topology and the models. Raises EasySpecError."""
    import numpy as np

    from easyspec_jax.parallel.mesh import parse_mesh
    from easyspec_jax.plan.steps import Pair

    SpeculativeConfig(
        num_speculative_tokens=args.num_speculative_tokens,
        tree_width=args.tree_width,
        lp_size=args.lp_size,
        mlp_lp_size=args.mlp_lp_size,
    )
    if args.lp_size > draft.num_hidden_layers:
        raise EasySpecError(
            f"--lp-size {args.lp_size} must be from 1 to the draft's {draft.num_hidden_layers} layers"
        )
    positions = min(target.max_position_embeddings, draft.max_position_embeddings)
    if not 2 <= args.max_length <= positions:
        raise EasySpecError(
            f"--max-length {args.max_length} must be from 2 to the {positions} positions that both models were made for"
        )
    mesh = args.mesh or str(topology.devices)
    if parse_mesh(mesh).size != topology.devices:
        raise EasySpecError(
            f"--mesh {mesh} has {parse_mesh(mesh).size} devices, but {topology.name} has {topology.devices}"
        )
    return Pair(
        target=target,
        draft=draft,
        dtype=np.dtype(resolve_dtype(args.dtype, topology.machine.platform, target.dtype)),
        mesh=mesh,
        num_speculative_tokens=args.num_speculative_tokens,
        tree_width=args.tree_width,
        prompt_length=min(PROMPT_LENGTH, args.max_length - 1),
        max_length=args.max_length,
    )


def _measured(topology: Topology, pair: "Pair") -> Topology:
    from easyspec_jax.parallel.mesh import open_mesh, parse_mesh
    from easyspec_jax.plan.measure import measured

    mesh = open_mesh(parse_mesh(pair.mesh), topology.machine.platform)
    return replace(topology, machine=measured(topology.machine, mesh, pair.dtype))
