"""A plan as one object, and that object as tables: what `--json` prints is what the tables show."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyspec_jax.plan.ahead import Compiled, TooLarge
from easyspec_jax.plan.configurations import parameter_count
from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.machines import Machine, Topology
from easyspec_jax.plan.steps import Costs, Pair, Way

RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Acceptance rates (accepted over drafted levels) that speeds are projected for."""

COLUMNS = ("kernels", "collectives", "wire_bytes", "bytes", "seconds")


@dataclass(frozen=True)
class Plan:
    """Everything a report tells. compiled: the round of `compiled_way`, or one line that says why there is none."""

    target_name: str
    draft_name: str
    pair: Pair
    topology: Topology
    verification: Cost
    costs: Sequence[Costs]
    compiled_way: Way
    compiled: Compiled | TooLarge | str


def tokens_per_second(costs: Costs, levels: int, rate: float, machine: Machine) -> float:
    """An estimate: a round yields one token and, on average, rate x levels accepted ones."""
    accepted = 0.0 if costs.way.method == "vanilla" else rate * levels
    return (1 + accepted) / costs.round.seconds(machine)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as `--json` prints it; bytes are each device's, seconds and speeds are estimates."""
    pair, machine = plan.pair, plan.topology.machine
    return {
        "estimates": True,
        "topology": plan.topology.name,
        "devices": plan.topology.devices,
        "machine": asdict(machine),
        "target": {"name": plan.target_name, "parameters": parameter_count(pair.target)},
        "draft": {"name": plan.draft_name, "parameters": parameter_count(pair.draft)},
        "dtype": str(pair.dtype),
        "prompt_length": pair.prompt_length,
        "max_length": pair.max_length,
        "num_speculative_tokens": pair.num_speculative_tokens,
        "tree_width": pair.tree_width,
        "verification": _cost(plan.verification, machine),
        "ways": [_way(costs, plan) for costs in plan.costs],
        "compiled": {"way": plan.compiled_way.label} | _compiled(plan.compiled, machine),
    }


def _cost(cost: Cost, machine: Machine) -> dict[str, Any]:
    return asdict(cost) | {"seconds": cost.seconds(machine)}


def _way(costs: Costs, plan: Plan) -> dict[str, Any]:
    machine, levels = plan.topology.machine, plan.pair.num_speculative_tokens
    steps = {
        "step": costs.step,
        "calibration": costs.calibration,
        "prefill": costs.prefill,
        "round": costs.round,
    }
    return {
        "label": costs.way.label,
        **asdict(costs.way),
        "mesh": asdict(costs.mesh),
        "capacity": costs.capacity,
        "memory": {
            "target": costs.target_bytes,
            "draft": costs.draft_bytes,
            "caches": costs.cache_bytes,
            "total": costs.memory,
            "fits": None if machine.memory is None else costs.memory <= machine.memory,
        },
        "steps": {
            name: None if cost is None else _cost(cost, machine) for name, cost in steps.items()
        },
        "time_to_first_token": costs.prefill.seconds(machine),
        "tokens_per_second": {
            str(rate): tokens_per_second(costs, levels, rate, machine) for rate in RATES
        },
    }


def _compiled(compiled: Compiled | TooLarge | str, machine: Machine) -> dict[str, Any]:
    if isinstance(compiled, str):
        return {"fits": None, "reason": compiled}
    if isinstance(compiled, TooLarge):
        return {"fits": False, "reason": compiled.reason}
    fits = None if machine.memory is None else compiled.memory <= machine.memory
    return {"fits": fits, "memory": compiled.memory} | asdict(compiled)


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print the result of as_dict() as tables."""
    ways = plan["ways"]
    machine = plan["machine"]
    console.print(
        f"[bold]{escape(plan['target']['name'])}[/] with draft [bold]{escape(plan['draft']['name'])}[/] on "
        f"{plan['topology']} ({plan['devices']} devices), {plan['dtype']}, caches of {ways[0]['capacity']} tokens, "
        f"{plan['num_speculative_tokens']} levels of {plan['tree_width']}"
    )
    console.print(f"[dim]Times and speeds are estimates, by {_parameters(machine)}[/]")
    for table in (_steps_table(plan), _memory_table(plan), _speed_table(plan)):
        console.print()
        console.print(table)
    console.print()
    _print_compiled(plan["compiled"], console)


def _parameters(machine: dict[str, Any]) -> str:
    return (
        f"{machine['bandwidth'] / 1e9:.4g} GB/s of memory, {machine['flops'] / 1e12:.3g} TFLOP/s, "
        f"{machine['link_bandwidth'] / 1e9:.4g} GB/s of links, {machine['latency'] * 1e6:.3g} µs a collective and "
        f"{machine['launch'] * 1e6:.3g} µs a kernel ({'measured here' if machine['origin'] == 'measured' else 'table'})"
    )


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _steps_table(plan: dict[str, Any]) -> Table:
    table = _table("per device", "kernels", "collectives", "sent", "memory traffic", "time")
    vanilla, *drafted = plan["ways"]
    nodes = 1 + plan["num_speculative_tokens"] * plan["tree_width"]

    def row(name: str, cost: dict[str, Any]) -> None:
        kernels, collectives, wire, read, seconds = (cost[column] for column in COLUMNS)
        sizes = f"{wire / 1e6:.3g} MB", f"{read / 2**30:.3g} GiB"
        table.add_row(escape(name), str(kernels), str(collectives), *sizes, _milliseconds(seconds))

    def section(title: str, name: str, ways: list[dict[str, Any]]) -> None:
        table.add_row(f"[bold]{title}[/]")
        for way in ways:
            if way["steps"][name]:
                row(f"  {way['label']}", way["steps"][name])

    table.add_row("[bold]target[/]")
    row("  plain step", vanilla["steps"]["step"])
    row(f"  verification of {nodes} tokens", plan["verification"])
    section("a draft step: exact of an ordinary draft, else fuzzy", "step", drafted)
    section(f"calibration, {plan['num_speculative_tokens'] + 1} tokens", "calibration", drafted)
    section(f"prefill of {plan['prompt_length']} tokens, both models", "prefill", plan["ways"])
    section("a whole round", "round", plan["ways"])
    return table


def _memory_table(plan: dict[str, Any]) -> Table:
    limit = plan["machine"]["memory"]
    table = _table(
        "memory per device", "mesh", "target", "draft", "caches", "total", "of the device"
    )
    for way in plan["ways"]:
        memory = way["memory"]
        sizes = [_gib(memory[name]) for name in ("target", "draft", "caches", "total")]
        share = "–" if limit is None else f"{memory['total'] / limit:.0%}"
        share = f"[red]{share}, does not fit[/]" if memory["fits"] is False else share
        mesh = f"{way['mesh']['layer']} × {way['mesh']['tensor']}"
        table.add_row(escape(way["label"]), mesh, *sizes, share)
    return table


def _speed_table(plan: dict[str, Any]) -> Table:
    """The best of a column is marked; a way's own acceptance rate decides which column is its."""
    names = list(plan["ways"][0]["tokens_per_second"])
    table = _table("estimated tokens/s at acceptance rate", *names)
    best = {name: max(way["tokens_per_second"][name] for way in plan["ways"]) for name in names}
    for way in plan["ways"]:
        speeds = [(way["tokens_per_second"][name], best[name]) for name in names]
        cells = [
            f"[bold green]*{speed:.1f}[/]" if speed == most else f"{speed:.1f}"
            for speed, most in speeds
        ]
        table.add_row(escape(way["label"]), *cells)
    return table


def _print_compiled(compiled: dict[str, Any], console: Console) -> None:
    if "memory" not in compiled:
        verdict = "[red]does not fit[/]: " if compiled["fits"] is False else "not compiled: "
        console.print(f"[bold]{compiled['way']}[/] {verdict}{escape(compiled['reason'])}")
        return
    sizes = [
        f"{name} {_gib(compiled[name])}"
        for name in ("arguments", "donated", "results", "temporaries", "code", "memory")
    ]
    fits = {True: " [green]fits[/]", False: " [red]does not fit[/]", None: ""}[compiled["fits"]]
    console.print(f"[bold]{compiled['way']}[/], compiled by XLA: {', '.join(sizes)}{fits}")
    console.print(
        f"  collectives in its text {_counts(compiled['collectives'])}; in the trace "
        f"{_counts(compiled['traced_collectives'])} (a loop's once)"
    )
    optimal = compiled["optimal_seconds"]
    extra = (
        ""
        if optimal is None
        else f"; XLA's optimal_seconds, which decides nothing here: {_milliseconds(optimal)}"
    )
    console.print(
        f"  traced in {compiled['trace_seconds']:.1f} s, compiled in {compiled['compile_seconds']:.1f} s{extra}"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "none"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
