"""A coupled text depends on target and noise alone, and follows the target."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.generate import main
from easyspec_jax.verify import Coupled, RowSampling
from tests.support.helpers import goodness_of_fit
from tests.support.models import add_refit, save_model
from tests.verify.markov import make_request, softmax

DRAWS, TOKENS = 60_000, 11


def choices(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return the choice of a model with these logits at one position, for every seed."""

    def body(request: RowSampling) -> jax.Array:
        shape = (DRAWS, 1, TOKENS)
        ids = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), shape)
        position = jnp.full((DRAWS, 1), 7, jnp.int32)
        return Coupled().preference(jnp.broadcast_to(logits, shape), ids, position, request, ())

    return np.asarray(jax.jit(body)(make_request(np.arange(DRAWS), temperature)))[:, 0].argmax(
        axis=-1
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draft_and_target_agree_more_than_by_chance(temperature):
    """Both follow their own distributions, and agree with probability (1 - TV) / (1 + TV) or more.

    The bound is that of Daliri et al.
    """
    logits = np.random.default_rng(0).normal(size=(2, TOKENS)).astype(np.float32) * 1.5
    (p, q), (token, drafted) = (
        softmax(logits / temperature),
        (choices(row, temperature) for row in logits),
    )
    for chosen, probabilities in ((token, p), (drafted, q)):
        assert (
            goodness_of_fit(np.bincount(chosen, minlength=TOKENS)[None], probabilities[None])
            > 0.001
        )
    agreement, overlap = np.mean(drafted == token), np.minimum(p, q).sum()
    assert agreement > 2 * (p @ q)
    assert overlap / (2 - overlap) - 0.01 < agreement < overlap + 0.01


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for name, seed in (("target", 0), ("draft", 1)):
        save_model(directory / name, "llama3", seed=seed, vocab_size=260, eos_token_id=3)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "truncation",
    [pytest.param([], marks=pytest.mark.exhaustive), ["--top-k", "20", "--top-p", "0.9"]],
    ids=["whole", "truncated"],
)
def test_one_seed_is_one_text(models, capsys, truncation):
    """Draft, method and mesh do not change it."""

    def ids(*flags):
        command = [
            "--target",
            str(models / "target"),
            "--verifier",
            "coupled",
            "--temperature",
            "0.8",
            *truncation,
        ]
        command += [
            "--seed",
            "5",
            "--json",
            "--max-new-tokens",
            "24",
            "--prompt",
            "Hello",
            "--prompt",
            "b",
            *flags,
        ]
        assert main(command) == 0
        return [json.loads(line)["token_ids"] for line in capsys.readouterr().out.splitlines()]

    own, other = ("--draft", str(models / "target")), ("--draft", str(models / "draft"))
    plain = ids("--method", "vanilla")
    assert plain[0] != plain[1]
    assert ids(*own, "--method", "sd") == plain
    assert ids(*other, "--method", "tree", "--tree-nodes", "9") == plain
    fuzzy = (*other, "--lp-size", "3", "--tree-width", "4", "--mesh", "8")
    assert ids(*fuzzy) == plain
    assert ids(*fuzzy, "--refit", add_refit(models / "draft", 3, models / "refit")) == plain
    assert ids(*other, "--verifier", "rejection") != plain, (
        "else this test says nothing about the verifier"
    )
