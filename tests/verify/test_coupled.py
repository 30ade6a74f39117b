"""The text is a function of target and noise, and follows the target: no draft, method or mesh changes it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easyspec_jax.generate import main
from easyspec_jax.mesh import ALL_AXES, MeshShape
from easyspec_jax.verify import Coupled, Request, Verdict
from tests.helpers import goodness_of_fit, on_mesh
from tests.models import save_model

DRAWS, VOCAB, TOKENS = 60_000, 128, 11
POSITION = 7


def verdicts(logits: np.ndarray, other: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """What target and draft with these logits choose at one position, for every seed."""

    def body(logits: jax.Array, other: jax.Array, request: Request) -> tuple[jax.Array, Verdict]:
        rows = request.seed.shape
        target, draft = (jnp.broadcast_to(x, (*rows, 2, *x.shape)) for x in (logits, other))
        position = jnp.full(rows, POSITION, jnp.int32)
        drafted = Coupled().propose(draft[:, 0], position, request, ALL_AXES)[:, None]
        return drafted, Coupled().verify(target, draft[:, :1], drafted, position, request, ALL_AXES)

    numbers = ((0, np.int32), (temperature, np.float32), (0, np.int32), (1, np.float32))
    request = Request(np.arange(DRAWS, dtype=np.uint32), *(np.full(DRAWS, x, dtype) for x, dtype in numbers))  # pyright: ignore[reportArgumentType]
    split = P(ALL_AXES)
    drafted, verdict = on_mesh(MeshShape(1, 1), body, (split, split, P()), P())(logits, other, request)
    np.testing.assert_array_equal(verdict.accept, drafted == verdict.token[:, :1])
    return np.asarray(drafted[:, 0]), np.asarray(verdict.token)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_tokens_follow_the_target_and_agree_more_than_by_chance(temperature):
    random = np.random.default_rng(0)
    target, draft = np.full((2, VOCAB), -np.inf, np.float32)
    target[:TOKENS], draft[:TOKENS] = random.normal(size=(2, TOKENS)) * 1.5
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (target[:TOKENS], draft[:TOKENS]))
    drafted, token = verdicts(target, draft, temperature)
    pairs = np.zeros((TOKENS, TOKENS), int)
    np.add.at(pairs, (token[:, 0], token[:, 1]), 1)
    assert goodness_of_fit(pairs.reshape(1, -1), np.outer(p, p).reshape(1, -1)) > 0.001, "positions are independent"
    assert goodness_of_fit(np.bincount(drafted, minlength=TOKENS)[None], q[None]) > 0.001
    agreement = np.mean(drafted == token[:, 0])
    overlap = np.minimum(p, q).sum()
    assert agreement > 2 * (p @ q)
    assert overlap * 0.5 < agreement <= overlap + 0.01  # Daliri et al.: at least (1 - TV) / (1 + TV)
    assert agreement >= overlap / (2 - overlap) - 0.01


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for name, seed in (("target", 0), ("draft", 1)):
        save_model(directory / name, "llama3", seed=seed, vocab_size=260, eos_token_id=3)
    return directory


@pytest.mark.parametrize("truncation", [[], ["--top-k", "20", "--top-p", "0.9"]], ids=["whole", "truncated"])
def test_one_seed_is_one_text(models, capsys, truncation):
    """Drafts: the target itself and a stranger; every method; meshes of 1 and 8."""

    def ids(*flags):
        command = ["--target", str(models / "target"), "--verifier", "coupled", "--temperature", "0.8", *truncation]
        command += ["--seed", "5", "--json", "--max-new-tokens", "24", "--prompt", "Hello", "--prompt", "b", *flags]
        assert main(command) == 0
        return [json.loads(line)["token_ids"] for line in capsys.readouterr().out.splitlines()]

    plain = ids("--method", "vanilla")
    assert plain[0] != plain[1]
    for draft in ("target", "draft"):
        for method in (["sd"], ["easyspec", "--lp-size", "3", "--mesh", "8"]):
            assert ids("--draft", str(models / draft), "--method", *method) == plain
    rejected = ids("--draft", str(models / "draft"), "--verifier", "rejection")
    assert rejected != plain, "else this test says nothing about the verifier"
