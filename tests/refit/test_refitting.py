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
from easyspec_jax.refit import RefitConfig, refit
from easyspec_jax.refit.fidelity import DEPTHS
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
