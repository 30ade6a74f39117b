"""Documents say what the results hold."""

import re
import shutil

import pytest

from easyspec_jax import EasySpecError
from experiments import page
from experiments.lib.output import RESULTS
from experiments.lib.passages import PASSAGES
from experiments.registry import SCRIPTS


def documents():
    return [path for pattern in page.DOCUMENTS for path in sorted(page.ROOT.glob(pattern))]


def test_the_documents_are_what_the_results_make():
    assert page.main(["--check"]) == 0


def test_every_passage_has_a_document():
    texts = "".join(path.read_text(encoding="utf-8") for path in documents())
    assert set(re.findall(r"<!-- generated: (\w+) -->", texts)) == set(PASSAGES)
    assert texts.count("<!-- generated: ") == texts.count("<!-- end -->") == len(PASSAGES)


def test_no_figure_within_a_line_begins_it():
    """Markdown would end the paragraph there."""
    for path in documents():
        assert not re.search(
            r"^ *<!-- generated: \w+ -->[^\n]", path.read_text(encoding="utf-8"), re.M
        )


def test_every_script_has_a_line():
    text = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert text.count(f"| `{script.name}` | {script.about} |") == 1


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A repository with one document that has two passages."""
    text = (
        "Before <!-- generated: peers_smollm2 -->0<!-- end --> after.\n\n"
        "  <!-- generated: trees -->\n  <!-- end -->\n"
    )
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    return tmp_path


def test_passages_are_made_in_place(copied):
    assert page.update(copied) == [copied / "README.md"]
    lines = (copied / "README.md").read_text().split("\n")
    assert re.fullmatch(
        r"Before <!-- generated: peers_smollm2 -->1\.\d\d<!-- end --> after\.", lines[0]
    )
    assert lines[2:4] == ["  <!-- generated: trees -->", ""]
    assert lines[4].startswith("  |  | width 1 | width 4 |")
    assert lines[-3:] == ["", "  <!-- end -->", ""]
    assert page.update(copied) == []


def test_what_is_out_of_date_is_named(copied, capsys):
    assert page.main(["--check"]) == 2
    assert "README.md differs from the results" in capsys.readouterr().err
    assert "-->0<!--" in (copied / "README.md").read_text()


def test_a_passage_that_does_not_exist_is_an_error():
    with pytest.raises(EasySpecError, match="unknown passage rhymes: choose from scripts, results"):
        page.generated("<!-- generated: rhymes -->\n<!-- end -->\n", RESULTS)


def test_a_result_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(EasySpecError, match=r"acceptance_demo\.json"):
        page.generated("<!-- generated: card -->\n<!-- end -->\n", tmp_path)


def test_other_results_have_a_page_of_their_own(tmp_path):
    (tmp_path / "results").mkdir()
    shutil.copy(RESULTS / "table4.json", tmp_path / "results")
    assert page.main(["--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Results\n\n### Table 4: what groups approximate\n")
