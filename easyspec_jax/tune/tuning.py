"""Tuning as a whole: open a pair, measure, search, confirm, store; or find what was stored."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from easyspec_jax import demo
from easyspec_jax.draft.refit_file import DIRECTORY, refit_sizes
from easyspec_jax.engine import tuned_file
from easyspec_jax.engine.engine import Engine
from easyspec_jax.engine.pair import open_model
from easyspec_jax.engine.tuned_file import Choice, describe
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import (
    DType,
    KVDType,
    Platform,
    SamplingParams,
    SpeculativeConfig,
    Weights,
)
from easyspec_jax.parallel.mesh import LAYER, TENSOR, MeshShape, parse_mesh
from easyspec_jax.progress import Advance, Bar, no_bar
from easyspec_jax.tokenizer.conversation import Prompt
from easyspec_jax.tune import prompts
from easyspec_jax.tune.bench import DeviceBench, Sample
from easyspec_jax.tune.candidates import Candidate, Draft, Space, candidates
from easyspec_jax.tune.confirm import alternate, confirmed
from easyspec_jax.tune.extras import extras
from easyspec_jax.tune.options import MAX_NEW_TOKENS, SECONDS, TuneConfig
from easyspec_jax.tune.predict import Figures, Prediction, predict
from easyspec_jax.tune.search import Clock, search, verification_sizes

COMPILED = 0.85
"""Share of the time after which no more finalists are compiled; the first always is."""

TURNS = 25
"""Texts that each finalist writes if there is time: with small models single ones are noisy."""


@dataclass(frozen=True)
class Row:
    """Figures of a draft and a tree width, at the best number of levels.

    Attributes:
        prediction: Speed as predicted from the parts.
        accepted: Mean accepted tokens of rounds of 1, 2, … levels; None if that was not measured.
        confirmed: Speed in tokens a second when it ran; None if it did not.
    """

    prediction: Prediction
    accepted: tuple[float, ...] | None
    confirmed: float | None

    @property
    def deepest_acceptance(self) -> float | None:
        """Share of drafted positions accepted at the most levels; None if not measured."""
        return None if self.accepted is None else self.accepted[-1] / len(self.accepted)


@dataclass(frozen=True)
class Tuned:
    """Result of tuning.

    Attributes:
        engine: The pair.
        mesh: As in TuneConfig.
        figures: Everything that was measured.
        rows: Figures by draft and tree width, best first.
        not_reached: Drafts that there was no time for.
        plain: Speed of plain decoding in tokens a second.
        choice: The fastest way of decoding as it ran.
        seconds: Time it took.
    """

    engine: Engine
    mesh: str
    figures: Figures
    rows: list[Row]
    not_reached: int
    plain: float
    choice: Choice
    seconds: float

    def store(self) -> Path:
        """Store the choice for `open_model(speculative="tuned")` and return its file.

        Raises:
            EasySpecError: It cannot be written.
        """
        assert self.engine.draft is not None
        key = tuned_file.key_of(self.engine, self.mesh)
        return tuned_file.keep(key, self.choice, self.engine.draft.directory)


def open_pair(
    target: str | Path | None,
    draft: str | Path | None,
    mesh: str,
    platform: Platform | None,
    max_length: int | None,
    dtype: DType,
    *,
    weights: Weights | None = None,
    draft_weights: Weights | None = None,
    kv_dtype: KVDType = "auto",
    allow_links: bool = False,
) -> Engine:
    """Open a pair with an ordinary draft; arguments and errors as for open_model."""
    if target is not None and draft is None:
        raise EasySpecError("there is nothing to choose without `draft` DIR")
    return open_model(
        target,
        draft,
        mesh=mesh,
        platform=platform,
        speculative=SpeculativeConfig(method="sd"),
        max_length=max_length,
        dtype=dtype,
        weights=weights,
        draft_weights=draft_weights,
        kv_dtype=kv_dtype,
        allow_links=allow_links,
    )


def default_sample(engine: Engine, bundled: bool) -> Sample:
    """Return code for the bundled pair, otherwise questions, as a user's if there is a template."""
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    if bundled:
        return Sample(prompts.CODE, sampling)
    return Sample(prompts.QUESTIONS, sampling, chat=bool(engine.tokenizer.chat_template))


def tune(pair: Engine, config: TuneConfig | None = None, *, bar: Bar = no_bar) -> Tuned:
    """Measure which way of decoding is the fastest for a pair on its devices.

    Args:
        pair: An Engine with a draft, however that drafts.
        config: What to try and how long to measure.
        bar: Shows the progress.

    Raises:
        EasySpecError: A candidate or a prompt is bad; nothing has been measured.
    """
    config = config or TuneConfig()
    if pair.draft is None:
        raise EasySpecError("there is nothing to choose without `draft` DIR")
    mesh = config.mesh or str(pair.mesh.size)
    if parse_mesh(mesh).size != pair.mesh.size:
        raise EasySpecError(f"`mesh` {mesh} is not a split of the pair's {pair.mesh.size} devices")
    _check_target(pair)
    ordinary = SpeculativeConfig(method="sd")
    # Measuring starts from an ordinary draft; variants of one engine share the target's weights.
    engine = pair if pair.speculative == ordinary else pair.variant(ordinary, bar=bar)
    space = Space.of(
        pair.draft.config.num_hidden_layers, refit_sizes(pair.draft.directory / DIRECTORY)
    )
    space = replace(
        space,
        lp_sizes=space.lp_sizes if config.lp_sizes is None else config.lp_sizes,
        mlp_lp_sizes=config.mlp_lp_sizes,
        tree_widths=config.tree_widths,
        max_levels=config.max_levels,
        draft_tensor_parallel_sizes=config.draft_tensor_parallel_sizes,
    )
    sample = default_sample(engine, bundled=pair.target.directory == demo.TARGET)
    if config.prompts is not None:
        sample = replace(sample, prompts=config.prompts, chat=config.chat)
    sample = replace(sample, sampling=SamplingParams(max_new_tokens=config.max_new_tokens))
    return tune_over(
        engine,
        mesh,
        sample,
        space,
        finalists=config.confirm,
        seconds=config.seconds,
        bar=bar,
    )


def tune_over(
    engine: Engine,
    mesh: str,
    sample: Sample,
    space: Space,
    *,
    finalists: int = 3,
    seconds: float = SECONDS,
    bar: Bar = no_bar,
) -> Tuned:
    """Measure the candidates of a space, and run the best few alternately with plain decoding.

    Args:
        engine: A pair with an ordinary draft, see open_pair().
        mesh: See TuneConfig.
        sample: Prompts to measure on.
        space: Candidates.
        finalists: How many of the best to run.
        seconds: Time for measuring.
        bar: Shows the progress.

    Raises:
        EasySpecError: A candidate or a prompt is bad; nothing has been measured.
    """
    assert engine.draft is not None
    found = candidates(mesh, engine.draft.config.num_hidden_layers, space)
    # Refuses a bad prompt now, before minutes of measuring.
    engine.prepare(sample.prompts, chat=sample.chat)
    # Reads the target's weights, which should not count as measuring.
    engine.variant(SpeculativeConfig(method="vanilla"), bar=bar)
    begun = time.monotonic()

    def clock() -> float:
        """Return the share of the time that is used up."""
        return (time.monotonic() - begun) / seconds

    drafts = {candidate.draft for candidate in found}
    with bar("Measuring") as advance:
        bench = DeviceBench(engine, sample, space.max_levels, space.tree_widths, clock)
        # Verification of more positions is measured when a tree needs it.
        verification = {
            size: bench.verification(size) for size in verification_sizes(found) if size <= 9
        }
        figures = Figures(bench.plain, bench.overhead, verification)
        best = search(found, figures, bench, finalists, clock, advance)
    # Finalists load their own drafts; the one measured last would take memory.
    bench.release()
    further = _extras(best, figures, bench)
    with bar("Confirming") as advance:
        running = [prediction.candidate for prediction in best] + further
        speeds = confirm(bench, running, clock, advance)
    return Tuned(
        engine=engine,
        mesh=mesh,
        figures=figures,
        rows=rows([*found, *further], figures, speeds),
        not_reached=len(drafts) - len(figures.step),
        plain=speeds[None],
        choice=choose(speeds, engine),
        seconds=time.monotonic() - begun,
    )


def _extras(best: Sequence[Prediction], figures: Figures, bench: DeviceBench) -> list[Candidate]:
    """Return further ways to draft as the best prediction does, if there is one."""
    if not best:
        return []
    own = best[0].candidate
    early = bench.early_ends.get((own.draft.drafting, own.speculative.width), ())
    return extras(best[0], figures, early, bench.levels)


def confirm(
    bench: DeviceBench, best: Sequence[Candidate], clock: Clock, advance: Advance
) -> dict[Candidate | None, float]:
    """Decode whole texts plainly and with the best candidates, alternately.

    Args:
        bench: The engine and the prompts.
        best: Candidates, best first.
        clock: Tells how much of the time is used up.
        advance: Called after every compilation and every text.

    Returns:
        Speeds in tokens a second: of plain decoding under None, and of as many candidates as time
        allowed, at least one.
    """
    sampling, chat = bench.sample.sampling, bench.sample.chat
    engines: dict[Candidate | None, Engine] = {None: bench.baseline}
    with_draft: dict[Draft, Engine] = {}
    for candidate in best:
        # All programs are compiled before any is timed. The best finalist always is.
        if len(engines) > 1 and clock() > COMPILED:
            break
        # Candidates with the same draft share its weights.
        alike = with_draft.get(candidate.draft, bench.engine)
        engines[candidate] = alike.variant(candidate.speculative, candidate.shape)
        with_draft.setdefault(candidate.draft, engines[candidate])
        engines[candidate].compile([bench.longest], sampling, chat=chat)
        advance(1)
    prompts = []
    for prompt in bench.sample.prompts:
        if all(fits(prompt, bench, own) for own in engines.values()):
            prompts.append(prompt)
    begun = clock()

    def complete(engine: Engine, number: int) -> float:
        prompt = prompts[number % len(prompts)]
        return next(engine.generate([prompt], sampling, chat=chat)).stats.tokens_per_second

    def go_on(number: int) -> bool:
        # Another turn is begun only if one of average length fits into the time left.
        return clock() + (clock() - begun) / number <= 1

    ways = {name: partial(complete, own) for name, own in engines.items()}
    return confirmed(alternate(ways, TURNS, go_on, advance), None)


def fits(prompt: Prompt, bench: DeviceBench, engine: Engine) -> bool:
    """Return whether a prompt needs the programs of the longest one, which are compiled already."""
    programs = engine.programs(bench.sample.sampling)
    # Caches of another size would need other programs, and compiling would count as decoding.
    sizes = {programs.sizes.capacity(bench.text_length(own)) for own in (prompt, bench.longest)}
    return len(sizes) == 1


def choose(speeds: Mapping[Candidate | None, float], engine: Engine) -> Choice:
    """Return the fastest way as it ran, whatever was predicted. None is plain decoding."""
    best = max(speeds, key=lambda candidate: speeds[candidate])
    if best is None:
        shape = MeshShape(engine.mesh.shape[LAYER], engine.mesh.shape[TENSOR])
        speculative = SpeculativeConfig(method="vanilla")
    else:
        shape = best.shape
        speculative = best.speculative
    return Choice(shape.name, speculative, speeds[best], speeds[None])


def rows(
    found: Sequence[Candidate], figures: Figures, speeds: Mapping[Candidate | None, float]
) -> list[Row]:
    """Return a row for each draft and tree width that was measured, at its best depth.

    Args:
        found: All candidates.
        figures: Measurements.
        speeds: Confirmed speeds, see confirm().

    Returns:
        Rows, best first.
    """
    predictions: dict[tuple[Draft, int], Prediction] = {}
    for candidate in found:
        if figures.timed(candidate.draft):
            new = predict(figures, candidate)
            key = (candidate.draft, candidate.speculative.width)
            old = predictions.get(key)
            if old is None or _rank(new, speeds) > _rank(old, speeds):
                predictions[key] = new
    made = []
    for (draft, width), prediction in predictions.items():
        accepted = figures.acceptance.get(draft.drafting, {}).get(width)
        made.append(Row(prediction, accepted, speeds.get(prediction.candidate)))
    return sorted(made, key=lambda row: _rank(row.prediction, speeds), reverse=True)


def _rank(
    prediction: Prediction, speeds: Mapping[Candidate | None, float]
) -> tuple[float, bool, float]:
    """Order confirmed rows first, then those with all figures measured, then by speed."""
    return (
        speeds.get(prediction.candidate, 0.0),
        not prediction.missing,
        prediction.tokens_per_second,
    )


def auto(engine: Engine, mesh: str, bundled: bool, bar: Bar, note: Callable[[str], None]) -> Choice:
    """Return the choice stored for a pair on its devices, or measure and store one.

    Args:
        engine: See open_pair().
        mesh: See TuneConfig.
        bundled: Whether it is the bundled pair.
        bar: Shows the progress.
        note: Called with a line about what is done.
    """
    assert engine.draft is not None
    _check_target(engine)
    directory = engine.draft.directory
    # A choice holds for one pair, mesh, type and kind of device.
    choice = tuned_file.find(tuned_file.key_of(engine, mesh), directory)
    if choice is None:
        note(
            "no choice is stored for this pair, mesh and machine: measuring for about "
            f"{SECONDS / 60:g} minutes"
        )
        space = Space.of(engine.draft.config.num_hidden_layers, refit_sizes(directory / DIRECTORY))
        tuned = tune_over(engine, mesh, default_sample(engine, bundled), space, bar=bar)
        store(tuned, note)
        choice = tuned.choice
    note(f"tuned: {describe(choice)}")
    return choice


def _check_target(engine: Engine) -> None:
    """Raise EasySpecError if the target alone does not fit, before any of it is read.

    A draft that does not fit leaves plain decoding as the choice.
    """
    engine.target_alone().check_memory(2, 1, 1, SamplingParams())


def store(tuned: Tuned, note: Callable[[str], None]) -> None:
    """Store a choice, and note where, or why that was not possible."""
    try:
        path = tuned.store()
    except EasySpecError as error:
        note(str(error))
    else:
        note(f"stored in {path}")
