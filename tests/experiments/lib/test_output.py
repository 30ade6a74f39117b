import json

import pytest

from easyspec_jax import EasySpecError
from experiments.lib.output import check_destination, command_line, publish, save


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
    with pytest.raises(EasySpecError, match=f"{name} must be a .json file"):
        check_destination(tmp_path / name)


def test_commands_say_nothing_of_a_machines_paths():
    words = [
        "--target",
        "/somewhere/model",
        "--draft=/somewhere/small",
        "--out",
        "/tmp/x.json",
        "--mesh",
        "2",
        "--out=/tmp/x.json",
    ]
    assert (
        command_line("experiments.table5", words)
        == "python -m experiments.table5 --target model --draft=small --mesh 2"
    )


def test_results_name_their_machine_and_have_a_picture(tmp_path):
    publish(
        tmp_path / "a.json",
        {"mesh": "1"},
        [{"way": "sd"}],
        lambda measured: measured["mesh"].encode(),
    )
    measured = json.loads((tmp_path / "a.json").read_text())
    assert measured["results"] == [{"way": "sd"}] and measured["machine"]["platform"] == "cpu"
    assert (tmp_path / "a.png").read_bytes() == b"1"
