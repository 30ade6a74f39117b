"""The whole of it: opens a pair, measures, searches, confirms; or finds what was stored."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from easyspec_jax.draft.refit_file import refit_sizes
from easyspec_jax.engine.engine import Engine
from easyspec_jax.engine.pair import open_model
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import DType, Platform, SamplingParams, SpeculativeConfig
from easyspec_jax.parallel.mesh import LAYER, TENSOR, MeshShape
from easyspec_jax.progress import Advance, Bar, no_bar
from easyspec_jax.tokenizer.conversation import Prompt
from easyspec_jax.tune import prompts, store
from easyspec_jax.tune.bench import DeviceBench, Sample
from easyspec_jax.tune.candidates import Candidate, Draft, Space, candidates
from easyspec_jax.tune.confirm import alternate, confirmed
from easyspec_jax.tune.predict import Figures, Prediction, predict
from easyspec_jax.tune.search import Clock, search, verification_sizes
from easyspec_jax.tune.store import Choice, describe

SECONDS = 150.0
"""For measuring, by default; loading the target and the last text begun come on top."""

COMPILED = 0.85
"""By which share of the time the programs to confirm must be compiled; the first one's always are."""

TURNS = 25
"""Texts that each finalist writes, if there is time: single ones are noisy where models are small."""

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """Figures of a draft and a tree width at the best number of levels; confirmed: tokens a second, if run.

    deepest_acceptance: the share of drafted positions accepted at the most levels, None where it was not measured.
    """

    prediction: Prediction
    deepest_acceptance: float | None
    confirmed: float | None


@dataclass(frozen=True)
class Tuned:
    """Everything a report tells. rows: best first; not_reached: drafts for which there was no time."""

    engine: Engine
    mesh: str
    figures: Figures
    rows: list[Row]
    not_reached: int
    plain: float
    choice: Choice
    seconds: float


def open_pair(
    target: str | Path | None,
    draft: str | Path | None,
    mesh: str,
    platform: Platform | None,
    max_length: int | None,
    dtype: DType,
    *,
    allow_links: bool = False,
) -> Engine:
    """The pair with an ordinary draft. Raises EasySpecError as open_model does, and without a draft."""
    if target is not None and draft is None:
        raise EasySpecError("there is nothing to choose without --draft DIR")
    ordinary = SpeculativeConfig(method="sd")
    return open_model(
        target,
        draft,
        mesh=mesh,
        platform=platform,
        speculative=ordinary,
        max_length=max_length,
        dtype=dtype,
        allow_links=allow_links,
    )


def default_sample(engine: Engine, bundled: bool) -> Sample:
    """Code for the bundled pair, otherwise questions, put as a user's where there is a chat template."""
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    if bundled:
        return Sample(prompts.CODE, sampling)
    return Sample(prompts.QUESTIONS, sampling, chat=bool(engine.tokenizer.chat_template))


def tune(
    engine: Engine,
    mesh: str,
    sample: Sample,
    space: Space,
    *,
    finalists: int = 3,
    seconds: float = SECONDS,
    bar: Bar = no_bar,
) -> Tuned:
    """Measures, and confirms the best `finalists` beside plain decoding. engine: see open_pair; mesh: as for --mesh.

    Raises EasySpecError for bad candidates or prompts before anything is measured.
    """
    assert engine.draft is not None
    found = candidates(mesh, engine.draft.config.num_hidden_layers, space)
    for prompt in sample.prompts:
        engine.encode(prompt, sample.chat)
    engine.variant(
        SpeculativeConfig(method="vanilla"), bar=bar
    )  # reads the target, which is no part of measuring
    begun = time.monotonic()

    def clock() -> float:
        return (time.monotonic() - begun) / seconds

    drafts = len({candidate.draft for candidate in found})
    with bar("Measuring") as advance:
        bench = DeviceBench(engine, sample, space.max_levels, space.tree_widths, clock)
        # Larger ones are measured when trees come to be asked for.
        sizes = [size for size in verification_sizes(found) if size <= 9]
        figures = Figures(
            bench.plain, bench.overhead, {size: bench.verification(size) for size in sizes}
        )
        best = search(found, figures, bench, finalists, clock, advance)
    bench.release()
    with bar("Confirming") as advance:
        speeds = confirm(bench, [prediction.candidate for prediction in best], clock, advance)
    return Tuned(
        engine=engine,
        mesh=mesh,
        figures=figures,
        rows=rows(found, figures, speeds),
        not_reached=drafts - len(figures.step),
        plain=speeds[None],
        choice=choose(speeds, engine),
        seconds=time.monotonic() - begun,
    )


def confirm(
    bench: DeviceBench, best: Sequence[Candidate], clock: Clock, advance: Advance
) -> dict[Candidate | None, float]:
    """Tokens a second of plain decoding (None), and of the candidates for which there was time; of one in any case."""
    sampling, chat = bench.sample.sampling, bench.sample.chat
    engines: dict[Candidate | None, Engine] = {None: bench.baseline}
    with_draft: dict[Draft, Engine] = {}
    for candidate in best:
        if len(engines) > 1 and clock() > COMPILED:
            break
        alike = with_draft.get(candidate.draft, bench.engine)
        engines[candidate] = alike.variant(candidate.speculative, candidate.shape)
        with_draft.setdefault(candidate.draft, engines[candidate])
        engines[candidate].compile([bench.longest], sampling, chat=chat)
        advance(1)
    prompts = [
        prompt
        for prompt in bench.sample.prompts
        if all(fits(prompt, bench, own) for own in engines.values())
    ]
    begun = clock()

    def complete(engine: Engine, number: int) -> float:
        prompt = prompts[number % len(prompts)]
        return next(engine.generate([prompt], sampling, chat=chat)).stats.tokens_per_second

    def go_on(number: int) -> bool:
        return clock() + (clock() - begun) / number <= 1

    ways = {name: partial(complete, own) for name, own in engines.items()}
    return confirmed(alternate(ways, TURNS, go_on, advance), None)


def fits(prompt: Prompt, bench: DeviceBench, engine: Engine) -> bool:
    """Whether the programs that the longest prompt takes are those of this one, so that none need be compiled."""
    programs = engine.programs(bench.sample.sampling)
    sizes = {programs.capacity(bench.text_length(own)) for own in (prompt, bench.longest)}
    return len(sizes) == 1


def choose(speeds: Mapping[Candidate | None, float], engine: Engine) -> Choice:
    """The fastest as it ran, whatever was predicted; None is plain decoding."""
    best = max(speeds, key=lambda candidate: speeds[candidate])
    shape = (
        MeshShape(engine.mesh.shape[LAYER], engine.mesh.shape[TENSOR])
        if best is None
        else best.shape
    )
    speculative = SpeculativeConfig(method="vanilla") if best is None else best.speculative
    return Choice(
        f"{LAYER}={shape.layer},{TENSOR}={shape.tensor}", speculative, speeds[best], speeds[None]
    )


def rows(
    found: Sequence[Candidate], figures: Figures, speeds: Mapping[Candidate | None, float]
) -> list[Row]:
    """One for each draft and tree width that was measured at all, at its best number of levels; best first."""
    predictions: dict[tuple[Draft, int], Prediction] = {}
    for candidate in found:
        if candidate.draft in figures.step:
            new, place = predict(figures, candidate), (candidate.draft, candidate.speculative.width)
            old = predictions.get(place)
            if old is None or _rank(new, speeds) > _rank(old, speeds):
                predictions[place] = new
    made = [
        Row(
            prediction, _deepest_acceptance(figures, draft, width), speeds.get(prediction.candidate)
        )
        for (draft, width), prediction in predictions.items()
    ]
    return sorted(made, key=lambda row: _rank(row.prediction, speeds), reverse=True)


def _rank(
    prediction: Prediction, speeds: Mapping[Candidate | None, float]
) -> tuple[float, bool, float]:
    """Confirmed ones first, then those measured through."""
    return (
        speeds.get(prediction.candidate, 0.0),
        not prediction.missing,
        prediction.tokens_per_second,
    )


def _deepest_acceptance(figures: Figures, draft: Draft, width: int) -> float | None:
    accepted = figures.acceptance.get(draft.drafting, {}).get(width)
    return None if accepted is None else accepted[-1] / len(accepted)


def auto(engine: Engine, mesh: str, bundled: bool, bar: Bar, note: Callable[[str], None]) -> Choice:
    """Return the choice stored for this target, draft, type and machine, or measure first if there is none.

    engine: see open_pair; note is given a line about what is done.
    """
    assert engine.draft is not None
    key, directory = store.key_of(engine, mesh), engine.draft.directory
    choice = store.find(key, directory)
    if choice is None:
        note(
            f"no choice is stored for this pair, mesh and machine: measuring for about {SECONDS / 60:g} minutes"
        )
        space = Space.of(engine.draft.config.num_hidden_layers, refit_sizes(directory))
        choice = tune(engine, mesh, default_sample(engine, bundled), space, bar=bar).choice
        keep(key, choice, directory, note)
    note(f"tuned: {describe(choice)}")
    return choice


def keep(key: store.Key, choice: Choice, draft: Path, note: Callable[[str], None]) -> None:
    """Stores a choice, or notes that it could not be stored."""
    try:
        path = store.keep(key, choice, draft)
    except EasySpecError as error:
        note(str(error))
    else:
        note(f"stored in {path}")
