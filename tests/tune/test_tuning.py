"""The choice is the fastest as it ran; what was predicted only decides what is run."""

import jax
import pytest

from easyspec_jax.engine.pair import open_model
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.tune import tuning
from easyspec_jax.tune.bench import DeviceBench, Sample
from easyspec_jax.tune.candidates import Candidate, Space
from easyspec_jax.tune.predict import Figures
from easyspec_jax.tune.tuning import TuneConfig, choose, open_pair, rows, tune, tune_over
from tests.support.models import save_model

pytestmark = pytest.mark.slow

SPACE = Space([1, 3], [1], 2, ["all"], mlp_lp_sizes=[1])
SAMPLE = Sample(["Hello", "two of them"], SamplingParams(max_new_tokens=12))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3", vocab_size=260, eos_token_id=3, num_hidden_layers=4)
    return open_pair(directory, directory, "2", None, None, "auto")


class Fake:
    """In the place of all measuring: passes are so fast that no draft looks hopeless."""

    def verification(self, nodes):
        return 1e-6

    def step(self, draft, width):
        return 1e-7 / draft.layout.lp_size

    def first(self, draft, tokens):
        return 1e-7

    def acceptance(self, draft, width):
        return {width: (0.9, 1.8)}


@pytest.fixture
def faked(monkeypatch):
    """Fake passes; speeds by method as a test sets them."""
    speeds = {}

    def confirm(bench, best, clock, advance):
        return {None: 1.0} | {candidate: speeds[candidate.speculative.method] for candidate in best}

    for name in ("verification", "step", "first", "acceptance"):
        monkeypatch.setattr(DeviceBench, name, getattr(Fake, name))
    monkeypatch.setattr(tuning, "confirm", confirm)
    return speeds


@pytest.mark.parametrize("fastest, other", [("sd", "easyspec"), ("easyspec", "sd")])
def test_measured_speeds_decide_and_not_predicted_ones(engine, faked, fastest, other):
    faked |= {fastest: 3.0, other: 2.0}
    found = tune_over(engine, "2", SAMPLE, SPACE, finalists=2)
    assert found.choice.speculative.method == fastest
    assert (found.choice.tokens_per_second, found.choice.plain_tokens_per_second) == (3.0, 1.0)
    best = found.rows[0]
    assert (best.prediction.candidate.speculative, best.confirmed) == (
        found.choice.speculative,
        3.0,
    )


def test_plain_decoding_wins_where_every_draft_is_slower(engine, faked):
    faked |= {"sd": 0.9, "easyspec": 0.8}
    found = tune_over(engine, "2", SAMPLE, SPACE, finalists=2)
    assert found.choice.speculative == SpeculativeConfig(method="vanilla")
    assert found.choice.mesh == "layer=1,tensor=2"
    assert [row.confirmed for row in found.rows[:2]] == [0.9, 0.8]


def test_the_mesh_of_the_choice_is_that_of_the_candidate(engine):
    candidate = Candidate(MeshShape(2, 1), SpeculativeConfig())
    assert choose({None: 1.0, candidate: 2.0}, engine).mesh == "layer=2,tensor=1"


def test_rows_are_confirmed_ones_then_measured_ones_then_the_rest():
    shape, figures = MeshShape(1, 1), Figures(1.0, 0.0, {2: 1.0, 5: 1.0})
    ran, measured, unknown = (
        Candidate(shape, SpeculativeConfig(lp_size=n, num_speculative_tokens=1)) for n in (2, 3, 4)
    )
    for candidate in (ran, measured, unknown):
        figures.step[candidate.draft] = {1: 0.1}
    for candidate in (ran, measured):
        figures.first[candidate.draft] = {2: 5.0}
        figures.acceptance[candidate.draft.drafting] = {1: (0.1,)}
    found = rows([unknown, measured, ran], figures, {None: 9.0, ran: 0.01})
    assert [row.prediction.candidate for row in found] == [ran, measured, unknown]
    assert [row.confirmed for row in found] == [0.01, None, None]


def test_everything_is_really_measured(engine):
    found = tune_over(engine, "2", SAMPLE, SPACE, finalists=1, seconds=1e6)
    assert found.not_reached == 0
    assert found.plain > 0
    assert len(found.figures.step) == 3  # the ordinary draft, and both splits of the fuzzy one
    assert all(
        0 < seconds < 10 for steps in found.figures.step.values() for seconds in steps.values()
    )
    own = engine.variant(found.choice.speculative)
    (plain,), (text,) = (e.generate(["Hello"], SAMPLE.sampling) for e in (engine.baseline(), own))
    assert text.token_ids == plain.token_ids


def test_variants_share_weights_that_lie_alike(tmp_path):
    save_model(tmp_path, "smollm2", vocab_size=260, eos_token_id=3, num_hidden_layers=4)
    engine = open_model(
        tmp_path, tmp_path, mesh="layer=2,tensor=2", speculative=SpeculativeConfig(lp_size=2)
    )

    def buffers(model):
        return [
            {shard.device: shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}
            for leaf in jax.tree.leaves(model)
        ]

    target, draft = engine.load()
    deeper = engine.variant(SpeculativeConfig(lp_size=2, num_speculative_tokens=3, tree_width=2))
    assert deeper.load()[1] is draft
    assert buffers(deeper.load()[0]) == buffers(target)
    split = engine.variant(SpeculativeConfig(lp_size=2), MeshShape(1, 4))
    assert dict(split.mesh.shape) == {"layer": 1, "tensor": 4}
    assert buffers(split.load()[0]) == buffers(target)
    assert split.load()[1] is not draft
    assert engine.variant(SpeculativeConfig(lp_size=3)).load()[1] is not draft
    sampling = SamplingParams(max_new_tokens=10)
    texts = [
        next(e.generate(["Hello"], sampling)).token_ids
        for e in (engine, deeper, split, engine.baseline())
    ]
    assert all(text == texts[0] for text in texts)


def test_tune_takes_a_config_and_any_pair_and_stores(engine, faked, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    faked |= {"easyspec": 3.0, "sd": 2.0}
    config = TuneConfig(
        prompts=SAMPLE.prompts,
        max_new_tokens=12,
        lp_sizes=[1, 3],
        mlp_lp_sizes=[1],
        tree_widths=[1],
        max_levels=2,
        draft_tensor_parallel_sizes=["all"],
    )
    pair = engine.variant(SpeculativeConfig(lp_size=2))
    tuned = tune(pair, config)
    assert tuned.mesh == "2"
    assert tuned.choice.speculative.lp_size == 3
    path = tuned.store()
    try:
        directory = pair.target.directory
        opened = open_model(directory, directory, mesh="2", speculative="tuned")
        assert opened.speculative == tuned.choice.speculative
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"confirm": 0}, "`confirm` 0 must be at least 1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` 0 must be at least 1"),
        ({"seconds": 0.0}, "`seconds` 0.0 must be a number above 0"),
        ({"chat": True}, "`chat` needs `prompts`"),
        ({"prompts": []}, "`prompts` is empty"),
    ],
)
def test_configs_that_cannot_be(fields, complaint):
    with pytest.raises(EasySpecError, match=complaint):
        TuneConfig(**fields)


def test_a_mesh_is_a_split_of_the_pairs_devices(engine):
    with pytest.raises(EasySpecError, match="`mesh` 4 is not a split of the pair's 2 devices"):
        tune(engine, TuneConfig(mesh="4"))


def test_a_model_alone_has_nothing_to_choose(engine):
    with pytest.raises(EasySpecError, match="nothing to choose without `draft`"):
        tune(engine.baseline())
