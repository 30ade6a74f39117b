"""Made-up models do what they promise in both engines, and results are written as measured."""

import json
import weakref
from functools import partial

import jax
import numpy as np
import pytest
import torch

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.decode.loop import decode
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.decode.timing import alone, pass_case, round_case
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import run_exact
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape, open_mesh
from easyspec_jax.verify import Greedy
from experiments.bench import roofline_models as models
from experiments.bench import roofline_options, roofline_parts, roofline_texts
from experiments.bench.bench_roofline import main
from experiments.bench.roofline_texts import SyntheticAcceptance
from experiments.bench.roofline_timing import memory_cases
from tests.support.models import forward

LEVELS, VOCAB = 5, 384
TARGET = models.SMOLLM2_135M | {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
}
DRAFT = TARGET | {"num_hidden_layers": 4, "hidden_size": 48}
QWEN = TARGET | {"model_type": "qwen2", "tie_word_embeddings": False}
WALK = models.Walk.of(VOCAB, 0.7)
CONTEXT, COUNT = 16, 40


@pytest.fixture(scope="module")
def mesh():
    return open_mesh(MeshShape(1, 1))


@pytest.fixture(scope="module")
def sources():
    """Target and draft of the walk."""
    pair = (TARGET, WALK.target), (DRAFT, WALK.draft)
    return tuple(
        models.constructed_source(fields, "float32", successor) for fields, successor in pair
    )


@pytest.fixture(scope="module")
def pair(mesh, sources):
    target, draft = sources
    return models.load(target, mesh), models.load(draft, mesh, paper_groups(4, 3))


@pytest.fixture(scope="module")
def programs(mesh, pair):
    """Of speculative decoding."""
    target, draft = pair
    return roofline_parts.speculative(mesh, target, draft, Greedy())


def agreeing(at: int, limit: int) -> int:
    """How many tokens behind the walk's `at`-th one a draft of at most `limit` gets right."""
    known = WALK.agrees[WALK.order[np.arange(at, at + limit) % VOCAB]]
    return limit if known.all() else int(np.argmin(known))


@pytest.mark.parametrize("agreement", [0.0, 0.7, 0.999, 1.0])
def test_a_walk_visits_every_id_and_the_draft_errs_where_it_should(agreement):
    walk = models.Walk.of(VOCAB, agreement)
    assert sorted(walk.text(5, VOCAB)) == list(range(VOCAB))
    text = walk.text(0, 3 * VOCAB)
    assert walk.target[text[:-1]].tolist() == text[1:]
    assert sorted(walk.draft) == list(range(VOCAB))
    np.testing.assert_array_equal(walk.draft == walk.target, walk.agrees)
    assert np.mean(walk.agrees) == pytest.approx(agreement, abs=0.06)


def test_our_engine_accepts_what_the_walk_says(mesh, pair, programs):
    complete = roofline_texts.ours(programs)
    plain = roofline_texts.ours(alone(mesh, pair[0]))
    for start in (0, 100):
        prompt = WALK.text(start, CONTEXT)
        text = complete(prompt, COUNT)
        assert text.tokens == plain(prompt, COUNT).tokens == WALK.text(start + CONTEXT, COUNT)
        at, remaining, passes, drafted, accepted = start + CONTEXT, COUNT - 1, 1, 0, 0
        while remaining:
            right = agreeing(at, LEVELS)
            made = min(right + 1, remaining)
            passes, drafted, accepted = (
                passes + 1,
                drafted + min(LEVELS, remaining),
                accepted + min(right, made),
            )
            at, remaining = at + made, remaining - made
        assert (text.passes, text.drafted, text.accepted) == (passes, drafted, accepted)
        assert 0 < accepted < drafted


def test_transformers_accepts_what_the_walk_says(sources):
    ways = roofline_texts.theirs((TARGET, DRAFT), sources, "cpu", LEVELS)
    prompt = WALK.text(0, CONTEXT)
    plain = ways["transformers"](prompt, COUNT)
    assisted = ways["transformers, assisted"](prompt, COUNT)
    assert plain.tokens == assisted.tokens == WALK.text(CONTEXT, COUNT)
    at, remaining, passes = CONTEXT - 1, COUNT, 0
    while remaining:
        made = agreeing(at, min(LEVELS, remaining - 1)) + 1
        at, remaining, passes = at + made, remaining - made, passes + 1
    assert (plain.passes, assisted.passes) == (COUNT, passes)
    # A cache of a fixed size changes no text.
    static, both = (ways[name](prompt, COUNT) for name in roofline_texts.STATIC)
    assert static == plain
    assert both.tokens == plain.tokens


def test_the_walk_survives_bfloat16(mesh):
    source = models.constructed_source(TARGET, "bfloat16", WALK.target)
    ours = forward(models.load(source, mesh), mesh, np.arange(VOCAB)[None])
    np.testing.assert_array_equal(ours[0].argmax(-1), WALK.target)
    theirs = models.torch_model(TARGET, source, "cpu")
    assert theirs.dtype == torch.bfloat16
    with torch.no_grad():
        found = theirs(torch.arange(VOCAB)[None]).logits[0].argmax(-1)
    np.testing.assert_array_equal(found.numpy(), WALK.target)


@pytest.mark.parametrize("fields", [DRAFT, QWEN], ids=["llama", "qwen2"])
def test_both_engines_have_the_same_random_model(mesh, fields):
    source = models.random_source(fields, "float32")
    ids = np.random.default_rng(1).integers(VOCAB, size=(1, 12))
    ours = forward(models.load(source, mesh), mesh, ids)
    with torch.no_grad():
        theirs = models.torch_model(fields, source, "cpu")(torch.from_numpy(ids)).logits.numpy()
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(ours[:, :, :VOCAB], theirs, atol=2e-4)


@pytest.mark.parametrize("shape", [MeshShape(1, 1), MeshShape(2, 2)])
def test_copied_layers_are_those_that_would_be_read(shape):
    source, mesh = models.random_source(DRAFT, "float32"), open_mesh(shape)
    groups = paper_groups(4, 3)
    rows = padded_vocab_size(mesh, source.config)
    loader = Loader(
        source=source,
        config=source.config,
        mesh=mesh,
        axes=ALL_AXES,
        dtype=source.dtype,
        vocab_rows=rows,
        num_ids=VOCAB,
    )
    read, copied = (
        models.load_draft(loader, Layout.uniform(groups)),
        models.load(source, mesh, groups),
    )
    pairs = list(zip(jax.tree.leaves(read), jax.tree.leaves(copied), strict=True))
    for one, other in pairs:
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)
    # A CPU's devices share what is replicated.
    buffers = [x.addressable_shards[0].data.unsafe_buffer_pointer() for _, x in pairs]
    assert len(set(buffers)) == len(buffers)


def test_bytes_are_those_of_the_arrays_that_a_pass_reads(mesh):
    for fields in (TARGET, QWEN):
        source = models.random_source(fields, "float32")
        model = models.load(source, mesh)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        unread = 0 if fields["tie_word_embeddings"] else VOCAB * 64 * 4
        assert models.weight_bytes(source.config, source.dtype) == held - unread
        caches = jax.eval_shape(lambda model=model: model.init_caches(1, 32))
        cached = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
        assert models.kv_bytes(source.config, source.dtype, 32) == cached


def test_published_sizes():
    """Parameters of the models whose shapes these are; a tied head counts once."""
    sizes = {
        name: [models.weight_bytes(model_config(f), np.dtype(np.int8)) for f in pair]
        for name, pair in models.SHAPES.items()
    }
    embedding = 128256 * 4096
    assert sizes["h200-8b-1b"] == [8_030_261_248 - embedding, 1_235_814_400]
    assert sizes["h200-32b-1.5b"] == [32_763_876_352 - 152064 * 5120, 1_543_714_304 + 128 * 1536]
    assert sizes["cpu"][0] == 134_515_008


def test_ratios_are_taken_within_a_repeat():
    timings = roofline_parts.Timings({"a": np.array([1.0, 4.0, 2.0])}, np.array([10.0, 5.0, 20.0]))
    row = timings.row("a", 10, over_b=np.array([3.0, 1.0, 2.0]))
    assert row == {
        "name": "a",
        "seconds": 2.0,
        "floor_seconds": 1.0,
        "over_floor": 2.0,
        "share_of_bandwidth": 0.5,
        "over_b": 2.0,
        "bytes": 10,
        "repeats": [1.0, 4.0, 2.0],
    }


@pytest.mark.parametrize(
    ("tokens", "loops", "run"),
    [(1, 1, run_exact), (4, 1, run_exact), (1, 3, run_fuzzy), (2, 3, run_fuzzy)],
)
def test_a_pass_yields_the_next_tokens(mesh, pair, tokens, loops, run):
    case = pass_case(
        "pass", alone(mesh, pair[1]), tokens, run, 0, context=8, capacity=32, loops=loops
    )
    planned = np.zeros(1, int)
    for _ in range(2):
        case.state = case.step(case.state)
        for _ in range(loops):
            planned = WALK.draft[planned]
        np.testing.assert_array_equal(case.state[1], np.broadcast_to(planned, (1, tokens)))


def test_a_round_is_sampled_from_the_same_place_every_time(programs):
    case = round_case(
        "round", programs, 0, context=8, capacity=programs.sizes.capacity(CONTEXT + COUNT)
    )
    ends = []
    for _ in range(2):
        case.sample(2)
        ends.append(int(case.state.length[0]))
    assert ends[0] == ends[1] >= 8 + 2


def test_memory_is_split_over_all_devices():
    mesh = open_mesh(MeshShape(2, 4))
    for case in memory_cases(mesh, np.dtype(np.float32), 2**20):
        assert case.bytes in (2**20, 2**21)
        state = case.step(case.state)
        assert state.sharding.num_devices == 8
        assert not state.is_fully_replicated


@pytest.mark.parametrize("width", [1, 3])
def test_synthetic_acceptance_is_near_what_was_asked(mesh, width):
    """Rates hold among the rounds that reach a level; texts are valid and belong to their seed."""
    asked = 0.7
    source = models.random_source(TARGET, "float32")
    target, draft = models.load(source, mesh), models.load(source, mesh, paper_groups(1, 1))
    config = RoundConfig(
        3, calibration=True, verifier=SyntheticAcceptance(asked), stop_ids=(), width=width
    )
    programs = Programs(mesh, target, draft, config)

    def reports(seed):
        return list(decode(programs, [[1, 2, 3]] * 8, [100] * 8, SamplingParams(seed=seed)))[1:]

    tried = passed = 0
    measured = reports(0)
    for report in measured:
        whole = report.drafted == 3
        tried += np.sum(np.minimum(report.accepted[whole] + 1, 3))
        passed += np.sum(report.accepted[whole])
        assert report.tokens.min() >= 0
        assert report.tokens.max() < VOCAB
    assert tried > 400
    assert passed / tried == pytest.approx(asked, abs=3 * (asked * (1 - asked) / tried) ** 0.5)
    for same, again in zip(measured, reports(0), strict=True):
        np.testing.assert_array_equal(same.tokens, again.tokens)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """main() on a tiny shape, with few cases."""
    monkeypatch.setitem(models.SHAPES, "tiny", (TARGET, DRAFT))
    monkeypatch.setattr(roofline_parts, "VERIFIED", (1, 3))
    monkeypatch.setattr(roofline_parts, "LP_SIZES", (1, 2))
    monkeypatch.setattr(roofline_parts, "WIDTHS", (1,))
    few = [
        "--repeats",
        "1",
        "--calls",
        "1",
        "--context",
        "16",
        "--max-new-tokens",
        "24",
        "--memory-mib",
        "1",
    ]
    return partial(_tiny, few, tmp_path / "results.json")


def _tiny(few, out, *arguments):
    code = main(["--shape", "tiny", *few, "--out", str(out), *arguments])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_parts_are_measured_and_written(tiny, tmp_path, capsys):
    code, results = tiny("--only", "round", "draft", "target", "bandwidth")
    assert code == 0
    assert results["shape"] == "tiny"
    names = {
        part: [row["name"] for row in held["results"]] for part, held in results["parts"].items()
    }
    assert names == {
        "bandwidth": ["copy", "read, sum", "read, product"],
        "target": ["plain step", "1 tokens", "3 tokens"],
        "draft": [
            "exact, N = 1",
            "exact, N = 1, fused kernels",
            "exact, N = 2",
            "fuzzy, N = 2",
            "fuzzy, N = 2, MLP pairs",
        ],
        "round": ["calibration", "fuzzy, width 1", "verification, 6 tokens", "round, width 1"],
    }
    for held in results["parts"].values():
        assert held["settings"]["context"] == 16
        assert held["machine"]["devices"] == 1
        assert all(len(row["repeats"]) == 1 and row["repeats"][0] > 0 for row in held["results"])
    assert "verification, 6 tokens" in capsys.readouterr().out

    code, again = tiny("--only", "bandwidth")
    assert code == 0
    assert again["parts"].pop("bandwidth") != results["parts"].pop("bandwidth")
    assert again == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.slow
def test_narrower_matrices_are_compared_with_floats(tiny, capsys):
    code, results = tiny("--only", "narrow")
    assert code == 0
    rows = {row["name"]: row for row in results["parts"]["narrow"]["results"]}
    assert list(rows) == [
        f"{kind}, {tokens} tokens"
        for kind in ("floats", "int8", "int4", "int4 without kernel")
        for tokens in (1, 6, 21)
    ]
    assert rows["floats, 6 tokens"]["over_floats"] == 1
    # On a CPU int4 takes a byte a number too, and has more scales.
    floats, int8, int4 = (rows[f"{kind}, 1 tokens"]["bytes"] for kind in ("floats", "int8", "int4"))
    assert 0.25 * floats < int8 < int4 < 0.5 * floats
    assert "int4, 21 tokens" in capsys.readouterr().out  # names never wrap, headings do


@pytest.mark.parametrize("together", [True, False])
def test_texts_are_compared_and_written(tiny, monkeypatch, together):
    """Weights that do not fit twice are loaded once: transformers' go before ours come."""
    successor, alive = models.Walk.of(VOCAB, 0.8).target, []

    class Complete:
        def __call__(self, prompt, count):
            tokens = [int(successor[prompt[-1]])]
            while len(tokens) < count:
                tokens.append(int(successor[tokens[-1]]))
            return roofline_texts.Text(tokens, count // 2, 10, 5)

    def theirs(*_):
        complete = Complete()
        alive.append(weakref.ref(complete))
        names = "transformers", "transformers, assisted", *roofline_texts.STATIC
        return dict.fromkeys(names, complete) | {roofline_texts.STATIC[1]: broken}

    def broken(prompt, count):
        raise ValueError("static caches\ncannot be assisted")

    def ours(_):
        assert [reference() for reference in alive] == ([] if together else [None])
        return Complete()

    monkeypatch.setattr(roofline_texts, "fit_together", lambda device, size: together)
    monkeypatch.setattr(roofline_texts, "theirs", theirs)
    monkeypatch.setattr(roofline_texts, "ours", ours)
    code, results = tiny("--only", "peers")
    assert code == 0
    *rows, failed = results["parts"]["peers"]["results"]
    theirs_names = ["transformers", "transformers, assisted", roofline_texts.STATIC[0]]
    first, second = (["plain", "easyspec"], theirs_names)[:: 1 if together else -1]
    assert [row["name"] for row in rows] == first + second
    assert failed == {"name": roofline_texts.STATIC[1], "failed": "ValueError: static caches"}
    for row in rows:
        assert (row["as_planned"], row["alternating"]) == (1, together)
        assert (row["tokens_per_pass"], row["acceptance_rate"]) == (2, 0.5)
        assert row["tokens_per_second"] == 24 / row["repeats"][0]

    monkeypatch.setattr(roofline_texts, "ours", lambda _: Complete())
    code, results = tiny("--only", "synthetic", "--synthetic-acceptance", "0.5", "1")
    assert code == 0
    names = [row["name"] for row in results["parts"]["synthetic"]["results"]]
    assert names == ["plain", "acceptance 0.5", "acceptance 1"]


def test_kernels_are_counted_and_options_compared(tiny, monkeypatch):
    sets = {"wide": {"xla_cpu_prefer_vector_width": 512}, "misspelt": {"xla_cpu_prefer_width": 1}}
    monkeypatch.setitem(roofline_options.CANDIDATES, "cpu", sets)
    code, results = tiny("--only", "profile", "options")
    assert code == 0
    profiled = results["parts"]["profile"]["results"]
    assert [row["name"] for row in profiled] == ["plain step", "round, N = 1", "round, N = 4"]
    # A round runs the target once and the draft several times.
    assert 0 < profiled[0]["kernels"] < profiled[1]["kernels"]
    assert all(0 < row["busy_share"] <= 1 for row in profiled)
    wide, misspelt = results["parts"]["options"]["results"]
    assert wide["over_default"] > 0 and wide["options"] == sets["wide"]
    assert "No such compile option" in misspelt["failed"]
    assert "seconds" not in misspelt


def test_rows_are_saved_one_by_one(tiny, monkeypatch):
    def part(bench):
        yield {"name": "first"}
        raise KeyboardInterrupt

    monkeypatch.setitem(roofline_parts.PARTS, "options", part)
    code, results = tiny("--only", "options")
    assert code == 130
    assert results["parts"]["options"]["results"] == [{"name": "first"}]


def test_what_fails_leaves_the_results_alone(tiny, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps({"shape": "tiny", "parts": {}}))
    monkeypatch.setitem(roofline_parts.PARTS, "bandwidth", lambda bench: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny("--only", "bandwidth")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text())["parts"] == {}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shape", "h100"], "invalid choice: 'h100'"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--context", "8192"], "exceed the 8192 positions"),
        (
            ["--synthetic-acceptance", "0.5", "1.5"],
            "--synthetic-acceptance 1.5 must be from 0 to 1",
        ),
        (["--agreement", "-1"], "--agreement -1.0 must be from 0 to 1"),
        (
            ["--shape", "h200-32b-1.5b"],
            "--shape h200-32b-1.5b needs 125.0 GiB for its weights in float32 and there are",
        ),
        (["--mesh", "many"], "--mesh 'many' is neither"),
        (["--out", "absent/results.json"], "--out absent/results.json must be a .json file"),
        (["--out", "results.txt"], "--out results.txt must be a .json file"),
    ],
)
def test_bad_arguments_are_one_line(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline_parts, "host_memory", lambda: 2**34)
    monkeypatch.chdir(tmp_path)
    assert main(["--out", "results.json", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("experiments.bench_roofline: error: ")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_other_files_are_not_overwritten(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text('{"shape": "h200-8b-1b", "parts": {}}')
    assert main(["--out", str(path)]) == 2
    assert "has no results of --shape cpu" in capsys.readouterr().err
