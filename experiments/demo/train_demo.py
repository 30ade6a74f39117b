"""Train the bundled pair on a CPU: `python -m experiments.train_demo --work DIR --out DIR`.

A target learns the Python standard library. A draft then learns the target's distributions (Hinton
et al., arXiv 1503.02531) on the same text and on text that the target wrote. A run that is stopped
continues where it was.
"""

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int
from ml_dtypes import bfloat16
from rich.console import Console
from transformers import AutoTokenizer

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.checkpoint.safetensors import SAFETENSORS, write_safetensors
from easyspec_jax.cli.command import Parser, flags_of, with_flags
from easyspec_jax.decode.loop import decode
from experiments.demo import demo_corpus
from experiments.demo.demo_model import Params, Shape, checkpoint, init, logits

TARGET = Shape(384, 5, 1024, 6, 2, 64)
DRAFT = Shape(96, 12, 160, 3, 1, 32)

LENGTH = 512
"""Tokens in a window, and the positions that the models are made for."""

PROMPT = 64
"""Tokens of the library that a written text starts with."""

Loss = Callable[[Params, Int[Array, "batch length+1"]], Float[Array, ""]]
Windows = Callable[[int], np.ndarray]
console = Console(highlight=False)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn; a step sees batch × LENGTH tokens."""

    steps: int
    batch: int = 4
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    warm_up: int = 20
    save_seconds: float = 180.0


def optimizer(schedule: Schedule) -> optax.GradientTransformation:
    """Return Muon for the layers' matrices and Adam for the rest.

    Both rates rise over the warm-up and then fall to zero.
    """
    shape = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, schedule.warm_up),
            optax.linear_schedule(1.0, 0.0, schedule.steps - schedule.warm_up),
        ],
        [schedule.warm_up],
    )

    def stacked(params: Params) -> Any:
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda x: matrix if x.ndim == 3 else None, params)

    return optax.contrib.muon(
        lambda step: schedule.matrix_rate * shape(step),
        adam_learning_rate=lambda step: schedule.other_rate * shape(step),
        adam_b2=0.95,
        muon_weight_dimension_numbers=stacked,  # pyright: ignore[reportArgumentType]
    )


@dataclass(frozen=True)
class Trained:
    """Parameters, and how they came about.

    Attributes:
        loss: The mean of the last hundred steps, in nats a token.
    """

    params: Params
    loss: float
    steps: int
    tokens: int
    seconds: float

    def as_dict(self) -> dict[str, float]:
        """Return the figures."""
        return {name: getattr(self, name) for name in ("loss", "steps", "tokens", "seconds")}


def train(
    shape: Shape, loss: Loss, windows: Windows, schedule: Schedule, directory: Path
) -> Trained:
    """Learn from windows(step), int32 [batch, LENGTH + 1].

    The state is saved to the directory every few minutes, and read from it if it is there.

    Raises:
        EasySpecError: The directory holds a state after more steps than the schedule has.
    """
    rule = optimizer(schedule)

    @partial(jax.jit, donate_argnums=0)
    def learn(state: Params, batch: Array) -> tuple[Params, Array]:
        value, gradient = jax.value_and_grad(loss)(state["params"], batch)
        updates, rule_state = rule.update(gradient, state["rule"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "rule": rule_state}, value

    params = init(shape, jax.random.key(0))
    state = {"params": params, "rule": rule.init(params)}
    losses, earlier = [], 0.0
    with ocp.CheckpointManager(
        directory.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
    ) as manager:
        start = manager.latest_step() or 0
        if start > schedule.steps:
            raise EasySpecError(
                f"{directory} has had {start} steps; ask for as many, or choose another --work"
            )
        if start:
            content = {"state": state, "losses": np.zeros(start), "seconds": np.zeros(())}
            content = manager.restore(start, args=ocp.args.StandardRestore(content))
            state, losses, earlier = (
                content["state"],
                content["losses"].tolist(),
                float(content["seconds"]),
            )
        seconds, saved, begun = earlier, earlier, time.monotonic()
        for done in range(start + 1, schedule.steps + 1):
            state, value = learn(state, jnp.asarray(windows(done - 1), jnp.int32))
            losses.append(float(value))
            seconds = earlier + time.monotonic() - begun
            if done % 20 == 0:
                speed = (done - start) * schedule.batch * LENGTH / (seconds - earlier)
                recent = np.mean(losses[-20:])
                console.print(
                    f"{directory.name} {done}/{schedule.steps}  loss {recent:.3f}  {speed:.0f} "
                    "tokens/s"
                )
            if seconds - saved > schedule.save_seconds or done == schedule.steps:
                content = {
                    "state": state,
                    "losses": np.asarray(losses),
                    "seconds": np.asarray(seconds),
                }
                manager.save(done, args=ocp.args.StandardSave(content))
                manager.wait_until_finished()
                saved = seconds
    tokens = schedule.steps * schedule.batch * LENGTH
    return Trained(state["params"], float(np.mean(losses[-100:])), schedule.steps, tokens, seconds)


def next_token_loss(
    shape: Shape, params: Params, windows: Int[Array, "batch length+1"]
) -> Float[Array, ""]:
    """Return the cross entropy of the next tokens, in nats."""
    predicted = logits(shape, params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(predicted, windows[:, 1:]).mean()


def distillation_loss(
    teacher: Callable[[Array], Array],
    shape: Shape,
    params: Params,
    windows: Int[Array, "batch length+1"],
) -> Float[Array, ""]:
    """Return the KL divergence from the teacher's next-token distributions, in nats."""
    wanted = jax.nn.log_softmax(teacher(windows[:, :-1]))
    learned = jax.nn.log_softmax(logits(shape, params, windows[:, :-1]))
    return optax.losses.kl_divergence_with_log_targets(learned, wanted).mean()


def random_windows(tokens: np.ndarray, batch: int, step: int) -> np.ndarray:
    """Cut windows at places that depend on the step alone; [batch, LENGTH + 1]."""
    starts = np.random.default_rng([0, step]).integers(0, len(tokens) - LENGTH, batch)
    return tokens[starts[:, None] + np.arange(LENGTH + 1)]


def bits_per_byte(shape: Shape, params: Params, tokens: np.ndarray, size: int) -> float:
    """Return the bits of all tokens but the first over the text's length in bytes."""
    evaluate = jax.jit(partial(next_token_loss, shape))
    cut = (len(tokens) - 1) // LENGTH * LENGTH + 1
    nats = sum(
        LENGTH
        * float(evaluate(params, jnp.asarray(tokens[None, start : start + LENGTH + 1], jnp.int32)))
        for start in range(0, cut - 1, LENGTH)
    )
    return nats / np.log(2) / (size * (cut - 1) / len(tokens))


def write_texts(target: Path, tokens: np.ndarray, rows: int, batches: int) -> np.ndarray:
    """Let the target continue pieces of the library, alternating greedy and sampled.

    Returns:
        The ids of all texts in one array, uint16 [tokens].
    """
    engine = open_model(
        target, mesh="1", speculative=SpeculativeConfig(method="vanilla"), dtype="float32"
    )
    texts: list[list[int]] = []
    for batch in range(batches):
        starts = np.random.default_rng([1, batch]).integers(0, len(tokens) - PROMPT, rows)
        prompts = [tokens[start : start + PROMPT].tolist() for start in starts]
        sampling = SamplingParams(temperature=0.8 * (batch % 2), seed=batch * rows)
        limits = [LENGTH - PROMPT - 2] * rows
        written = prompts
        for report in decode(engine.programs(sampling), prompts, limits, sampling):
            written = [
                text + report.tokens[row, : report.num_tokens[row]].tolist()
                for row, text in enumerate(written)
            ]
        texts += written
        console.print(f"written {batch + 1}/{batches}")
    return np.asarray(list(itertools.chain.from_iterable(texts)), np.uint16)


def save_model(directory: Path, shape: Shape, params: Params, tokenizer: Path) -> None:
    """Write a Hugging Face directory in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.astype(bfloat16) for name, tensor in checkpoint(shape, params).items()}
    write_safetensors(directory / SAFETENSORS, tensors.items())
    (directory / "config.json").write_text(json.dumps(shape.config(LENGTH), indent=2) + "\n")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.train_demo", description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="for the corpus, training states and written texts"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="for target/, draft/ and training.json"
    )
    parser.add_argument("--target-steps", type=int, default=1400)
    parser.add_argument("--draft-steps", type=int, default=1500)
    parser.add_argument("--written-batches", type=int, default=16, help="batches of 64 texts")
    try:
        run(parser.parse_args(argv))
    except (EasySpecError, OSError) as error:
        message = with_flags(str(error), flags_of(parser))
        print(f"experiments.train_demo: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "experiments.train_demo: stopped; the same command goes on from here", file=sys.stderr
        )
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Run all stages one after the other."""
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = demo_corpus.build(args.work, TARGET.vocab_size)
    tokenizer = args.work / "tokenizer"
    console.print(f"corpus: {len(corpus.train)} tokens, {len(corpus.heldout)} held out")

    schedule = Schedule(args.target_steps)
    windows = partial(random_windows, corpus.train, schedule.batch)
    target = train(
        TARGET, partial(next_token_loss, TARGET), windows, schedule, args.work / "target"
    )
    save_model(args.out / "target", TARGET, target.params, tokenizer)

    texts = args.work / "written.npy"
    if not texts.exists():
        partial_texts = args.work / "partial.npy"
        np.save(
            partial_texts,
            write_texts(args.out / "target", corpus.train, rows=64, batches=args.written_batches),
        )
        partial_texts.rename(texts)
    written = np.load(texts)

    schedule = Schedule(args.draft_steps)

    def mixed(step: int) -> np.ndarray:
        halves = [
            random_windows(tokens, schedule.batch // 2, step) for tokens in (corpus.train, written)
        ]
        return np.concatenate(halves)

    loss = partial(distillation_loss, partial(logits, TARGET, target.params), DRAFT)
    draft = train(DRAFT, loss, mixed, schedule, args.work / "draft")
    save_model(args.out / "draft", DRAFT, draft.params, tokenizer)
    report(args.out / "training.json", corpus, len(written), target, draft)


def report(
    path: Path, corpus: demo_corpus.Corpus, written: int, target: Trained, draft: Trained
) -> None:
    """Write and print the figures of the model card; acceptance is from experiments.acceptance."""
    figures = {
        "python": platform.python_version(),
        "train_tokens": len(corpus.train),
        "heldout_tokens": len(corpus.heldout),
        "heldout_bytes": corpus.heldout_bytes,
        "written_tokens": written,
    }
    for name, shape, trained in (("target", TARGET, target), ("draft", DRAFT, draft)):
        heldout = bits_per_byte(shape, trained.params, corpus.heldout, corpus.heldout_bytes)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(trained.params))
        figures[name] = {
            "parameters": parameters,
            **trained.as_dict(),
            "heldout_bits_per_byte": heldout,
        }
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console.print_json(data=figures)


if __name__ == "__main__":
    sys.exit(main())
