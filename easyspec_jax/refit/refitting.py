"""One refit from a draft's directory to the file beside it, and what it is worth on texts it was not fitted on."""

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from easyspec_jax.checkpoint.directory import Checkpoint, open_checkpoint
from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.round import RoundConfig
from easyspec_jax.draft.grouping import Layout, format_layout, layout_of
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.draft.refit_file import DIRECTORY, find, load, path_of, save
from easyspec_jax.draft.sites import Tensors
from easyspec_jax.engine.engine import Engine
from easyspec_jax.engine.pair import open_model
from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import check_writable
from easyspec_jax.model.loader import Loader
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.parallel.mesh import ALL_AXES, parse_mesh
from easyspec_jax.progress import bar
from easyspec_jax.refit.borders import best_layout, measure_groups, sizes_to_try
from easyspec_jax.refit.distill import distill
from easyspec_jax.refit.fidelity import DEPTHS, fidelity
from easyspec_jax.refit.fit import fit
from easyspec_jax.refit.texts import LENGTH, answer_prompts, read_texts, write_texts

HELD_OUT = 0.1
"""Of the texts, to see what the refit is worth."""

Ways = dict[str, tuple[Layout, Held | None]]
"""To draft, by name: what runs at once, and with which refit."""


def refit(
    args: argparse.Namespace,
    speculative: SpeculativeConfig,
    sampling: SamplingParams,
    prompts: list[str] | None,
) -> None:
    """Fit, save, and say what was gained.

    Args:
        args: The command's flags.
        speculative: Which layers run together.
        sampling: How the draft writes what it is fitted on.
        prompts: What it answers for that, if not a text or what it writes by itself.

    Raises:
        EasySpecError: It could not be done; nothing has been computed yet.
    """
    draft = open_checkpoint(args.draft, allow_links=args.allow_links)
    layout = layout_of(speculative, draft.config.num_hidden_layers)
    if layout.lp_size == 1:
        raise EasySpecError(
            "in groups of one layer nothing is stale; give an --lp-size of at least 2"
        )
    directory = args.out or draft.directory / DIRECTORY
    path = path_of(directory, speculative, layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    found = _resumed(find(directory, speculative, layout), draft) if args.resume else None
    engine = _open(args, layout)
    texts = _texts(args, engine, sampling, prompts)
    held_out = max(1, round(HELD_OUT * len(texts)))
    loader = engine.loader(draft, ALL_AXES)
    fitted, tensors = found or _fitted(args, loader, layout, texts[held_out:])
    ways: Ways = {"as it was": (layout, None), "refit": (fitted, Held(tensors))}
    if args.distill:
        tensors = distill(loader, fitted, tensors, texts[held_out:], args.distill, bar)
        ways["distilled"] = fitted, Held(tensors)
    save(path, tensors, fitted, draft)
    _report(loader, ways, texts[:held_out])
    size = path.stat().st_size / 2**20
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[dim]—[/] {path}: {size:.1f} MiB")


def _resumed(path: Path, draft: Checkpoint) -> tuple[Layout, Tensors]:
    if not path.is_file():
        raise EasySpecError(f"there is no {path} to go on from; leave out --resume")
    layout, held = load(path, draft)
    return layout, {name: tensor.astype(np.float32) for name, tensor in held.tensors.items()}


def _fitted(
    args: argparse.Namespace, loader: Loader, layout: Layout, texts: Int[np.ndarray, "texts tokens"]
) -> tuple[Layout, Tensors]:
    """layout: of the flags, whose groups are moved to where they cost least unless they were asked for."""
    if args.borders == "measured" and args.lp_strategy is None:
        tried = sizes_to_try(layout.lp_size, args.mlp_lp_size)
        overlaps = measure_groups(loader, layout.lp_size, tried, texts, args.ridge, bar)
        layout = best_layout(
            overlaps, loader.config.num_hidden_layers, layout.lp_size, args.mlp_lp_size
        )
    return layout, fit(loader, layout, texts, args.ridge, bar)


def _open(args: argparse.Namespace, layout: Layout) -> Engine:
    """The draft as a model that speaks for itself, on the mesh on which it will draft."""
    shape = parse_mesh(args.mesh, group_size=layout.lp_size)
    mesh = f"layer={shape.layer},tensor={shape.tensor}"
    vanilla = SpeculativeConfig(method="vanilla")
    return open_model(
        args.draft,
        mesh=mesh,
        platform=args.platform,
        speculative=vanilla,
        dtype=args.dtype,
        allow_links=args.allow_links,
    )


def _texts(
    args: argparse.Namespace, engine: Engine, sampling: SamplingParams, prompts: list[str] | None
) -> Int[np.ndarray, "texts tokens"]:
    count = -(-args.tokens // LENGTH)
    if args.text is not None:
        return read_texts(args.text, engine.tokenizer, count)
    if prompts is not None:
        return answer_prompts(engine, prompts, count, sampling, args.chat, bar)
    config = RoundConfig.of(engine.speculative, sampling, stop_ids=())
    programs = Programs(engine.mesh, engine.load(bar)[0], None, config)
    return write_texts(programs, engine.tokenizer, count, sampling, bar)


def _report(loader: Loader, ways: Ways, texts: Int[np.ndarray, "texts tokens"]) -> None:
    """A table of what fuzzy drafts keep of the exact one's distribution."""
    everywhere = np.ones(texts.shape, bool)
    table = Table(
        "draft", *(f"depth {depth + 1}" for depth in range(DEPTHS)), box=None, pad_edge=False
    )
    with bar("Comparing", len(ways)) as advance:
        for name, (layout, refitted) in ways.items():
            overlaps, _ = fidelity(
                load_draft(loader, layout, refitted), loader.mesh, texts, everywhere
            )
            table.add_row(name, *(f"{overlap:.3f}" for overlap in overlaps))
            advance(1)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("Σ min(p fuzzy, p exact) on texts that were not fitted on")
    console.print(table)
    before, *_, after = (format_layout(layout) for layout, _ in ways.values())
    console.print(f"[dim]—[/] groups {before}, now {after}")
