"""From a draft and a RefitConfig to a refit on disk, and a measure of what it gains."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.checkpoint.directory import Checkpoint
from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.draft.refit_file import DIRECTORY, find, load, path_of, save
from easyspec_jax.draft.sites import Tensors
from easyspec_jax.engine.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import check_writable
from easyspec_jax.model.loader import Loader
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.refit.borders import (
    Overlaps,
    best_layout,
    candidates,
    measure_groups,
    sizes_to_try,
)
from easyspec_jax.refit.distill import distill
from easyspec_jax.refit.fidelity import fidelity
from easyspec_jax.refit.fit import fit
from easyspec_jax.refit.options import RefitConfig
from easyspec_jax.refit.overlaps_file import BORDERS, overlaps_key, read_overlaps, write_overlaps
from easyspec_jax.refit.texts import (
    LENGTH,
    answer_prompts,
    check_answers,
    opening,
    read_texts,
    write_texts,
)
from easyspec_jax.refit.texts_file import TEXTS, keep_written, read_written, texts_key

HELD_OUT = 0.1
"""Share of the texts that are not fitted on, but kept to compare drafts."""

Drafts = dict[str, tuple[Layout, Held | None]]
"""Drafts to compare by name: their groups, and the refit they use."""


@dataclass(frozen=True)
class Refitted:
    """A refit on disk, and how close to the exact draft it drafts.

    Attributes:
        path: The file.
        before: Groups of the draft as it was.
        after: Groups of the refit. They differ from `before` where borders were measured.
        overlaps: The mean of Σ min(p fuzzy, p exact) at draft depths 1, 2, 3 and 4, on texts that
            were not fitted on: for the draft "as it was", with its "refit" and, if the config asks
            for it, "distilled".
        nbytes: Size of the file.
    """

    path: Path
    before: Layout
    after: Layout
    overlaps: Mapping[str, tuple[float, ...]]
    nbytes: int


def refit(pair: Engine, config: RefitConfig, *, bar: Bar = no_bar) -> Refitted:
    """Fit a draft's stale projections, write them to disk and compare the draft with and without.

    All that can be checked is checked before any weight is read. Nothing is printed.

    Args:
        pair: An engine with a draft, which is fitted as a model of its own on the engine's mesh; or
            the draft opened by itself, with `SpeculativeConfig(method="vanilla")`, unless the
            target is to answer the prompts.
        config: The groups, the texts and the method.
        bar: Shows progress.

    Returns:
        The file and the figures.

    Raises:
        EasySpecError: The draft cannot have these groups, texts or prompts are unfit or too few,
            `resume` finds no refit, `answered_by` names a target that is missing, or answering the
            prompts would not fit in memory.
        OSError: `out` is not a writable directory.

    Examples:
        >>> pair = open_model("TARGET", "DRAFT", mesh="8")  # doctest: +SKIP
        >>> fitted = refit(pair, RefitConfig(lp_size=4))  # doctest: +SKIP
        >>> fitted.overlaps["refit"][0] > fitted.overlaps["as it was"][0]  # doctest: +SKIP
        True
    """
    if config.answered_by == "target" and pair.draft is None:
        raise EasySpecError("`answered_by` target needs a pair: open the target with its draft")
    engine = pair.draft_alone()
    draft = engine.target
    if draft.config.mixture is not None:
        raise EasySpecError("a mixture of experts cannot be refitted; choose a dense draft")
    before = config.layout(draft.config.num_hidden_layers)
    directory = draft.directory / DIRECTORY if config.out is None else Path(config.out)
    path = path_of(directory, config.speculative_config(), before)
    # Read before anything is created, so that a bad text leaves nothing behind.
    texts = None
    if config.text is not None:
        texts = read_texts(Path(config.text), engine.tokenizer, ceil_div(config.tokens, LENGTH))
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    resumed = None
    if config.resume:
        resumed = _resumed(find(directory, config.speculative_config(), before), draft)

    if texts is None:
        texts = _written(pair, engine, config, directory / TEXTS, bar)
    # Neither the fit nor the choice of borders sees the texts that drafts are compared on.
    held_out = max(1, round(HELD_OUT * len(texts)))
    compared_on, fitted_on = texts[:held_out], texts[held_out:]
    # Distillation follows gradients through weights and caches, and rounded ones have none.
    loader = replace(engine.loader(draft, ALL_AXES), kv_dtype="auto", weights=None)
    if resumed is None:
        key = overlaps_key(draft.fingerprint, loader.dtype.name, fitted_on, config.ridge)
        borders = directory / BORDERS, key
        after, tensors = _fitted(loader, before, config, fitted_on, borders, bar)
    else:
        after, tensors = resumed
    drafts: Drafts = {"as it was": (before, None), "refit": (after, Held(tensors))}
    # Saved before anything else takes time: what is interrupted then does not lose the fit.
    save(path, tensors, after, draft)
    if config.distill:
        tensors = distill(loader, after, tensors, fitted_on, config.distill, bar)
        if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
            raise EasySpecError(
                f"distillation has diverged; {path} holds the refit that it began with"
            )
        drafts["distilled"] = after, Held(tensors)
        save(path, tensors, after, draft)
    overlaps = _compared(loader, drafts, compared_on, bar)
    return Refitted(path, before, after, overlaps, path.stat().st_size)


def _resumed(path: Path, draft: Checkpoint) -> tuple[Layout, Tensors]:
    """Read the refit to go on from; its file has the draft's dtype, but training needs float32."""
    if not path.is_file():
        raise EasySpecError(
            f"{path} does not exist, so there is nothing to resume; leave out `resume`"
        )
    layout, held = load(path, draft)
    return layout, {name: tensor.astype(np.float32) for name, tensor in held.tensors.items()}


def _fitted(
    loader: Loader,
    layout: Layout,
    config: RefitConfig,
    texts: Int[np.ndarray, "texts tokens"],
    borders: tuple[Path, str],
    bar: Bar,
) -> tuple[Layout, Tensors]:
    """Fit a layout, whose borders are measured first unless the config fixes them."""
    if config.borders == "measured" and config.lp_strategy is None:
        # The size asked for: the paper's rule may form no group as large as that.
        lp_size, mlp_lp_size = config.lp_size, config.mlp_lp_size
        overlaps = _measured(loader, lp_size, config, texts, borders, bar)
        layout = best_layout(overlaps, loader.config.num_hidden_layers, lp_size, mlp_lp_size)
    return layout, fit(loader, layout, texts, config.ridge, bar)


def _measured(
    loader: Loader,
    lp_size: int,
    config: RefitConfig,
    texts: Int[np.ndarray, "texts tokens"],
    borders: tuple[Path, str],
    bar: Bar,
) -> Overlaps:
    """Return the overlaps of all candidate groups; measure them unless the file has them all."""
    tried = sizes_to_try(lp_size, config.mlp_lp_size)
    wanted = candidates(loader.config.num_hidden_layers, lp_size, tried)
    known = dict(read_overlaps(*borders))
    if not wanted <= known.keys():
        known |= measure_groups(loader, lp_size, tried, texts, config.ridge, bar)
        write_overlaps(*borders, known)
    return {candidate: known[candidate] for candidate in wanted}


def _written(
    pair: Engine, draft: Engine, config: RefitConfig, path: Path, bar: Bar
) -> Int[np.ndarray, "texts tokens"]:
    """Let a model write texts or answer the prompts, unless `path` has its texts already."""
    count = ceil_div(config.tokens, LENGTH)
    sampling, vocabulary = config.sampling_params(), draft.target.config.vocab_size
    if config.prompts is None:
        # Without stop ids every text reaches its full length.
        writer, starts, stop_ids = draft, [opening(draft.tokenizer)], ()
    else:
        writer = pair.target_alone() if config.answered_by == "target" else draft
        starts = [writer.encode(prompt, config.chat) for prompt in config.prompts]
        stop_ids = writer.target.config.stop_ids
        check_answers(writer, starts, sampling)
    # Reads all weights, so nothing that can be checked before comes after.
    key = texts_key(writer, starts, stop_ids, count, sampling, vocabulary)
    texts = read_written(path, key)
    if texts is not None:
        return texts
    if config.prompts is None:
        round_config = RoundConfig.of(draft.speculative, sampling, stop_ids)
        programs = Programs(writer.mesh, writer.load(bar)[0], None, round_config)
        texts = write_texts(programs, writer.tokenizer, count, sampling, bar)
    else:
        prompts, chat = config.prompts, config.chat
        texts = answer_prompts(writer, prompts, count, sampling, chat, vocabulary, bar)
    keep_written(path, key, texts)
    return texts


def _compared(
    loader: Loader, drafts: Drafts, texts: Int[np.ndarray, "texts tokens"], bar: Bar
) -> dict[str, tuple[float, ...]]:
    """Measure how much of the exact draft's distribution each fuzzy draft keeps, by depth."""
    everywhere = np.ones(texts.shape, bool)
    kept: dict[str, tuple[float, ...]] = {}
    with bar("Comparing", len(drafts)) as advance:
        for name, (layout, held) in drafts.items():
            draft = load_draft(loader, layout, held)
            overlaps, _ = fidelity(draft, loader.mesh, texts, everywhere)
            kept[name] = tuple(overlaps)
            advance(1)
    return kept
