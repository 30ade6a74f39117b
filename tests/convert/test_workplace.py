"""An output appears whole or not at all, has one writer, and survives interruptions."""

import os

import pytest

from convert import workplace as module
from convert.workplace import workplace
from easyspec_jax.errors import EasySpecError


def test_the_name_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "new"
    with workplace(out, "task") as place:
        (place.directory / "file").touch()
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["new"]
    assert [path.name for path in out.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [EasySpecError, MemoryError, SystemExit])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), workplace(tmp_path / "new", "task"):
        raise error
    assert not list(tmp_path.iterdir())


def interrupted(out, task, *records):
    with pytest.raises(KeyboardInterrupt), workplace(out, task) as place:
        (place.directory / "file").touch()
        for record in records:
            place.record(*record)
        raise KeyboardInterrupt


def test_what_is_recorded_is_known_to_the_next_run(tmp_path):
    interrupted(tmp_path / "new", "task", ("a", 0, 17), ("b", 8, 2**32 - 1))
    with (tmp_path / ".new.partial" / "journal").open("a") as journal:
        journal.write('["c", 0, ')  # killed while it wrote
    with workplace(tmp_path / "new", "task") as place:
        assert place.done == {("a", 0): 17, ("b", 8): 2**32 - 1}
        assert (place.directory / "file").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_what_is_written_survives_an_interrupted_flush(tmp_path, monkeypatch):
    def interrupt(directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "flush", interrupt)
        with pytest.raises(KeyboardInterrupt), workplace(tmp_path / "new", "task") as place:
            place.record("a", 0, 17)
    with workplace(tmp_path / "new", "task") as place:
        assert place.done == {("a", 0): 17}


def test_another_task_starts_anew(tmp_path):
    interrupted(tmp_path / "new", "task", ("a", 0, 17))
    with workplace(tmp_path / "new", "another") as place:
        assert place.done == {}
        assert [path.name for path in place.directory.iterdir()] == ["journal"]


@pytest.mark.parametrize("journal", [b"", b"\xff\xfe", None])
def test_a_directory_without_a_usable_journal_starts_anew(tmp_path, journal):
    partial = tmp_path / ".new.partial"
    (partial / "deep").mkdir(parents=True)
    if journal is not None:
        (partial / "journal").write_bytes(journal)
    with workplace(tmp_path / "new", "task") as place:
        assert place.done == {}
    assert not list((tmp_path / "new").iterdir())


def test_one_process_at_a_time(tmp_path):
    with workplace(tmp_path / "new", "task") as place:
        with pytest.raises(
            EasySpecError, match=r"another conversion is writing .*new; wait for it"
        ):
            workplace(tmp_path / "new", "task").__enter__()
        (place.directory / "file").touch()  # it is untouched
    with pytest.raises(EasySpecError, match="already exists"):
        workplace(tmp_path / "new", "task").__enter__()


def test_whoever_waited_for_the_lock_sees_what_the_other_finished(tmp_path, monkeypatch):
    """If the directory is renamed just before it is locked, the lock is on the finished output."""
    from convert import workplace as module

    def renamed_first(handle, operation):
        if not (tmp_path / "new").exists():
            (tmp_path / ".new.partial").rename(tmp_path / "new")
        flock(handle, operation)

    flock = module.fcntl.flock
    monkeypatch.setattr(module.fcntl, "flock", renamed_first)
    with pytest.raises(EasySpecError, match="already exists"):
        workplace(tmp_path / "new", "task").__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_exists_is_kept(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for taken in (tmp_path, tmp_path / "file", tmp_path / "dangling"):
        with pytest.raises(EasySpecError, match="already exists"), workplace(taken, "task"):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir(mode=0o555)
    places = [tmp_path / "file" / "new", *([tmp_path / "closed" / "new"] if os.geteuid() else [])]
    for out in [*places, type(tmp_path)("/proc/new")]:
        with pytest.raises(EasySpecError, match="cannot be written"), workplace(out, "task"):
            pass
