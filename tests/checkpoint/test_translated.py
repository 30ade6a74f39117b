"""A translated draft is the draft with its vocabulary in another order."""

from typing import Any

import numpy as np
import pytest

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import EMBEDDING, HEAD
from easyspec_jax.checkpoint.translated import UNKNOWN, Translated, translated
from easyspec_jax.engine import pair as pair_module
from easyspec_jax.engine.engine import Engine
from easyspec_jax.tokenizer.translation import Translation
from tests.support.models import byte_tokenizer, save_model, save_noisy_pair

PROMPTS = ["one two three one two", "def add(a, b): return a + b"]
FAMILY = "qwen3"
SPECIAL, BYTES = 4, 256
OPTIONS = {"num_hidden_layers": 3, "tie_word_embeddings": False, "vocab_size": SPECIAL + BYTES}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Any:
    """A target, its draft, and the same draft with a tokenizer that numbers bytes backwards."""
    target, draft, backwards = (tmp_path_factory.mktemp(name) for name in ("t", "d", "b"))
    save_noisy_pair(target, draft, FAMILY, **OPTIONS)
    model = save_model(backwards, FAMILY, **OPTIONS)
    own = open_checkpoint(draft)
    weights = {name: own.source.read(name) for name in own.source.shapes()}
    rows = weights[EMBEDDING].shape[0]
    order = np.arange(rows)
    order[SPECIAL : SPECIAL + BYTES] = order[SPECIAL : SPECIAL + BYTES][::-1]
    for name in (EMBEDDING, HEAD):
        weights[name] = weights[name][order]
    import torch

    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights.items()})
    model.save_pretrained(backwards)
    byte_tokenizer(order=-1).save_pretrained(backwards)
    return target, draft, backwards


def completed(engine: Engine, temperature: float = 0.0) -> list[tuple[list[int], int, int]]:
    sampling = SamplingParams(temperature, seed=5, max_new_tokens=40)
    found = engine.generate(PROMPTS, sampling, batch_size=2)
    return [(one.token_ids, one.stats.drafted, one.stats.accepted) for one in found]


def opened(target: Any, draft: Any, mesh: str = "1", **options: Any) -> Engine:
    speculative = SpeculativeConfig(**options)
    return open_model(
        target, draft, mesh=mesh, platform="cpu", speculative=speculative, dtype="float32"
    )


@pytest.mark.parametrize(
    "mesh, temperature, options",
    [
        ("1", 0.0, {"method": "sd"}),
        pytest.param("4", 0.7, {"lp_size": 2, "tree_width": 3}, marks=pytest.mark.slow),
        pytest.param("2", 0.7, {"method": "sd", "verifier": "rejection"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_drafts_are_those_of_the_same_model_with_the_targets_ids(pairs, mesh, temperature, options):
    target, draft, backwards = pairs
    expected = completed(opened(target, draft, mesh, **options), temperature)
    assert completed(opened(target, backwards, mesh, **options), temperature) == expected
    assert all(accepted > 5 for _, _, accepted in expected)


def test_ids_that_are_not_translated_would_be_found(pairs, monkeypatch):
    """A planted fault: the draft's own ids, which are of other bytes. Texts stay right."""
    target, draft, backwards = pairs
    expected = completed(opened(target, draft, method="sd"))
    monkeypatch.setattr(pair_module, "have_same_ids", lambda *_: True)
    found = completed(opened(target, backwards, method="sd"))
    assert [ids for ids, _, _ in found] == [ids for ids, _, _ in expected]
    assert sum(one[2] for one in found) < sum(one[2] for one in expected) / 4


def test_a_draft_never_proposes_what_it_has_no_token_for(pairs, monkeypatch):
    """The target's own tokens, half of which its draft is said to lack, in itself as the draft."""
    target = pairs[0]
    real = pair_module.translate

    def half(*args: Any) -> Translation:
        found = real(*args)
        known = found.known & (np.arange(len(found.known)) % 2 == 0)
        return Translation(found.draft_ids, known, found.share)

    monkeypatch.setattr(pair_module, "have_same_ids", lambda *_: False)
    monkeypatch.setattr(pair_module, "translate", half)
    engine = opened(target, target, method="sd", num_speculative_tokens=1)
    plain = completed(engine.baseline())
    found = completed(engine)
    assert [ids for ids, _, _ in found] == [ids for ids, _, _ in plain]
    # A model drafts itself right where it may.
    assert all(0 < accepted < drafted for _, drafted, accepted in found)
    draft = engine.load()[1]
    assert draft is not None and draft.unknown is not None
    assert np.isneginf(np.asarray(draft.unknown)[1 : SPECIAL + BYTES : 2]).all()


def test_rows_are_gathered_and_the_fingerprint_stays(pairs):
    own = open_checkpoint(pairs[1])
    ids, known = np.array([7, 0, 7, 3], np.int32), np.array([True, True, False, True])
    changed = translated(own, ids, known)
    assert isinstance(changed.source, Translated)
    assert changed.config.vocab_size == 4
    assert changed.source.shapes()[EMBEDDING] == (4, own.config.hidden_size)
    whole = own.source.read(EMBEDDING)
    np.testing.assert_array_equal(changed.source.read(EMBEDDING), whole[ids])
    part = changed.source.read(EMBEDDING, (slice(1, 3), slice(2, 5)))
    np.testing.assert_array_equal(part, whole[ids][1:3, 2:5])
    np.testing.assert_array_equal(changed.source.read(UNKNOWN), [0, 0, -np.inf, 0])
    assert changed.source.dtypes()[UNKNOWN] == "float32"
    name = "model.norm.weight"
    np.testing.assert_array_equal(changed.source.read(name), own.source.read(name))
    assert changed.fingerprint == own.fingerprint
