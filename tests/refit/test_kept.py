"""Values on disk: what was written comes back, and anything else counts as nothing."""

import pytest

from easyspec_jax import EasySpecError
from easyspec_jax.refit.kept import read_kept, write_kept


def test_a_value_comes_back_under_its_key_and_name_alone(tmp_path):
    path = tmp_path / "kept.json"
    assert read_kept(path, "key", "words") is None
    write_kept(path, "key", "words", [1, [2.5, None]])
    assert read_kept(path, "key", "words") == [1, [2.5, None]]
    assert read_kept(path, "other", "words") is None
    assert read_kept(path, "key", "figures") is None


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"key": "key"}', "[" * 200_000, "\xff"]
)
def test_a_damaged_file_is_as_good_as_none(content, tmp_path):
    path = tmp_path / "kept.json"
    path.write_bytes(content.encode("latin-1"))
    assert read_kept(path, "key", "words") is None


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(EasySpecError, match=r"kept\.json cannot be written: No such file"):
        write_kept(tmp_path / "absent" / "kept.json", "key", "words", 1)
