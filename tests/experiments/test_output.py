import pytest

from easyspec_jax import EasySpecError
from experiments.output import check_destination, save


def test_results_replace_those_before(tmp_path):
    path = tmp_path / "results.json"
    for text in ("{}", "[]"):
        check_destination(path)
        save(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_results_that_cannot_be_written_leave_those_before(tmp_path):
    path = tmp_path / "results.json"
    save(path, "{}")
    with pytest.raises(UnicodeEncodeError):
        save(path, "\ud800")
    assert path.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["absent/results.json", "results.txt", "directory.json"])
def test_bad_destinations_are_named(tmp_path, name):
    (tmp_path / "directory.json").mkdir()
    with pytest.raises(EasySpecError, match=f"{name} is no .json file"):
        check_destination(tmp_path / name)
