"""Progress is shown on terminals and nowhere else."""

import pytest

from easyspec_jax import progress
from easyspec_jax.progress import bar, progress_lines

ERASE_LINE, HIDE_CURSOR, SHOW_CURSOR = "\x1b[2K", "\x1b[?25l", "\x1b[?25h"


def test_nothing_without_a_terminal(capsys):
    with bar("Reading", 3) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")


def test_lines_where_they_are_asked_for(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 15.0, 20.0, 31.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress_lines(), bar("Reading", 9) as advance:
        for amount in (1, 2, 1, 1, 3):
            advance(amount)
    assert capsys.readouterr() == ("", "Reading: 3 of 9 after 11 s\nReading: 8 of 9 after 31 s\n")
    with bar("Reading", 9) as advance:
        advance(9)
    assert capsys.readouterr() == ("", "")


def test_lines_are_not_for_terminals(terminal):
    with progress_lines(0), bar("Reading", 3000) as advance:
        advance(2000)
    assert "after" not in terminal.readouterr().err


@pytest.mark.parametrize(("in_bytes", "numbers"), [(False, "2000/3000"), (True, "2.0/3.0 kB")])
def test_done_of_total_is_shown_and_then_gone(terminal, in_bytes, numbers):
    with bar("Reading [/tmp]", 3000, in_bytes=in_bytes) as advance:
        advance(500)
        advance(1500)
    shown = terminal.readouterr().err
    assert "Reading [/tmp]" in shown
    assert numbers in shown
    after = shown[shown.rindex(numbers) :]
    assert ERASE_LINE in after
    assert SHOW_CURSOR in after


def test_without_a_total_only_time_passes(terminal):
    with bar("Writing") as advance:
        advance(1)
    shown = terminal.readouterr().err
    assert "Writing" in shown
    assert "0:00:00" in shown
    assert "?" not in shown.replace(SHOW_CURSOR, "").replace(HIDE_CURSOR, "")


def test_stdout_is_left_alone(terminal):
    with bar("Reading", 3):
        print("text")
    printed = terminal.readouterr()
    assert printed.out == "text\n"
    assert "text" not in printed.err


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_errors_pass_and_leave_the_terminal_clean(terminal, error):
    with pytest.raises(error), bar("Reading", 3):
        raise error
    assert SHOW_CURSOR in terminal.readouterr().err.rpartition("Reading")[2]
