"""docs/errors.md lists every message there is, and the tests it names are there."""

from tests.errors import ROOT, documented, head_of, sites

UPDATE = "run python -m tests.errors"


def test_the_table_lists_every_message_and_no_other():
    assert set(documented()) == {head_of(site) for site in sites()}, UPDATE


def test_every_message_has_a_test_that_is_there():
    for head, test in documented().items():
        path, _, name = test.partition("::")
        assert name and f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (
            f"{head}: {UPDATE}"
        )
