"""Texts of a pair with sliding layers and scaled RoPE: drafting changes no token of them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers import AutoModelForCausalLM

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.decode import accepting
from easyspec_jax.decode.chunks import PREFILL_SIZES
from easyspec_jax.decode.window_caches import move_on
from easyspec_jax.draft.layer_group import LayerGroup
from easyspec_jax.engine.engine import Engine
from easyspec_jax.model import kept_window, transformer, windows
from easyspec_jax.model.transformer import Caches, Decoder
from easyspec_jax.model.windows import Nodes, Window, Windows, tree_windows
from easyspec_jax.options import Method
from tests.support.helpers import sizes_read
from tests.support.models import save_noisy_pair

LAYERS, FOUR, GROUPS = 5, "0,1-4", "0,1,2-4"
PROMPTS = ["def add(a, b):", "one two three four five six seven"]
GREEDY = SamplingParams(max_new_tokens=40)
OPTIONS: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "use_sliding_window": True,
    "sliding_window": 2,  # shorter than paths of a tree
    "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 3],
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directories of a target and of a draft, which is a noisy copy of it."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    save_noisy_pair(target, draft, "qwen3", **OPTIONS)
    return target, draft


def opened(pair: Any, mesh: str = "1", method: Method = "vanilla", **options: Any) -> Engine:
    target, draft = pair
    return open_model(
        target,
        None if method == "vanilla" else draft,
        mesh=mesh,
        platform="cpu",
        speculative=SpeculativeConfig(method=method, **options),
        dtype="float32",
    )


def texts(engine: Engine) -> list[list[int]]:
    return [found.token_ids for found in engine.generate(PROMPTS, GREEDY, batch_size=2)]


@pytest.fixture(scope="module")
def plain(pair):
    return texts(opened(pair))


def test_plain_decoding_is_transformers(pair, plain):
    """Beyond the window, and beyond the original length of the scaling."""
    engine = opened(pair)
    model: Any = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    for prompt, found in zip(PROMPTS, plain, strict=True):
        ids = torch.tensor([engine.encode(prompt)])
        whole = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=3)
        assert whole[0, ids.shape[1] :].tolist() == found


@pytest.mark.parametrize(
    "mesh, method, options",
    [
        ("1", "easyspec", {"lp_strategy": FOUR, "tree_width": 3}),
        pytest.param(
            "layer=2,tensor=1",
            "easyspec",
            {"lp_strategy": FOUR, "tree_width": 3},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param("1", "sd", {}, marks=pytest.mark.exhaustive),
        pytest.param("1", "tree", {"tree_nodes": 8}, marks=pytest.mark.exhaustive),
        pytest.param(
            "8",
            "easyspec",
            {"lp_strategy": FOUR, "tree_width": 3, "calibration": False},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_speculation_changes_no_token(pair, plain, mesh, method, options):
    assert texts(opened(pair, mesh, method, **options)) == plain


@pytest.mark.parametrize(
    "mesh, method, options",
    [
        ("1", "easyspec", {"lp_strategy": FOUR, "tree_width": 3}),
        pytest.param("1", "vanilla", {}, marks=pytest.mark.exhaustive),
        pytest.param("8", "sd", {}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_cuts_of_caches_change_no_token(pair, plain, monkeypatch, mesh, method, options):
    monkeypatch.setattr(windows, "ALIGNMENT", 4)  # so that small caches are cut too
    cut, real = [], windows.Window.cut

    def counted(window: Window, x: jax.Array) -> jax.Array:
        cut.append(window.size)
        return real(window, x)

    monkeypatch.setattr(windows.Window, "cut", counted)
    assert texts(opened(pair, mesh, method, **options)) == plain
    assert any(cut)


@pytest.fixture
def parts(monkeypatch) -> set[int]:
    """Let parts of small caches be read, and collect which."""
    monkeypatch.setattr(windows, "SHORTEST", 16)
    monkeypatch.setattr(windows, "LARGE", 32)
    return sizes_read(monkeypatch)


@pytest.mark.parametrize(
    "mesh, method, options",
    [
        ("1", "easyspec", {"lp_strategy": FOUR, "tree_width": 3}),
        pytest.param("1", "vanilla", {}, marks=pytest.mark.exhaustive),
        pytest.param("8", "sd", {}, marks=pytest.mark.exhaustive),
        pytest.param(
            "layer=4,tensor=2",
            "easyspec",
            {"lp_strategy": FOUR, "tree_width": 3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_parts_of_caches_change_no_token(pair, plain, parts, mesh, method, options):
    assert texts(opened(pair, mesh, method, **options)) == plain
    assert parts >= {16, 32, 64}


def test_parts_that_are_too_short_would_be_found(pair, plain, parts, monkeypatch):
    real = windows.make_windows

    def shorter(*args: Any) -> Windows:
        found = real(*args)
        return tuple(
            own if own.part is None else replace(own, part=jnp.maximum(own.part - 1, 0))
            for own in found
        )

    monkeypatch.setattr(windows, "make_windows", shorter)
    assert texts(opened(pair, method="easyspec", lp_strategy=FOUR, tree_width=3)) != plain


@pytest.fixture
def small_windows(monkeypatch):
    """Let caches of a few entries keep only a window, and move on every four tokens."""
    monkeypatch.setattr(kept_window, "STEP", 4)
    monkeypatch.setattr(kept_window, "ALIGNMENT", 4)
    monkeypatch.setitem(PREFILL_SIZES, "cpu", (16,))


@pytest.mark.parametrize(
    "mesh, method, options",
    [
        ("1", "easyspec", {"lp_strategy": FOUR, "tree_width": 3, "adapt": True}),
        ("1", "vanilla", {}),
        pytest.param("1", "ngram", {}, marks=pytest.mark.slow),
        pytest.param("1", "sd", {"prompt_lookup": True}, marks=pytest.mark.slow),
        pytest.param("8", "tree", {"tree_nodes": 8}, marks=pytest.mark.slow),
        pytest.param(
            "layer=2,tensor=1",
            "easyspec",
            {"lp_strategy": GROUPS, "tree_width": 3, "calibration": False},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "8",
            "easyspec",
            {"lp_strategy": GROUPS, "prompt_lookup": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_caches_that_keep_a_window_change_no_token(
    pair, plain, small_windows, mesh, method, options
):
    engine = opened(pair, mesh, method, **options)
    assert engine.keeps_windows
    assert texts(engine) == plain
    programs = engine.programs(GREEDY)
    state = programs.start(GREEDY, [1], 128)
    sizes = [cache.capacity for cache in state.target]
    assert sizes[1] == 128 and {*sizes[:1], *sizes[2:]} <= set(range(20, 60))


@pytest.mark.parametrize(
    "method, options",
    [("easyspec", {"lp_strategy": GROUPS, "tree_width": 3}), ("sd", {"adapt": True})],
    ids=str,
)
def test_rows_that_texts_take_over_keep_a_window(pair, plain, small_windows, method, options):
    """Texts of several lengths in two rows; later ones find caches that have moved on."""
    engine, again = opened(pair, method=method, **options), [*PROMPTS, *PROMPTS, *PROMPTS]
    rows = [
        engine.row(prompt, replace(GREEDY, max_new_tokens=40 - 7 * (number // 2)))
        for number, prompt in enumerate(again)
    ]
    found = dict(engine.complete_each(rows, batch_size=2))
    for number in range(len(again)):
        expected = plain[number % 2][: 40 - 7 * (number // 2)]
        assert found[number].token_ids == expected


def test_texts_of_one_prompt_share_what_keeps_a_window(pair, plain, small_windows):
    engine = opened(pair, method="easyspec", lp_strategy=FOUR)
    prompt = PROMPTS[1] * 4  # longer than the caches of sliding layers
    (alone,) = engine.generate([prompt], GREEDY)
    several = list(engine.generate([prompt] * 3, GREEDY, batch_size=3))
    assert [found.token_ids for found in several] == [alone.token_ids] * 3
    assert several[2].stats.cached_tokens > 20


def test_a_store_of_prefixes_keeps_everything(pair, small_windows):
    engine = opened(pair)
    assert engine.keeps_windows
    engine.prefix_cache = 1 << 24
    assert not engine.keeps_windows and not opened(pair, method="sd", bit_stable=True).keeps_windows
    (first,), (second,) = (engine.generate(PROMPTS[1:], GREEDY) for _ in range(2))
    assert first.token_ids == second.token_ids and second.stats.cached_tokens > 0
    # Batches are decoded as they are asked for, by which time the store may be unwanted.
    later = engine.generate(PROMPTS[1:] * 3, GREEDY, batch_size=1)
    engine.prefix_cache = 0
    assert [found.token_ids for found in later] == [first.token_ids] * 3


@pytest.mark.parametrize("forgotten", ["target", "draft"])
def test_caches_that_do_not_move_on_would_be_found(
    pair, plain, small_windows, monkeypatch, forgotten
):
    """A planted fault: one model's entries stay where they are."""

    def found() -> tuple[list[list[int]], list[int]]:
        engine = opened(pair, method="easyspec", lp_strategy=GROUPS)
        completions = list(engine.generate(PROMPTS, GREEDY, batch_size=2))
        return [c.token_ids for c in completions], [c.stats.accepted for c in completions]

    def late(model: Decoder, caches: Caches, *lengths: jax.Array) -> Caches:
        groups = any(isinstance(block, LayerGroup) for block in model.blocks)
        which = "draft" if groups else "target"
        return caches if which == forgotten else move_on(model, caches, *lengths)

    right = found()
    assert right[0] == plain
    with monkeypatch.context() as whole:
        whole.setattr(Engine, "keeps_windows", False)
        assert found() == right
    monkeypatch.setattr(accepting, "move_on", late)
    wrong = found()
    assert right[forgotten == "draft"] != wrong[forgotten == "draft"]


def test_bit_stable_texts_read_caches_whole(pair, parts, monkeypatch):
    """Where a cut begins depends on the pass, and with it the last bits of sums."""
    monkeypatch.setattr(windows, "ALIGNMENT", 4)
    made, real = set(), windows.make_windows

    def noted(*args: Any) -> Windows:
        found = real(*args)
        made.update((window.size, window.parts) for window in found)
        return found

    monkeypatch.setattr(windows, "make_windows", noted)
    texts(opened(pair, method="sd", bit_stable=True))
    assert made == {(0, ())}


@pytest.mark.slow
def test_wider_windows_of_trees_would_be_found(pair, plain, monkeypatch):
    """A planted fault: nodes read one token more than chains do.

    That nodes are as far away as their positions, not their entries, is tested in
    tests/model/test_windows.py: few paths are accepted that are longer than a window.
    """

    def wider(nodes: Nodes, capacity: int, config: ModelConfig, *reads: Any) -> Windows:
        layers = [replace(kind, window=kind.window and kind.window + 1) for kind in config.layers]
        return tree_windows(nodes, capacity, replace(config, layers=tuple(layers)), *reads)

    monkeypatch.setattr(transformer, "tree_windows", wider)
    assert texts(opened(pair, method="easyspec", lp_strategy=FOUR, tree_width=3)) != plain
