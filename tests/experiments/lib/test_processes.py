"""A command in several processes; the runs of whole experiments are tested with those."""

import os

import pytest

from easyspec_jax import EasySpecError
from easyspec_jax.cli.command import Parser
from experiments.lib.processes import OWN_FLAGS, add_process_flags, in_processes


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs affinities of processes")
def test_more_processes_than_cores_are_refused():
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(EasySpecError, match=f"{cores + 1} processes need {cores + 1} cores"):
        in_processes("experiments.table2", [], cores + 1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs affinities of processes")
def test_a_process_that_fails_is_one_line():
    with pytest.raises(EasySpecError, match="a process has failed, and said why"):
        in_processes("experiments.table2", ["--no-such-flag"], 1)


def test_one_process_is_given_by_hidden_flags():
    parser = Parser()
    add_process_flags(parser, ["--mesh", "2"])
    assert set(vars(parser.parse_args([]))) == set(OWN_FLAGS)
    assert "--process-id" not in parser.format_help()
