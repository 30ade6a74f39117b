"""The parts of bench_roofline. Each returns rows of medians, ratios and raw repeats."""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from easyspec_jax.checkpoint.config import ModelConfig, model_config
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.decode.timing import Case, alone, alternate, pass_case, round_case
from easyspec_jax.draft.grouping import paper_groups
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.model.transformer import Decoder, run_exact
from easyspec_jax.options import Weights
from easyspec_jax.parallel.mesh import open_mesh, parse_mesh
from easyspec_jax.parallel.platforms import PlatformSettings
from easyspec_jax.verify import Greedy, Verifier
from experiments.bench import roofline_models as models
from experiments.bench import roofline_texts as texts
from experiments.bench.roofline_options import candidates, compiled_round
from experiments.bench.roofline_profile import kernels
from experiments.bench.roofline_timing import memory_cases
from experiments.lib.machine import host_memory, torch_device
from experiments.paper.timeline import recorded

VERIFIED = (1, 2, 4, 6, 8, 16, 21, 32, 64)
NARROW = (1, 6, 21)
"""Tokens of passes with matrices of narrower types."""
LP_SIZES = (1, 2, 4, 7)
WIDTHS = (1, 4, 8)
LEVELS, LP_SIZE = 5, 4

FUSED = PlatformSettings(
    fused_attention=True, fused_mlp=True, fused_groups=True, split_keys_from=4096
)
"""All kernels of ours."""
PROFILED = 5
"""Rounds in a profile, of which the one of median duration counts."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Timings:
    """The seconds of each case and the fastest read of memory, in every repeat.

    Attributes:
        seconds: Of each case, [repeats].
        rate: Bytes a second, [repeats].
    """

    seconds: dict[str, np.ndarray]
    rate: np.ndarray

    def row(self, name: str, bytes: int, **ratios: np.ndarray) -> Row:
        """Return medians of ratios, each taken within a repeat because a shared machine drifts."""
        seconds = self.seconds[name]
        floor = bytes / self.rate
        figures = {
            "seconds": seconds,
            "floor_seconds": floor,
            "over_floor": seconds / floor,
            "share_of_bandwidth": floor / seconds,
        }
        medians = {key: float(np.median(values)) for key, values in (figures | ratios).items()}
        return {"name": name} | medians | {"bytes": bytes, "repeats": seconds.tolist()}


@dataclass(frozen=True)
class Bench:
    """The arguments, and the models and sizes that follow from them."""

    args: argparse.Namespace
    dtype: np.dtype
    platform: str

    @property
    def pair(self) -> tuple[models.Fields, models.Fields]:
        """The shapes of target and draft."""
        return models.SHAPES[self.args.shape]

    @property
    def configs(self) -> tuple[ModelConfig, ModelConfig]:
        """The same shapes as configurations of this package."""
        return model_config(self.pair[0]), model_config(self.pair[1])

    @property
    def bytes(self) -> tuple[int, int]:
        """The least bytes that one pass of the target, and one of the draft, must read."""
        target, draft = (
            models.weight_bytes(config, self.dtype)
            + models.kv_bytes(config, self.dtype, self.args.context)
            for config in self.configs
        )
        return target, draft

    @property
    def lengths(self) -> dict[str, int]:
        """The length of the text and the capacity of every cache, a power of two as in decoding."""
        needed = self.args.context + self.args.calls * (LEVELS + 1) + max(VERIFIED) + 1
        return {"context": self.args.context, "capacity": 1 << (needed - 1).bit_length()}

    def check_memory(self) -> None:
        """Check that the devices can hold the weights of both models.

        Raises:
            EasySpecError: They cannot.
        """
        devices = self.mesh().devices.flat
        stats = devices[0].memory_stats() or {}
        # Virtual devices share the host's memory.
        held = len(devices) * stats["bytes_limit"] if "bytes_limit" in stats else host_memory()
        if sum(self.bytes) > held:
            needed = f"{sum(self.bytes) / 2**30:.1f} GiB for its weights in {self.dtype.name}"
            raise EasySpecError(
                f"--shape {self.args.shape} needs {needed} and there are {held / 2**30:.1f}; "
                "choose another shape, or more devices"
            )

    def mesh(self, lp_size: int = LP_SIZE) -> Mesh:
        """Open the mesh on which the engine would run groups of that many layers."""
        return open_mesh(parse_mesh(self.args.mesh, group_size=lp_size))

    def target(self, mesh: Mesh) -> Decoder:
        """Load the target with random weights."""
        return models.load(models.random_source(self.pair[0], self.dtype.name), mesh)

    def draft(
        self,
        mesh: Mesh,
        lp_size: int = LP_SIZE,
        mlp_lp_size: int = 1,
        settings: PlatformSettings | None = None,
    ) -> Decoder:
        """Load the draft with random weights, in groups of that many layers."""
        source = models.random_source(self.pair[1], self.dtype.name)
        groups = paper_groups(source.config.num_hidden_layers, lp_size)
        return models.load(source, mesh, groups, mlp_lp_size, settings)

    def measure(self, cases: Sequence[Case]) -> Timings:
        """Time all cases alternately, with reads of memory among them."""
        memory = memory_cases(self.mesh(), self.dtype, self.args.memory_mib * 2**20)
        measured = alternate([*memory, *cases], self.args.repeats, self.args.calls)
        seconds = {name: np.asarray(samples) for name, samples in measured.items()}
        return Timings(
            seconds, np.max([case.bytes / seconds[case.name] for case in memory], axis=0)
        )


def bandwidth(bench: Bench) -> list[Row]:
    """Measure how fast memory is read and written."""
    cases = memory_cases(bench.mesh(), bench.dtype, bench.args.memory_mib * 2**20)
    timings = bench.measure([])
    rows = []
    for case in cases:
        speeds = case.bytes / timings.seconds[case.name] / 1e9
        rows.append(
            {
                "name": case.name,
                "GB_per_second": float(np.median(speeds)),
                "repeats": speeds.tolist(),
            }
        )
    return rows


def target(bench: Bench) -> list[Row]:
    """Time a plain step as decoding dispatches it, and verification of more and more tokens."""
    programs = alone(bench.mesh(), bench.target(bench.mesh()))
    size = bench.bytes[0]
    cases = [round_case("plain step", programs, size, **bench.lengths)]
    cases += [
        pass_case(f"{n} tokens", programs, n, run_exact, size, **bench.lengths) for n in VERIFIED
    ]
    timings = bench.measure(cases)
    plain = timings.seconds["plain step"]
    return [
        timings.row(case.name, size, over_plain=timings.seconds[case.name] / plain)
        for case in cases
    ]


def narrow(bench: Bench) -> list[Row]:
    """Time passes of the target with matrices of int8 and int4, against floats.

    On GPUs, and at the tiny shape, int4 is also multiplied without the kernel of groups.
    `over_floats` is a pass's time as a multiple of that of floats. Bytes are those of each type.
    """
    kinds: dict[str, tuple[Weights | None, PlatformSettings | None]] = {
        "floats": (None, None),
        "int8": ("int8", None),
        "int4": ("int4", None),
    }
    if bench.platform == "gpu" or bench.args.shape == "tiny":
        kinds["int4 without kernel"] = "int4", PlatformSettings()
    mesh, cases = bench.mesh(), dict[str, tuple[Case, str]]()
    source = models.random_source(bench.pair[0], bench.dtype.name)
    cached = models.kv_bytes(bench.configs[0], bench.dtype, bench.args.context)
    for kind, (weights, settings) in kinds.items():
        model = models.load(source, mesh, settings=settings, weights=weights)
        programs, size = alone(mesh, model), models.read_bytes(model) + cached
        for n in NARROW:
            name = f"{kind}, {n} tokens"
            case = pass_case(name, programs, n, run_exact, size, **bench.lengths)
            cases[name] = case, f"floats, {n} tokens"
    timings = bench.measure([case for case, _ in cases.values()])
    rows = []
    for name, (case, floats) in cases.items():
        over_floats = timings.seconds[name] / timings.seconds[floats]
        rows.append(timings.row(name, case.bytes, over_floats=over_floats))
    return rows


def draft(bench: Bench) -> list[Row]:
    """Time exact and fuzzy steps of one token in a loop on the device, for groups of N layers.

    The MLPs of a group run one by one, and in a further fuzzy step two at a time. Fused kernels
    are compared with the plain path on GPUs, and on other platforms only at the tiny shape,
    because an interpreter runs them there.
    `gap_over_exact` is a step's time above its floor, as a multiple of an ordinary draft's.
    """
    size, cases = bench.bytes[1], []
    step = partial(pass_case, tokens=1, bytes=size, loops=LEVELS - 1, **bench.lengths)
    for n in LP_SIZES:
        mesh = bench.mesh(n)
        programs = alone(mesh, bench.draft(mesh, n))
        cases.append(step(f"exact, N = {n}", programs, run=run_exact))
        if n > 1:
            pairs = alone(mesh, bench.draft(mesh, n, mlp_lp_size=2))
            cases.append(step(f"fuzzy, N = {n}", programs, run=run_fuzzy))
            cases.append(step(f"fuzzy, N = {n}, MLP pairs", pairs, run=run_fuzzy))
        if n in (1, LP_SIZE) and (bench.platform == "gpu" or bench.args.shape == "tiny"):
            fused = alone(mesh, bench.draft(mesh, n, settings=FUSED))
            kind, run = ("exact", run_exact) if n == 1 else ("fuzzy", run_fuzzy)
            cases.append(step(f"{kind}, N = {n}, fused kernels", fused, run=run))
    timings = bench.measure(cases)
    floor = size / timings.rate
    gap = timings.seconds["exact, N = 1"] - floor
    return [
        timings.row(case.name, size, gap_over_exact=(timings.seconds[case.name] - floor) / gap)
        for case in cases
    ]


def rounds(bench: Bench) -> list[Row]:
    """Time whole rounds as decoding dispatches them, and the passes that they consist of."""
    mesh = bench.mesh()
    target, draft = bench.target(mesh), bench.draft(mesh)
    of_target, of_draft = alone(mesh, target), alone(mesh, draft)
    size, small = bench.bytes
    calibration = pass_case(
        "calibration", of_draft, LEVELS + 1, run_exact, small, scored=1, **bench.lengths
    )
    cases, parts = [calibration], {}
    for width in WIDTHS:
        config = RoundConfig(LEVELS, calibration=True, verifier=Greedy(), stop_ids=(), width=width)
        nodes = 1 + LEVELS * width
        steps = pass_case(
            f"fuzzy, width {width}",
            of_draft,
            width,
            run_fuzzy,
            small,
            loops=LEVELS - 1,
            **bench.lengths,
        )
        check = pass_case(
            f"verification, {nodes} tokens", of_target, nodes, run_exact, size, **bench.lengths
        )
        whole = round_case(
            f"round, width {width}",
            Programs(mesh, target, draft, config),
            size + LEVELS * small,
            **bench.lengths,
        )
        cases += [steps, check, whole]
        parts[whole.name] = (calibration.name, steps.name, check.name)
    timings = bench.measure(cases)
    rows = []
    for case in cases:
        ratios = {}
        if case.name in parts:
            once, step, check = (timings.seconds[name] for name in parts[case.name])
            ratios["over_parts"] = timings.seconds[case.name] / (once + (LEVELS - 1) * step + check)
        rows.append(timings.row(case.name, case.bytes, **ratios))
    return rows


def profile(bench: Bench) -> list[Row]:
    """Count the kernels of a plain step and of whole rounds, and measure the gaps between them."""
    mesh = bench.mesh()
    target = bench.target(mesh)
    ways = {"plain step": alone(mesh, target)}
    for n in (1, LP_SIZE):
        ways[f"round, N = {n}"] = speculative(mesh, target, bench.draft(mesh, n), Greedy())
    rows = []
    for name, programs in ways.items():
        case = round_case(name, programs, **bench.lengths)
        case.sample(1)  # compiles
        rows.append({"name": name} | kernels(recorded(case, PROFILED)))
    return rows


def options(bench: Bench) -> Iterator[Row]:
    """Time the same round compiled with several sets of XLA's options, each against the default.

    `over_default` is the time with the options as a multiple of the time without. Options that this
    XLA does not take are reported as failed.
    """
    mesh = bench.mesh()
    programs = speculative(mesh, bench.target(mesh), bench.draft(mesh), Greedy())
    default = round_case("default", programs, **bench.lengths)
    for name, chosen in candidates(bench.platform).items():
        row: Row = {"name": name, "options": chosen}
        begun = time.perf_counter()
        try:
            step = compiled_round(programs, default.state, chosen)
            row["compile_seconds"] = time.perf_counter() - begun
            case = replace(round_case(name, programs, **bench.lengths), step=step)
            seconds = alternate([default, case], bench.args.repeats, bench.args.calls)
        except jax.errors.JaxRuntimeError as error:
            yield row | {"failed": first_line(error)}
            continue
        own, usual = (np.asarray(seconds[each]) for each in (name, default.name))
        yield row | {
            "seconds": float(np.median(own)),
            "over_default": float(np.median(own / usual)),
            "repeats": own.tolist(),
        }


def synthetic(bench: Bench) -> list[Row]:
    """Time whole texts at prescribed acceptance rates: chains, N = 4, random weights."""
    mesh = bench.mesh()
    target, draft = bench.target(mesh), bench.draft(mesh)
    ways = {"plain": texts.ours(alone(mesh, target))}
    for rate in bench.args.synthetic_acceptance:
        verifier = texts.SyntheticAcceptance(rate)
        ways[f"acceptance {rate:g}"] = texts.ours(speculative(mesh, target, draft, verifier))
    rng = np.random.default_rng(0)
    prompts = rng.integers(
        bench.configs[0].vocab_size, size=(bench.args.repeats + 1, bench.args.context)
    ).tolist()
    measured = texts.alternate_texts(ways, prompts, bench.args.max_new_tokens)
    return [
        speed_row(name, of_way, {"plain": measured["plain"]}) for name, of_way in measured.items()
    ]


def peers(bench: Bench) -> list[Row]:
    """Time this package and transformers on weights with a known share of agreement.

    Where a device cannot hold the weights twice, transformers runs first and is released, because
    JAX keeps the memory it once had.
    """
    device = torch_device(bench.platform)
    walk = models.Walk.of(bench.configs[0].vocab_size, bench.args.agreement)
    successors = walk.target, walk.draft
    of_target, of_draft = (
        models.constructed_source(fields, bench.dtype.name, successor)
        for fields, successor in zip(bench.pair, successors, strict=True)
    )

    def ours() -> dict[str, texts.Complete]:
        mesh = bench.mesh()
        target = models.load(of_target, mesh)
        draft = models.load(
            of_draft, mesh, paper_groups(of_draft.config.num_hidden_layers, LP_SIZE)
        )
        programs = {
            "plain": alone(mesh, target),
            "easyspec": speculative(mesh, target, draft, Greedy()),
        }
        return {name: texts.ours(own) for name, own in programs.items()}

    context, count = bench.args.context, bench.args.max_new_tokens
    starts = [number * (context + count) for number in range(bench.args.repeats + 1)]
    prompts = [walk.text(start, context) for start in starts]
    failed: list[Row] = []

    def theirs() -> dict[str, texts.Complete]:
        ways = texts.theirs(bench.pair, (of_target, of_draft), device, LEVELS)
        for name in texts.STATIC:
            if reason := texts.failure(ways[name], prompts[0], count):
                failed.append({"name": name, "failed": reason})
                del ways[name]
        return ways

    planned = [walk.text(start + context, count) for start in starts[1:]]
    together = texts.fit_together(device, sum(bench.bytes))
    measured: dict[str, texts.Measured] = {}
    for engines in [(ours, theirs)] if together else [(theirs,), (ours,)]:
        measured |= texts.alternate_texts(
            {name: way for engine in engines for name, way in engine().items()}, prompts, count
        )
        texts.release(device)
    rows = []
    others = {"plain": measured["plain"], "assisted": measured["transformers, assisted"]}
    for name, of_way in measured.items():
        same = sum(text.tokens == plan for text, plan in zip(of_way.texts, planned, strict=True))
        rows.append(speed_row(name, of_way, others) | {"as_planned": same, "alternating": together})
    return [*rows, *failed]


def speculative(mesh: Mesh, target: Decoder, draft: Decoder, verifier: Verifier) -> Programs:
    """Return programs of the default method, calibrated chains."""
    return Programs(
        mesh, target, draft, RoundConfig(LEVELS, calibration=True, verifier=verifier, stop_ids=())
    )


def speed_row(name: str, measured: texts.Measured, others: dict[str, texts.Measured]) -> Row:
    """Return tokens a second over whole completions, and their multiples of other ways' speeds."""
    seconds, made = np.asarray(measured.seconds), measured.texts
    speeds = np.asarray([len(text.tokens) for text in made]) / seconds
    row = {"name": name, "tokens_per_second": float(np.median(speeds))}
    row |= {
        f"over_{key}": float(np.median(np.asarray(other.seconds) / seconds))
        for key, other in others.items()
    }
    passes = [text.passes for text in made if text.passes is not None]
    if len(passes) == len(made):
        row["tokens_per_pass"] = sum(len(text.tokens) for text in made) / sum(passes)
    drafted = sum(text.drafted or 0 for text in made)
    if drafted:
        row["acceptance_rate"] = sum(text.accepted or 0 for text in made) / drafted
    return row | {"repeats": measured.seconds}


PARTS: dict[str, Callable[[Bench], Iterable[Row]]] = {
    "bandwidth": bandwidth,
    # First of the parts with weights: transformers needs memory that JAX would keep.
    "peers": peers,
    "target": target,
    "narrow": narrow,
    "draft": draft,
    "round": rounds,
    "profile": profile,
    "options": options,
    "synthetic": synthetic,
}
"""A part that yields rows one by one has each of them saved as soon as it is measured."""
