"""refit() without the command: on a pair or on a draft alone, without a word."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from easyspec_jax import EasySpecError, SpeculativeConfig, open_model
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.draft.grouping import format_layout
from easyspec_jax.draft.refit_file import load
from easyspec_jax.refit import RefitConfig, refit, refitting
from easyspec_jax.refit.borders import candidates, measure_groups
from easyspec_jax.refit.fidelity import DEPTHS
from easyspec_jax.refit.texts import LENGTH
from tests.support.models import save_model

MESH = "layer=2,tensor=1"
VANILLA = SpeculativeConfig(method="vanilla")


@pytest.fixture(scope="module")
def pair(draft, tmp_path_factory):
    """The draft with a target of another family, vocabulary and length."""
    target = tmp_path_factory.mktemp("target")
    options = {"vocab_size": 320, "max_position_embeddings": 512}
    save_model(target, "llama3", num_hidden_layers=2, **options)
    return open_model(target, draft[0].directory, mesh=MESH)


@pytest.mark.slow
def test_a_pair_refits_its_draft_as_if_it_were_alone(pair, draft, tmp_path, capsys):
    prompts, out = ["a fox", "a much shorter fox"], tmp_path / "alone"
    config = RefitConfig(lp_size=3, borders="paper", prompts=prompts, tokens=1000, out=out)
    alone = open_model(draft[0].directory, mesh=MESH, speculative=VANILLA)
    fitted = refit(alone, config)
    assert fitted.path == out / "lp3.safetensors"
    assert fitted.nbytes == fitted.path.stat().st_size
    assert format_layout(fitted.before) == format_layout(fitted.after) == "0,1-2,3-5,6,7"
    assert load(fitted.path, open_checkpoint(draft[0].directory))[0] == fitted.after
    before, after = fitted.overlaps["as it was"], fitted.overlaps["refit"]
    assert list(fitted.overlaps) == ["as it was", "refit"]
    assert len(before) == len(after) == DEPTHS
    assert 0 < min(before) < min(after) <= 1
    again = refit(pair, replace(config, out=str(tmp_path / "pair")))
    assert again.overlaps == fitted.overlaps
    one, two = load_file(fitted.path), load_file(again.path)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(two[name], tensor, err_msg=name)
    shown = capsys.readouterr()
    assert not shown.out and not shown.err


@pytest.mark.slow
def test_a_target_answers_the_prompts(pair, draft, tmp_path, monkeypatch):
    prompts = ["a fox", "a much shorter fox", "the", "two foxes"]
    config = RefitConfig(
        lp_size=2, borders="paper", prompts=prompts, answered_by="target", tokens=1000, out=tmp_path
    )
    fitted_on = []
    monkeypatch.setattr(
        refitting, "fit", lambda _loader, _layout, texts, *_: fitted_on.append(texts) or {}
    )
    monkeypatch.setattr(refitting, "save", lambda *_: None)
    monkeypatch.setattr(refitting, "_compared", lambda *_: {})
    (tmp_path / "lp2.safetensors").touch()
    refit(pair, config)
    # A tenth of the texts, at least one, is held out, and they come first.
    sampling = replace(config.sampling_params(), max_new_tokens=LENGTH)
    first = pair.target_alone().generate(prompts, sampling, batch_size=len(prompts))
    ids = [token for done in first for token in done.prompt_ids + done.token_ids]
    told = [token for token in ids if token < pair.draft.config.vocab_size]
    (texts,) = fitted_on
    assert len(told) > LENGTH
    assert texts.ravel()[: len(told) - LENGTH].tolist() == told[LENGTH:]
    # Another size is fitted on the answers that are there; another seed has others.
    answered = []
    answer = refitting.answer_prompts
    monkeypatch.setattr(
        refitting, "answer_prompts", lambda *args: answered.append(args[3].seed) or answer(*args)
    )
    (tmp_path / "lp3.safetensors").touch()
    refit(pair, replace(config, lp_size=3))
    refit(pair, replace(config, seed=7))
    refit(pair, replace(config, seed=7, lp_size=3))
    assert answered == [7]
    np.testing.assert_array_equal(fitted_on[1], texts)
    np.testing.assert_array_equal(fitted_on[3], fitted_on[2])
    assert not np.array_equal(fitted_on[2], texts)
    with pytest.raises(EasySpecError, match="`answered_by` target needs a pair"):
        refit(open_model(draft[0].directory, speculative=VANILLA), config)


@pytest.mark.exhaustive
def test_a_smaller_size_takes_the_overlaps_that_are_there(pair, tmp_path, monkeypatch):
    measured = []

    def measure(*args):
        measured.append(args[1])
        return measure_groups(*args)

    monkeypatch.setattr(refitting, "measure_groups", measure)
    text = tmp_path / "text"
    text.write_text("a quick brown fox jumps over the lazy dog " * 60)
    config = RefitConfig(text=text, tokens=1000, out=tmp_path / "one")
    for lp_size in (2, 3, 2):
        refit(pair, replace(config, lp_size=lp_size))
    assert measured == [2, 3]
    # The same groups as if they had been measured for this size alone.
    alone = refit(pair, replace(config, lp_size=2, out=tmp_path / "two"))
    assert alone.after == load(tmp_path / "one" / "lp2.safetensors", pair.draft)[0]
    refit(pair, replace(config, lp_size=2, ridge=0.1))
    assert measured == [2, 3, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["interrupted", "diverged"])
def test_a_fit_outlives_its_distillation(draft, tmp_path, monkeypatch, fault):
    def distil(loader, layout, tensors, *_):
        if fault == "interrupted":
            raise KeyboardInterrupt
        return {name: np.full_like(tensor, np.nan) for name, tensor in tensors.items()}

    monkeypatch.setattr(refitting, "distill", distil)
    text = tmp_path / "text"
    text.write_text("a quick brown fox jumps over the lazy dog " * 60)
    config = RefitConfig(lp_size=2, borders="paper", text=text, tokens=1000, out=tmp_path / "out")
    alone = open_model(draft[0].directory, mesh=MESH, speculative=VANILLA)
    message = "has diverged" if fault == "diverged" else None
    with pytest.raises((KeyboardInterrupt, EasySpecError), match=message):
        refit(alone, replace(config, distill=1))
    held = load_file(tmp_path / "out" / "lp2.safetensors")
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in held.values())
    with pytest.raises(EasySpecError, match=r"`text` .* cannot be read"):
        refit(alone, replace(config, text=tmp_path / "absent", out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_search_makes_no_more_collectives_than_the_size_asked_for(pair, tmp_path, monkeypatch):
    """Of 8 layers the rule forms 0,1-6,7 at size 7: its largest group would allow four groups."""

    def overlaps(_loader, lp_size, sizes, *_args):
        return {group: 0.99 ** len(group[0]) ** 2 for group in candidates(8, lp_size, sizes)}

    monkeypatch.setattr(refitting, "measure_groups", overlaps)
    monkeypatch.setattr(refitting, "fit", lambda *_: {})
    monkeypatch.setattr(refitting, "save", lambda path, *_: path.touch())
    monkeypatch.setattr(refitting, "_compared", lambda *_: {})
    text = tmp_path / "text"
    text.write_text("a quick brown fox jumps over the lazy dog " * 60)
    fitted = refit(pair, RefitConfig(lp_size=7, text=text, tokens=1000, out=tmp_path))
    assert format_layout(fitted.before) == "0,1-6,7"
    assert sorted(len(group) for group in fitted.after.groups) == [2, 3, 3]
    assert fitted.after.collectives == fitted.before.collectives


@pytest.mark.slow
def test_a_pair_of_narrower_types_has_the_same_refit(pair, draft, tmp_path):
    """It is fitted to floats, which the types in memory are rounded from."""
    text = tmp_path / "text"
    text.write_text("a quick brown fox jumps over the lazy dog " * 60)
    config = RefitConfig(lp_size=2, borders="paper", text=text, tokens=1000, out=tmp_path / "one")
    narrow = open_model(
        pair.target.directory,
        draft[0].directory,
        mesh=MESH,
        draft_weights="int8",
        kv_dtype="int8",
    )
    floats, rounded = refit(pair, config), refit(narrow, replace(config, out=tmp_path / "two"))
    assert floats.overlaps == rounded.overlaps


def test_a_draft_that_is_alone_stays_itself(draft):
    alone = open_model(draft[0].directory, mesh=MESH, speculative=VANILLA)
    assert alone.draft_alone() is alone


def test_a_drafts_texts_end_where_the_targets_do(pair):
    """As far as the draft has those ids: its vocabulary ends at 299."""
    engine = copy(pair)
    config = replace(engine.target.config, stop_ids=(290, 2, 310))
    engine.target = replace(engine.target, config=config)
    assert engine.draft_alone().target.config.stop_ids == (2, 290)


def test_nothing_is_written_for_a_config_that_does_not_suit_the_draft(pair, tmp_path):
    out = tmp_path / "refit"
    with pytest.raises(EasySpecError, match="`lp_size` of at least 2"):
        refit(pair, RefitConfig(lp_size=1, out=out))
    with pytest.raises(EasySpecError, match=r"nothing to resume; leave out `resume`"):
        refit(pair, RefitConfig(resume=True, distill=1, out=out))
    with pytest.raises(EasySpecError, match=r"`text` missing\.txt cannot be read"):
        refit(pair, RefitConfig(text="missing.txt", out=out))
    assert not list(out.glob("*"))
