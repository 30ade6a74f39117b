"""Timing on devices: single passes of a model and whole rounds, with cases taking turns.

Machines change speed while one measures. Cases that take turns are all exposed to the same changes,
so their ratios mean more than their times.
"""

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
from easyspec_jax.decode.state import RoundConfig, State
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.model.windows import Nodes
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import replicated
from easyspec_jax.progress import bar
from easyspec_jax.sampling.vocabulary import argmax
from easyspec_jax.verify import Greedy

Run = Callable[..., Any]
"""Way to run a block: run_exact or run_fuzzy."""


@dataclass
class Case:
    """A step to time, whose state goes from call to call.

    Each call needs the state that the one before it returns, so no call can begin before the last
    one ends.

    Attributes:
        name: Name in reports.
        step: Makes the next state from a state, whose buffers it may donate.
        state: The state now.
        bytes: The least a step must read and write.
        loops: Steps that one call makes.
        reset: Makes the state that a sample begins with from the one that the last sample left;
            None to go on from there.
    """

    name: str
    step: Callable[[Any], Any]
    state: Any
    bytes: int
    loops: int = 1
    reset: Callable[[Any], Any] | None = None

    def sample(self, calls: int) -> float:
        """Time a step.

        Args:
            calls: Calls to average over, dispatched as fast as the host can.

        Returns:
            Seconds per step.
        """
        if self.reset is not None:
            self.state = self.reset(self.state)
        jax.block_until_ready(self.state)
        begun = time.perf_counter()
        for _ in range(calls):
            self.state = self.step(self.state)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - begun) / (calls * self.loops)


def alternate(cases: Sequence[Case], repeats: int, calls: int) -> dict[str, list[float]]:
    """Time several cases, taking turns.

    Args:
        cases: The cases. Each first makes one call that does not count, to compile.
        repeats: Samples of each case.
        calls: Calls per sample.

    Returns:
        Seconds per step of every sample, by the name of the case.
    """
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
    """Make the programs of plain decoding with one model.

    Args:
        mesh: The model's mesh.
        model: The model.
    """
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
    """Make a case of one pass: some consecutive tokens behind a text, their logits and best ids.

    The best ids are the next pass's input.

    Args:
        name: Name of the case.
        programs: Programs of the model; see alone().
        tokens: Tokens of a pass.
        run: How to run blocks.
        bytes: The least a pass must read and write.
        context: Tokens of the text before. The caches hold no such text, but cost the same.
        capacity: Cache entries.
        scored: How many of the last tokens get logits; None for all.
        loops: Passes that one call makes in a loop on the device.
    """
    spec = programs.target.cache_specs(), P()

    def start(model: Decoder, _: None) -> tuple[Caches, Array]:
        return model.init_caches(1, capacity), jnp.zeros((1, tokens), jnp.int32)

    state = jax.jit(programs.compiled.mapped(start, (), spec))(programs.leaves)
    at = replicated(np.full(1, context, np.int32), programs.mesh)
    step = pass_program(programs, tokens, run, scored=scored, loops=loops)
    return Case(name, lambda state: step(programs.leaves, state, at), state, bytes, loops)


def pass_program(
    programs: Programs, tokens: int, run: Run, *, scored: int | None = None, loops: int = 1
) -> Any:
    """Return the jitted program of pass_case(), whose arguments these are.

    Its own arguments are the leaves of `programs`; the caches and the ids int32 [1, tokens], both
    donated; and the text's length, int32 [1]. Its results are the next caches and ids.
    """
    spec = programs.target.cache_specs(), P()

    # The position is an argument, as in a round: XLA would simplify with a constant.
    def once(
        model: Decoder, at: Array, carry: tuple[Caches, Int[Array, "1 tokens"]]
    ) -> tuple[Caches, Array]:
        caches, ids = carry
        # A chain is a tree in which every node reads all nodes before it: a lower triangle.
        depth = jnp.arange(tokens, dtype=jnp.int32)[None]
        h, caches = model(ids, caches, Nodes(at, at, depth, jnp.tri(tokens, dtype=bool)[None]), run)
        # Only the scored tokens reach the head: [1, tokens, hidden] -> [1, scored, hidden].
        logits = model.logits(h[:, tokens - (scored or tokens) :])
        best = argmax(logits[0], model.axes)
        # The ids are the next pass's input, so XLA cannot leave the logits out.
        return caches, jnp.broadcast_to(best[None], ids.shape)

    def body(
        model: Decoder, _: None, carry: tuple[Caches, Array], at: Array
    ) -> tuple[Caches, Array]:
        if loops == 1:
            return once(model, at, carry)
        return jax.lax.fori_loop(0, loops, lambda _, carry: once(model, at, carry), carry)

    return jax.jit(programs.compiled.mapped(body, (spec, P()), spec), donate_argnums=1)


def round_case(
    name: str, programs: Programs, bytes: int = 0, *, context: int, capacity: int
) -> Case:
    """Make a case of rounds, as decoding dispatches them.

    Args:
        name: Name of the case.
        programs: Programs of the pair.
        bytes: The least a round must read and write.
        context: Tokens of the text that every sample begins behind. The caches hold no such text,
            but cost the same.
        capacity: Cache entries.
    """

    def small(value: int, *shape: int) -> Array:
        return replicated(np.full(shape, value, np.int32), programs.mesh)

    def reset(state: State) -> State:
        return replace(
            state,
            length=small(context, 1),
            draft_length=small(context, 1),
            remaining=small(2**30, 1),
        )

    state = programs.start(SamplingParams(), [1], capacity)
    return Case(name, lambda state: programs.round(state)[0], state, bytes, reset=reset)
