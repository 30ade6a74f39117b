"""Flags open the pair they name."""

import pytest

from easyspec_jax import EasySpecError, SpeculativeConfig, demo
from easyspec_jax.cli.command import Parser
from experiments.lib.output import settings
from experiments.lib.pair import add_flags, draft_name, names, open_draft, open_pair, questions_of


def flags(*words):
    parser = Parser()
    add_flags(parser)
    return parser.parse_args(words)


def test_the_bundled_pair_is_asked_for_code():
    args = flags()
    assert names(args) == {"target": "target", "draft": "draft", "bundled": True}
    assert {question.category for question in questions_of(args)} == {"code"}
    assert open_draft(args).directory == demo.DRAFT


def test_other_pairs_are_asked_our_questions():
    args = flags("--target", "somewhere/big", "--draft", "somewhere/small")
    assert names(args) == {"target": "big", "draft": "small", "bundled": False}
    assert len(questions_of(args)) == 12


def test_a_draft_alone_has_the_name_that_its_pair_was_fetched_by(tmp_path):
    args = flags("--draft", str(tmp_path / "draft"))
    assert draft_name(args) == {"draft": "draft", "bundled": False}
    (tmp_path / "pair.json").write_text('{"draft": {"name": "Small-1B"}}')
    assert draft_name(args) == {"draft": "Small-1B", "bundled": False}


def test_links_are_followed_only_where_that_is_asked_for(tmp_path):
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        for path in (demo.TARGET.parent / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    words = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    with pytest.raises(EasySpecError, match="`allow_links`"):
        open_pair(flags(*words), SpeculativeConfig())
    with pytest.raises(EasySpecError, match="`allow_links`"):
        open_draft(flags(*words))
    linked = flags(*words, "--allow-links")
    assert open_pair(linked, SpeculativeConfig()).target.directory == tmp_path / "target"
    assert open_draft(linked).directory == tmp_path / "draft"
    assert "allow_links" not in settings(linked)
