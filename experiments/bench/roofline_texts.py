"""Whole texts by this package and by transformers, alternating; prescribed acceptance."""

import gc
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from easyspec_jax.decode.loop import decode
from easyspec_jax.decode.programs import Programs
from easyspec_jax.errors import first_line
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import ALL_AXES
from easyspec_jax.progress import bar
from easyspec_jax.sampling.noise import Purpose, noise_keys, uniform
from easyspec_jax.sampling.vocabulary import argmax
from easyspec_jax.verify import Greedy, RowSampling, Verdict
from easyspec_jax.verify.tree import Tree, deepest
from experiments.bench.roofline_models import Fields, Synthetic, torch_model
from experiments.lib.machine import cores


@dataclass(frozen=True)
class SyntheticAcceptance(Greedy):
    """A verifier that accepts drafted levels with a given probability, at a greedy verdict's cost.

    For benchmarks only: the text is neither model's. Whether a level passes, if the one above it
    does, depends on the request's seed and the absolute position.
    """

    acceptance: float = 1.0

    def verify(
        self,
        target: Float[Array, "batch nodes vocab_shard"],
        tree: Tree,
        position: Int[Array, " batch"],
        request: RowSampling,
    ) -> Verdict:
        """Follow the path to the first of the deepest nodes, then add the target's choice."""
        tokens = argmax(target.reshape(-1, target.shape[-1]), ALL_AXES).reshape(tree.tokens.shape)
        end = jnp.argmax(jnp.where(tree.exists, tree.depth, -1), axis=1)
        on_path = jnp.take_along_axis(tree.ancestors, end[:, None, None], axis=1)[:, 0]
        keys = noise_keys(
            request.seed, position[:, None] + tree.depth - 1, 0 * request.round, Purpose.ACCEPT
        )
        leaf = deepest(tree, on_path & (uniform(keys) < self.acceptance))
        return Verdict(leaf, jnp.take_along_axis(tokens, leaf[:, None], axis=1)[:, 0])


@dataclass(frozen=True)
class Text:
    """Generated ids and how they came about.

    Attributes:
        passes: Passes of the target, the first included; None if they were not counted.
        drafted: Levels drafted, if known.
        accepted: Levels accepted, if known.
    """

    tokens: list[int]
    passes: int | None
    drafted: int | None = None
    accepted: int | None = None


Complete = Callable[[Sequence[int], int], Text]
"""Completes a prompt by a number of tokens."""

STATIC = ("transformers, static cache", "transformers, assisted, static cache")
"""Ways of theirs() that may not work."""


@dataclass(frozen=True)
class Measured:
    """The seconds and texts of one way's timed completions, prompts included."""

    seconds: list[float] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)


def alternate_texts(
    ways: Mapping[str, Complete], prompts: Sequence[Sequence[int]], count: int
) -> dict[str, Measured]:
    """Let all ways complete each prompt by `count` tokens; the first prompt is not timed."""
    measured = {name: Measured() for name in ways}
    with bar("Generating", len(prompts) * len(ways)) as advance:
        for number, prompt in enumerate(prompts):
            for name, complete in ways.items():
                begun = time.perf_counter()
                text = complete(prompt, count)
                if number:
                    measured[name].seconds.append(time.perf_counter() - begun)
                    measured[name].texts.append(text)
                advance(1)
    return measured


def ours(programs: Programs) -> Complete:
    """Decode greedily round by round, as the engine does; a prompt's seed is its checksum."""

    def complete(prompt: Sequence[int], count: int) -> Text:
        tokens, passes, drafted, accepted = [], 0, 0, 0
        sampling = SamplingParams(seed=zlib.crc32(np.asarray(prompt, np.int32).tobytes()))
        with closing(decode(programs, [prompt], [count], sampling)) as reports:
            for report in reports:
                tokens += report.tokens[0, : report.num_tokens[0]].tolist()
                passes += 1
                drafted += int(report.drafted[0])
                accepted += int(report.accepted[0])
        return Text(tokens, passes, drafted, accepted)

    return complete


def theirs(
    pair: tuple[Fields, Fields],
    sources: tuple[Synthetic, Synthetic],
    device: str,
    num_assistant_tokens: int,
) -> dict[str, Complete]:
    """Generate with transformers, plainly and assisted, always drafting as many tokens as ours.

    Both also with caches of a fixed size (STATIC), for which transformers compiles its passes on a
    GPU. Not every version can do that, so try those with failure() first.
    """
    import torch

    if device == "cpu":
        torch.set_num_threads(cores())
    target, draft = (
        torch_model(fields, source, device) for fields, source in zip(pair, sources, strict=True)
    )
    settings = draft.generation_config
    settings.num_assistant_tokens = num_assistant_tokens
    settings.num_assistant_tokens_schedule = "constant"
    # Above 0, drafts would end where the assistant is unsure.
    settings.assistant_confidence_threshold = 0.0

    def completed(prompt: Sequence[int], count: int, **options: Any) -> Text:
        ids = torch.tensor([list(prompt)], device=device)
        made = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        # Without an assistant, every pass makes one token.
        return Text(made[0, len(prompt) :].tolist(), count)

    def assisted(prompt: Sequence[int], count: int) -> Text:
        calls: list[None] = []
        hook = target.register_forward_hook(lambda *_: calls.append(None))
        text = completed(prompt, count, assistant_model=draft)
        hook.remove()
        return replace(text, passes=len(calls))

    def assisted_static(prompt: Sequence[int], count: int) -> Text:
        # No hook counts the passes: torch could not compile the target with one.
        text = completed(prompt, count, assistant_model=draft, cache_implementation="static")
        return replace(text, passes=None)

    static = partial(completed, cache_implementation="static")
    return {
        "transformers": completed,
        "transformers, assisted": assisted,
        **dict(zip(STATIC, (static, assisted_static), strict=True)),
    }


def failure(complete: Complete, prompt: Sequence[int], count: int) -> str | None:
    """Return why a way of completing a prompt fails, in one line, or None if it works."""
    try:
        complete(prompt, count)
    except Exception as error:  # torch's compilers raise errors of any kind
        return f"{type(error).__name__}: {first_line(error)}"[:200]
    return None


def fit_together(device: str, size: int) -> bool:
    """Tell whether one device can hold `size` bytes of weights for both engines at once."""
    if device == "cpu":
        return True
    import torch

    # Each engine holds the weights once; half of them more is for everything else.
    return 2.5 * size < torch.cuda.get_device_properties(0).total_memory


def release(device: str) -> None:
    """Give freed memory back to the device."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
