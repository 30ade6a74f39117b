"""Output about a text, on stderr: the summary line, the comparison, the devices."""

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyspec_jax.checkpoint.translated import Translated
from easyspec_jax.decode.stats import Stats
from easyspec_jax.draft.grouping import format_layout, position_of
from easyspec_jax.engine.abstract import abstract_state, bytes_of_shard
from easyspec_jax.engine.completion import batched
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import LAYER, TENSOR

if TYPE_CHECKING:
    from easyspec_jax.engine.completion import Completion
    from easyspec_jax.engine.engine import Engine, Preparation


def total(completions: Sequence["Completion"], batch_size: int = 1) -> Stats:
    """Add up the figures of one or more completions. Those of a batch ran at the same time."""
    stats = [completion.stats for completion in completions]
    return reduce(
        Stats.__add__, (reduce(Stats.in_parallel, batch) for batch in batched(stats, batch_size))
    )


def print_summary(
    completions: Sequence["Completion"], engine: "Engine", batch_size: int = 1
) -> None:
    """Print one line: how fast it was, and what speculation gained."""
    stats = total(completions, batch_size)
    fields = [
        f"{sum(len(completion.token_ids) for completion in completions)} tokens",
        f"[bold green]{stats.tokens_per_second:.1f} tokens/s[/]",
    ]
    if stats.drafted:
        fields += [
            f"[bold]{stats.mean_acceptance_length:.2f}[/] tokens a round",
            f"acceptance rate {stats.acceptance_rate:.2f}",
        ]
    if stats.forced:
        fields.append(f"{stats.forced} tokens forced")
    if engine.speculative.prompt_lookup and stats.accepted:
        fields.append(f"{stats.lookup_accepted / stats.accepted:.0%} of accepted looked up")
    if stats.tiers:
        levels = "/".join(str(tier.num_speculative_tokens) for tier in stats.tiers)
        counts = "/".join(str(tier.rounds) for tier in stats.tiers)
        fields.append(f"{counts} rounds of {levels} levels")
    cached = f", {stats.cached_tokens} tokens cached" if stats.cached_tokens else ""
    fields.append(f"prefill {stats.prefill_seconds:.2f} s{cached}")
    fields.append(f"{_method(engine)} on {_mesh(engine)}")
    _console().print("[dim]—[/] " + " · ".join(fields))


def print_comparison(
    completions: Sequence["Completion"],
    plain: Sequence["Completion"],
    engine: "Engine",
    batch_size: int = 1,
) -> None:
    """Print the same prompts decoded in both ways, side by side, and the gain."""
    table = Table("", "tokens/s", "tokens a round", "acceptance rate", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    ways = (
        (_method(engine), total(completions, batch_size)),
        ("vanilla", total(plain, batch_size)),
    )
    for name, stats in ways:
        drafted = (
            [f"{stats.mean_acceptance_length:.2f}", f"{stats.acceptance_rate:.2f}"]
            if stats.drafted
            else []
        )
        table.add_row(name, f"{stats.tokens_per_second:.1f}", *drafted)
    console = _console()
    console.print(table)
    ratio = speedup(*(stats for _, stats in ways))
    colour = "green" if ratio > 1 else "yellow"
    # In float32 all are the same; in narrower types a near tie may fall either way.
    same = sum(a.token_ids == b.token_ids for a, b in zip(completions, plain, strict=True))
    if len(plain) > 1:
        tokens = f"same tokens for {same} of {len(plain)} prompts"
    else:
        tokens = "same tokens" if same else "other tokens"
    gain = [f"[bold {colour}]{ratio:.2f} ×[/] plain decoding"] if ratio else []
    console.print("[dim]—[/] " + " · ".join([*gain, tokens, _mesh(engine)]))


def speedup(stats: Stats, plain: Stats) -> float:
    """Return the ratio of the speeds; 0 if there was nothing to decode."""
    return stats.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else 0.0


def print_devices(
    engine: "Engine", sampling: SamplingParams, prepared: "Preparation", rows: int
) -> None:
    """Print the mesh, the groups, times, and the layers and bytes that each device holds.

    Nothing is allocated: caches are counted by their shapes.

    Args:
        engine: The models.
        sampling: How texts are sampled.
        prepared: The result of Engine.compile().
        rows: Texts decoded together.
    """
    capacity = prepared.capacities[-1]
    state = abstract_state(engine.programs(sampling), rows, capacity)
    target, draft = engine.load()
    columns = [_bytes_per_device(tree) for tree in (target, draft, (state.target, state.draft))]
    texts = "" if rows == 1 else f"{rows} × "
    caches = f"KV of {texts}{capacity} tokens"
    table = Table("device", "grouped draft layers", "target", "draft", caches, box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for place, device in enumerate(engine.mesh.devices.flat):
        # Devices of a 4 × 2 mesh: number 5 is at position 5 // 2 = 2 of the layer axis.
        layers = _layers_at(place // engine.mesh.shape[TENSOR], engine)
        sizes = [f"{column[device] / 2**20:.1f} MiB" for column in columns]
        table.add_row(f"{device.platform}:{device.id}", " ".join(map(str, layers)) or "–", *sizes)
    console = _console()
    refit = "" if engine.refit is None else " · refit"
    groups = format_layout(engine.layout) or "none"
    kept = f" ({engine.kept_weights})" if engine.kept_weights else ""
    caches = "" if engine.kv_dtype == "auto" else f", caches {engine.kv_dtype}"
    console.print(f"mesh {_mesh(engine)} · {engine.dtype}{kept}{caches} · groups {groups}{refit}")
    console.print(
        f"loaded in {prepared.load_seconds:.2f} s · compiled in {prepared.compile_seconds:.2f} s"
    )
    console.print(table)
    if engine.draft is not None and isinstance(engine.draft.source, Translated):
        known = engine.draft.source.known
        console.print(
            f"the draft has another tokenizer, and {known.sum():,} of the target's "
            f"{known.size:,} tokens"
        )
    if engine.prefixes is not None:
        tokens = engine.prefixes.limit // engine.prefixes.entry_bytes
        console.print(f"prefixes of up to {tokens} tokens in {engine.prefix_cache / 2**20:.0f} MiB")


def print_note(text: str) -> None:
    """Print a line that is neither text nor an error."""
    _console().print(f"[dim]—[/] {escape(text)}")


def print_example(prompt: str) -> None:
    """Print the bundled pair's example prompt, which its text continues."""
    _console().print(f"[dim]{escape(prompt)}[/]", end="")


def _layers_at(position: int, engine: "Engine") -> list[int]:
    """Return the grouped layers whose attention is at a position of the layer axis."""
    axis = engine.mesh.shape[LAYER]
    groups = [group for group in engine.layout.groups if len(group) > 1]
    return [
        layer for group in groups for layer in group if position_of(layer, group, axis) == position
    ]


def _bytes_per_device(tree: Any) -> Counter[Any]:
    """Return the bytes held on each device, including devices of other processes."""
    held = Counter[Any]()
    for leaf in jax.tree.leaves(tree):
        # Shards of one array have one size, and every device of its mesh holds one.
        held.update(dict.fromkeys(leaf.sharding.device_set, bytes_of_shard(leaf)))
    return held


def _method(engine: "Engine") -> str:
    lookup = ", prompt lookup" if engine.speculative.prompt_lookup else ""
    return engine.speculative.method + ("" if engine.refit is None else ", refit") + lookup


def _mesh(engine: "Engine") -> str:
    devices = engine.mesh.devices
    virtual = (
        " of virtual CPU devices" if devices.size > 1 and devices.flat[0].platform == "cpu" else ""
    )
    return ",".join(f"{axis}={size}" for axis, size in engine.mesh.shape.items()) + virtual


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)
