"""Timing on devices, case by case in turn: single passes of a model, whole rounds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.round import RoundConfig, State
from easyspec_jax.model.attention import Nodes
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import replicated
from easyspec_jax.progress import bar
from easyspec_jax.sampling.vocabulary import argmax
from easyspec_jax.verify import Greedy

Run = Callable[..., Any]
"""How to go through a block: run_exact or run_fuzzy."""


@dataclass
class Case:
    """A step whose state goes from call to call, its buffers donated, so that no call can begin before the last ends.

    bytes: what a step cannot but read (and write). loops: steps that one call makes. reset: the state to begin every
    sample with, from the one the last sample left.
    """

    name: str
    step: Callable[[Any], Any]
    state: Any
    bytes: int
    loops: int = 1
    reset: Callable[[Any], Any] | None = None

    def sample(self, calls: int) -> float:
        """Seconds of a step, averaged over calls that are dispatched as fast as the host can."""
        if self.reset is not None:
            self.state = self.reset(self.state)
        jax.block_until_ready(self.state)
        begun = time.perf_counter()
        for _ in range(calls):
            self.state = self.step(self.state)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - begun) / (calls * self.loops)


def alternate(cases: Sequence[Case], repeats: int, calls: int) -> dict[str, list[float]]:
    """Seconds of every case's step, one sample a repeat, all cases in turn; a first sample of each is not timed."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    with bar("Compiling", len(cases)) as advance:
        for case in cases:
            case.sample(1)
            advance(1)
    with bar("Measuring", repeats * len(cases)) as advance:
        for _ in range(repeats):
            for case in cases:
                seconds[case.name].append(case.sample(calls))
                advance(1)
    return seconds


def alone(mesh: Mesh, model: Decoder) -> Programs:
    """Programs of plain decoding by one model."""
    return Programs(
        mesh, model, None, RoundConfig(levels=0, calibration=False, verifier=Greedy(), stop_ids=())
    )


def pass_case(
    name: str,
    programs: Programs,
    tokens: int,
    run: Run,
    bytes: int = 0,
    *,
    context: int,
    capacity: int,
    scored: int | None = None,
    loops: int = 1,
) -> Case:
    """One pass over `tokens` consecutive tokens behind a text of `context`, their logits, and the best id of each.

    Those ids are the next pass's input. programs: see alone(). scored: the last tokens, which get logits; None for all.
    loops: passes in a loop on the device.
    """
    spec = programs.target.cache_specs(), P()
    # An argument, as in a round: XLA would simplify what it knows.
    at = replicated(np.full(1, context, np.int32), programs.mesh)

    def once(
        model: Decoder, at: Array, carry: tuple[Caches, Int[Array, "1 tokens"]]
    ) -> tuple[Caches, Array]:
        caches, ids = carry
        depth = jnp.arange(tokens, dtype=jnp.int32)[None]
        h, caches = model(ids, caches, Nodes(at, at, depth, jnp.tri(tokens, dtype=bool)[None]), run)
        logits = model.logits(h[:, tokens - (scored or tokens) :])
        best = argmax(logits[0], model.axes)
        return caches, jnp.broadcast_to(best[None], ids.shape)

    def body(
        model: Decoder, _: None, carry: tuple[Caches, Array], at: Array
    ) -> tuple[Caches, Array]:
        if loops == 1:
            return once(model, at, carry)
        return jax.lax.fori_loop(0, loops, lambda _, carry: once(model, at, carry), carry)

    def start(model: Decoder, _: None) -> tuple[Caches, Array]:
        return model.init_caches(1, capacity), jnp.zeros((1, tokens), jnp.int32)

    state = jax.jit(programs.mapped(start, (), spec))(programs.leaves)
    step = jax.jit(programs.mapped(body, (spec, P()), spec), donate_argnums=1)
    return Case(name, lambda state: step(programs.leaves, state, at), state, bytes, loops)


def round_case(
    name: str, programs: Programs, bytes: int = 0, *, context: int, capacity: int
) -> Case:
    """Rounds as decoding dispatches them; every sample begins behind a text of `context` tokens.

    The caches hold no such text: what they hold costs nothing.
    """

    def small(value: int, *shape: int) -> Array:
        return replicated(np.full(shape, value, np.int32), programs.mesh)

    def reset(state: State) -> State:
        return replace(
            state,
            length=small(context, 1),
            draft_length=small(context, 1),
            pending=small(0, 1, programs.config.pending_size),
            pending_count=small(1, 1),
            remaining=small(2**30, 1),
        )

    state = programs.start(SamplingParams(), [1], capacity)
    return Case(name, lambda state: programs.round(state)[0], state, bytes, reset=reset)
