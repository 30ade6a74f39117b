"""docs/errors.md lists every message, with tests that exist."""

from tests.errors import documented, exists, head_of, sites

UPDATE = "run python -m tests.errors"


def test_the_table_lists_every_message_and_no_other():
    assert set(documented()) == {head_of(site) for site in sites()}, UPDATE


def test_every_message_has_a_test_that_is_there():
    for head, test in documented().items():
        assert exists(test), f"{head}: {UPDATE}"
