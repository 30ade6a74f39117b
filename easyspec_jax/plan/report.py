"""A plan as JSON's types, and those as tables: what `--json` prints is what the tables show."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyspec_jax.plan.ahead import Compiled, TooLarge
from easyspec_jax.plan.best import Best, Choice
from easyspec_jax.plan.configurations import parameter_count
from easyspec_jax.plan.cost import Cost
from easyspec_jax.plan.machines import Machine
from easyspec_jax.plan.planning import Plan
from easyspec_jax.plan.steps import Costs

RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Acceptance rates (accepted over drafted levels) that speeds are projected for."""

SHOWN = 8
"""Rows of the table of choices; the object has all."""


def tokens_per_second(costs: Costs, levels: int, rate: float, machine: Machine) -> float:
    """Estimate the speed of one stream.

    Args:
        costs: The way of decoding.
        levels: Levels drafted per round.
        rate: Acceptance rate, accepted over drafted levels.
        machine: The device.
    """
    # A round yields one token of the target's own and the accepted ones: 5 levels at a rate of 0.8
    # yield 1 + 4. Plain decoding drafts nothing.
    accepted = 0.0 if costs.way.method == "vanilla" else rate * levels
    return (1 + accepted) / costs.round.seconds(machine)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Convert a plan to JSON's types, as `--json` prints it.

    Bytes are per device; seconds and speeds are estimates. With measured acceptance, `best` has the
    best number of levels of each way and tree width that the file has, the fastest first, and
    `at_levels` the fastest at `num_speculative_tokens` levels.
    """
    pair, machine = plan.pair, plan.topology.machine
    return {
        "estimates": True,
        "topology": plan.topology.name,
        "devices": plan.topology.devices,
        "machine": asdict(machine),
        "target": {"name": plan.target_name, "parameters": parameter_count(pair.target)},
        "draft": {"name": plan.draft_name, "parameters": parameter_count(pair.draft)},
        "dtype": str(pair.dtype),
        "weights": pair.weights[0],
        "draft_weights": pair.weights[1],
        "kv_dtype": pair.kv_dtype,
        "prompt_length": pair.prompt_length,
        "max_length": pair.max_length,
        "num_speculative_tokens": pair.num_speculative_tokens,
        "tree_width": pair.tree_width,
        "verification": _cost(plan.verification, machine),
        "ways": [_way(costs, plan) for costs in plan.costs],
        "tiers": {
            "way": plan.compiled_way.label,
            "tiers": [
                {"num_speculative_tokens": own.levels, "round_seconds": own.seconds}
                | {"pays_from": own.pays_from}
                for own in plan.tiers
            ],
        },
        "compiled": {"way": plan.compiled_way.label} | _compiled(plan.compiled, machine),
        "best": None if plan.best is None else _best(plan.best, plan),
    }


def _cost(cost: Cost, machine: Machine) -> dict[str, Any]:
    return asdict(cost) | {"seconds": cost.seconds(machine)}


def _way(costs: Costs, plan: Plan) -> dict[str, Any]:
    machine, levels = plan.topology.machine, plan.pair.num_speculative_tokens
    speeds = {}
    for rate in RATES:
        speeds[str(rate)] = tokens_per_second(costs, levels, rate, machine)
    calibration = None if costs.calibration is None else _cost(costs.calibration, machine)
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
            "fits": machine.fits(costs.memory),
        },
        "steps": {
            "step": _cost(costs.step, machine),
            "calibration": calibration,
            "prefill": _cost(costs.prefill, machine),
            "round": _cost(costs.round, machine),
        },
        "time_to_first_token": costs.first_token.seconds(machine),
        "tokens_per_second": speeds,
    }


def _compiled(compiled: Compiled | TooLarge | str | None, machine: Machine) -> dict[str, Any]:
    if compiled is None:
        return {"fits": None, "reason": "--no-compile"}
    if isinstance(compiled, str):
        return {"fits": None, "reason": compiled}
    if isinstance(compiled, TooLarge):
        return {"fits": False, "reason": compiled.reason}
    fits = machine.fits(compiled.memory)
    return {"fits": fits, "memory": compiled.memory} | asdict(compiled)


def _best(best: Best, plan: Plan) -> dict[str, Any]:
    measured, levels = best.measured, plan.pair.num_speculative_tokens
    ways = []
    for depths, choice in zip(best.by_depth, best.choices, strict=True):
        speeds = [one.tokens_per_second for one in depths]
        of_way = {"at_levels": speeds[levels - 1], "tokens_per_second_by_levels": speeds}
        ways.append(_choice(choice) | of_way)
    return {
        "file": measured.file,
        "target": measured.target,
        "draft": measured.draft,
        "drafts": [kind.label for kind in measured.kinds],
        "tree_widths": measured.tree_widths,
        "left_out": [kind.label for kind in measured.left_out],
        "plain_tokens_per_second": 1 / plan.costs[0].round.seconds(plan.topology.machine),
        "ways": ways,
        "at_levels": _choice(best.at_levels),
        "gain": best.choices[0].tokens_per_second / best.at_levels.tokens_per_second,
    }


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "label": choice.way.label,
        **asdict(choice.way),
        "tree_width": choice.tree_width,
        "num_speculative_tokens": choice.levels,
        "extrapolated": choice.extrapolated,
        "tokens_per_round": choice.tokens,
        "round_seconds": choice.seconds,
        "tokens_per_second": choice.tokens_per_second,
        "memory": choice.memory,
        "fits": choice.fits,
    }


def _types(plan: dict[str, Any]) -> str:
    """Name the type to compute in, and those of matrices that are kept in another one."""
    kept = {"target": plan["weights"], "draft": plan["draft_weights"]}
    named = [f"{role} {weights}" for role, weights in kept.items() if weights]
    return plan["dtype"] + (f" ({', '.join(named)})" if named else "")


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print the result of `as_dict` as tables."""
    # Names come from files, and rich would take their brackets for markup.
    target, draft = (f"[bold]{escape(plan[model]['name'])}[/]" for model in ("target", "draft"))
    kind = "" if plan["kv_dtype"] == "auto" else f"{plan['kv_dtype']} "
    console.print(
        f"{target} with draft {draft} on {plan['topology']} ({_devices(plan['devices'])}), "
        f"{_types(plan)}, {kind}caches of {plan['ways'][-1]['capacity']} tokens, "
        f"{plan['num_speculative_tokens']} levels of {plan['tree_width']}"
    )
    console.print(f"[dim]Times and speeds are estimates, by {_parameters(plan['machine'])}[/]")
    for table in (_steps_table(plan), _memory_table(plan), _speed_table(plan)):
        console.print()
        console.print(table)
    console.print(_tiers(plan["tiers"]))
    if plan["best"] is not None:
        console.print()
        _print_best(plan["best"], plan["num_speculative_tokens"], console)
    console.print()
    _print_compiled(plan["compiled"], console)


def _parameters(machine: dict[str, Any]) -> str:
    origin = "measured here" if machine["origin"] == "measured" else "table"
    return (
        f"{machine['bandwidth'] / 1e9:.4g} GB/s of memory, {machine['flops'] / 1e12:.3g} TFLOP/s, "
        f"{machine['link_bandwidth'] / 1e9:.4g} GB/s of links, "
        f"{machine['latency'] * 1e6:.3g} µs a collective and "
        f"{machine['launch'] * 1e6:.3g} µs a kernel ({origin})"
    )


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    # The first column is text, and figures are easier to compare with their units aligned.
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _steps_table(plan: dict[str, Any]) -> Table:
    table = _table("per device", "kernels", "collectives", "sent", "memory traffic", "time")
    vanilla, *drafted = plan["ways"]
    # The target verifies the text's last token together with the drafted ones.
    nodes = 1 + plan["num_speculative_tokens"] * plan["tree_width"]

    def row(name: str, cost: dict[str, Any]) -> None:
        table.add_row(
            escape(name),
            str(cost["kernels"]),
            str(cost["collectives"]),
            # Links are sold in units of 1000, memory in units of 1024.
            f"{cost['wire_bytes'] / 1e6:.3g} MB",
            f"{cost['bytes'] / 2**30:.3g} GiB",
            _milliseconds(cost["seconds"]),
        )

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
        # A CPU's memory is its host's, of which the table knows nothing.
        share = "–" if limit is None else f"{memory['total'] / limit:.0%}"
        share = f"[red]{share}, does not fit[/]" if memory["fits"] is False else share
        mesh = f"{way['mesh']['layer']} × {way['mesh']['tensor']}"
        table.add_row(escape(way["label"]), mesh, *sizes, share)
    return table


def _speed_table(plan: dict[str, Any]) -> Table:
    """Make the table of speeds, in which the best of each column that fits is marked.

    A row is to be read at the acceptance rate that its way of decoding reaches.
    """
    rates = list(plan["ways"][0]["tokens_per_second"])
    table = _table("estimated tokens/s at acceptance rate", *rates)
    fitting = [way for way in plan["ways"] if way["memory"]["fits"] is not False]
    speeds = [way["tokens_per_second"] for way in fitting]
    best = {rate: max((own[rate] for own in speeds), default=None) for rate in rates}
    for way in plan["ways"]:
        cells, fits = [], way["memory"]["fits"] is not False
        for rate in rates:
            speed = way["tokens_per_second"][rate]
            is_best = fits and speed == best[rate]
            cells.append(f"[bold green]*{speed:.1f}[/]" if is_best else f"{speed:.1f}")
        table.add_row(escape(way["label"]), *cells)
    return table


def _tiers(found: dict[str, Any]) -> str:
    """Say how likely a level must be for rounds that adapt to draft."""
    parts = []
    for tier in sorted(found["tiers"], key=lambda tier: tier["pays_from"] or 0.0):
        levels, least = tier["num_speculative_tokens"], tier["pays_from"]
        if least is not None:
            name = f"{levels} levels" if levels else "plain decoding"
            parts.append(f"{name} from {least:.2f}" if least else name)
    return (
        f"[bold]{escape(found['way'])}, --adapt on[/], by how likely a level is accepted after the "
        f"one above: {', '.join(parts)}"
    )


def _print_best(best: dict[str, Any], levels: int, console: Console) -> None:
    """Print the best choices by measured acceptance, and what another number of levels gains."""
    target, draft, file = (escape(best[name]) for name in ("target", "draft", "file"))
    console.print(
        f"Acceptance of {draft} as measured with {target} ({file}): "
        f"{', '.join(best['drafts'])}; width {', '.join(map(str, best['tree_widths']))}. "
        "Nothing else is considered, and whole trees are verified."
    )
    if target == draft:
        console.print("A model that drafts for itself: its exact draft is accepted nearly always.")
    if best["left_out"]:
        console.print(f"Left out, as the draft has fewer layers: {', '.join(best['left_out'])}")
    table = _table(
        "best by estimate",
        "width",
        "levels",
        "tokens a round",
        "round",
        "tokens/s",
        f"at {levels} levels",
    )
    for choice in best["ways"][:SHOWN]:
        table.add_row(*_choice_cells(choice), f"{choice['at_levels']:.1f}")
    table.add_row("plain decoding", "", "", "1", "", f"{best['plain_tokens_per_second']:.1f}", "")
    console.print(table)
    more = len(best["ways"]) - SHOWN
    notes = ["* more levels than were measured: acceptance is extrapolated"]
    if more > 0:
        notes.append(f"{more} more in --json")
    console.print(f"[dim]{'; '.join(notes)}[/]")
    _print_gain(best, console)


def _choice_cells(choice: dict[str, Any]) -> list[str]:
    unfit = "" if choice["fits"] is not False else " [red]does not fit[/]"
    extrapolated = "*" if choice["extrapolated"] else ""
    return [
        escape(choice["label"]) + unfit,
        str(choice["tree_width"]),
        f"{extrapolated}{choice['num_speculative_tokens']}",
        f"{choice['tokens_per_round']:.2f}",
        _milliseconds(choice["round_seconds"]),
        f"{choice['tokens_per_second']:.1f}",
    ]


def _print_gain(best: dict[str, Any], console: Console) -> None:
    choice, other, plain = best["ways"][0], best["at_levels"], best["plain_tokens_per_second"]
    if choice["tokens_per_second"] <= plain:
        console.print("Best: [bold]plain decoding[/]; by estimate no draft is faster")
        return
    console.print(
        f"Best: [bold]{_named(choice)}[/], by estimate {choice['tokens_per_second']:.1f} tokens/s: "
        f"{best['gain']:.2f} × the best of {other['num_speculative_tokens']} levels "
        f"({_named(other)}, {other['tokens_per_second']:.1f}) and "
        f"{choice['tokens_per_second'] / plain:.2f} × plain decoding"
    )


def _named(choice: dict[str, Any]) -> str:
    levels = choice["num_speculative_tokens"]
    depth = "1 level" if levels == 1 else f"{levels} levels"
    return f"{escape(choice['label'])}, width {choice['tree_width']}, {depth}"


def _print_compiled(compiled: dict[str, Any], console: Console) -> None:
    if "memory" not in compiled:
        verdict = "[red]does not fit[/]: " if compiled["fits"] is False else "not compiled: "
        console.print(f"[bold]{compiled['way']}[/] {verdict}{escape(compiled['reason'])}")
        return
    names = ("arguments", "donated", "results", "temporaries", "code", "memory")
    sizes = ", ".join(f"{name} {_gib(compiled[name])}" for name in names)
    fits = {True: " [green]fits[/]", False: " [red]does not fit[/]", None: ""}[compiled["fits"]]
    console.print(f"[bold]{compiled['way']}[/], compiled by XLA: {sizes}{fits}")
    console.print(
        f"  collectives in its text {_counts(compiled['collectives'])}; in the trace "
        f"{_counts(compiled['traced_collectives'])} (a loop's once)"
    )
    times = (
        f"traced in {compiled['trace_seconds']:.1f} s, "
        f"compiled in {compiled['compile_seconds']:.1f} s"
    )
    if compiled["optimal_seconds"] is not None:
        optimal = _milliseconds(compiled["optimal_seconds"])
        times += f"; XLA's optimal_seconds, which decides nothing here: {optimal}"
    console.print(f"  {times}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "none"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
