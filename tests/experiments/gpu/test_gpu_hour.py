"""Steps run in order, each costs only itself, and a second run goes on where the first ended."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from experiments.gpu import gpu_hour, headlines, timed_process
from experiments.gpu.gpu_hour import main
from experiments.gpu.steps import Step
from experiments.registry import HOME

WRITE = "import sys, json; json.dump({'value': int(sys.argv[2])}, open(sys.argv[1], 'w'))"


def step(name, code, *words, minutes=1.0, out="{out}", **fields):
    """Make a step of a module that is written into the directory of the test."""
    command = " ".join([code, *([out] if out else []), *words])
    headline = fields.pop("headline", lambda measured: {"value": measured["value"]})
    return Step(name, f"about {name}", minutes, command, command, headline, **fields)


@pytest.fixture
def hour(tmp_path, monkeypatch):
    """Return a function that runs given steps and returns the exit code and the summary."""
    modules = {
        "fake_write": WRITE,
        "fake_print": "print('{\"value\": 5}')",
        "fake_fail": "import sys; print('some\\nreason', file=sys.stderr); sys.exit(3)",
        "fake_partial": WRITE + "\nimport time; time.sleep(60)",
        "fake_sleep": "import subprocess, sys, time, os\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1] + '.pid', 'w').write(str(child.pid)); time.sleep(60)",
        "fake_environment": "import sys, os, json\n"
        "kind = os.environ['FAKE_DEVICE']\n"
        "json.dump({'machine': {'platform': kind.split()[0], 'device_kind': kind},"
        " 'device_memory_bytes': 80 * 2**30}, open(sys.argv[1], 'w'))",
    }
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_DEVICE", "gpu H100")
    out = tmp_path / "out"

    def run(steps, *flags):
        monkeypatch.setattr(gpu_hour, "STEPS", tuple(steps))
        monkeypatch.setattr(
            gpu_hour, "named", lambda names: [own for own in steps if own.name in names]
        )
        code = main(["--out", str(out), *flags])
        path = out / "summary.json"
        return code, json.loads(path.read_text())["steps"] if path.exists() else None

    return run


def test_a_step_that_fails_costs_only_itself(hour, tmp_path, capsys):
    steps = [
        step("first", "fake_write", "1"),
        step("broken", "fake_fail"),
        step("last", "fake_print", out=""),
    ]
    code, records = hour(steps)
    assert code == 1
    assert [own["state"] for own in records.values()] == ["done", "failed", "done"]
    assert records["first"]["figures"] == {"value": 1}
    assert records["broken"]["note"] == "exit code 3: reason"
    # A step without a place for its file prints its results.
    assert json.loads((tmp_path / "out" / "last.json").read_text()) == {"value": 5}
    assert (tmp_path / "out" / "broken.log").read_text() == "some\nreason\n"
    printed = capsys.readouterr().out
    assert "value 5" in printed
    assert "broken: failed after 0 s (exit code 3: reason)" in printed


def test_a_second_run_goes_on_and_tries_faults_last(hour, capsys):
    steps = [step("broken", "fake_fail"), step("done", "fake_write", "1")]
    assert hour(steps)[0] == 1
    capsys.readouterr()
    code, records = hour([*steps, step("new", "fake_write", "2")])
    assert code == 1
    lines = [
        line for line in capsys.readouterr().out.splitlines() if ": " in line and "│" not in line
    ]
    assert [line.partition(":")[0] for line in lines] == ["done", "new", "new", "broken", "broken"]
    assert lines[0] == "done: done already"
    # Another command is another step.
    code, records = hour([step("done", "fake_write", "3")])
    assert code == 0
    assert records["done"]["figures"] == {"value": 3}


def test_a_step_over_its_time_is_ended_with_all_its_processes(hour, tmp_path, monkeypatch):
    monkeypatch.setattr(timed_process, "GRACE", 1.0)
    steps = [
        step("slow", "fake_sleep", minutes=0.05),
        step("partial", "fake_partial", "4", minutes=0.05),
        step("after", "fake_write", "1"),
    ]
    code, records = hour(steps)
    assert code == 1
    assert [own["state"] for own in records.values()] == ["over time", "over time", "done"]
    # What a step has saved counts.
    assert records["partial"]["figures"] == {"value": 4}
    child = int((tmp_path / "out" / "slow.json.pid").read_text())
    assert not running(child)


def running(process):
    """Tell whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_that_cannot_run_is_no_fault(hour):
    steps = [
        step("environment", "fake_environment", headline=lambda measured: {}),
        step("large", "fake_write", "1", memory=100),
        step("fits", "fake_write", "1", memory=70),
        step("absent", "fake_write", "1", modules=("json", "experiments.gpu.no_such_module")),
        step("long", "fake_write", "1", minutes=60),
    ]
    code, records = hour(steps, "--minutes", "20")
    assert code == 0
    states = ["done", "device too small", "done", "not available", "no time left"]
    assert [own["state"] for own in records.values()] == states
    assert records["large"]["note"] == "needs 100 GiB, and the device has 80"
    assert records["absent"]["note"] == "experiments.gpu.no_such_module is missing"


def test_results_of_two_devices_are_not_mixed(hour, monkeypatch, capsys):
    steps = [
        step("environment", "fake_environment", headline=lambda measured: {}),
        step("next", "fake_write", "1"),
    ]
    assert hour(steps)[0] == 0
    monkeypatch.setenv("FAKE_DEVICE", "gpu H200")
    assert hour(steps)[0] == 2
    assert "has results of gpu H100, and this is gpu H200" in capsys.readouterr().err


def test_a_machine_without_a_gpu_rehearses_only(hour, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_DEVICE", "cpu")
    steps = [
        step("environment", "fake_environment", headline=lambda measured: {}),
        step("next", "fake_write", "1", memory=100),
    ]
    code, records = hour(steps)
    assert code == 2
    assert records is None
    assert "JAX finds no GPU, only cpu; use --rehearse" in capsys.readouterr().err
    code, records = hour(steps, "--rehearse")
    assert code == 0
    assert [own["state"] for own in records.values()] == ["done", "done"]


def test_steps_are_chosen(hour):
    steps = [step(name, "fake_write", "1") for name in ("one", "two", "three")]
    assert list(hour(steps, "--only", "two", "three", "--skip", "three")[1]) == ["two"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_its_step(number, tmp_path):
    (tmp_path / "fake_wait.py").write_text(
        "import os, sys, time\nopen(sys.argv[1] + '.pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    # A shell's background job ignores Ctrl-C, and so would what it starts.
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from experiments.gpu import gpu_hour\n"
        "from experiments.gpu.steps import Step\n"
        "one = Step('one', '', 1, 'fake_wait {out}', '', lambda measured: {})\n"
        "gpu_hour.STEPS, gpu_hour.named = (one,), lambda names: [one]\n"
        f"raise SystemExit(gpu_hour.main(['--out', {str(tmp_path / 'out')!r}]))"
    )
    paths = os.pathsep.join([str(HOME.parent), str(tmp_path)])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path
    )
    written = tmp_path / "out" / "one.json.pid"
    while not (written.exists() and written.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    # Python drops what a signal raises within a destructor, as a user's second Ctrl-C would show.
    while process.poll() is None:
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    assert process.wait() == 130
    assert not running(int(written.read_text()))
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "--out DIR is needed"),
        (["--out", "here", "--minutes", "0"], "--minutes 0 must be above 0"),
        (["--out", "here", "--only", "nothing"], "--only nothing: choose from environment,"),
        (["--out", "here", "--skip", "nothing"], "--skip nothing: choose from environment,"),
    ],
)
def test_bad_arguments_are_one_line(flags, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    printed = capsys.readouterr().err
    assert complaint in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dry_compilation_takes_no_step(tmp_path, monkeypatch):
    asked = []
    fake = SimpleNamespace(dry_compile=lambda machine, out: asked.append((machine, out)) or 3)
    monkeypatch.setitem(sys.modules, "experiments.gpu.dry_compile", fake)
    assert main(["--dry-compile", "h100"]) == 3
    out = tmp_path / "out"
    assert main(["--dry-compile", "h200", "--out", str(out)]) == 3
    assert asked == [("h100", None), ("h200", out / "dry_compile_h200.json")]
    assert not list(out.iterdir())


def test_a_headline_of_an_unexpected_file_is_empty(tmp_path):
    own = step("one", "fake_write", headline=headlines.tune)
    assert gpu_hour.headline(own, tmp_path / "one.json") == {}
    (tmp_path / "one.json").write_text('{"choice": {}}')
    assert gpu_hour.headline(own, tmp_path / "one.json") == {}
