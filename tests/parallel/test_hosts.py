"""Several processes are one program: the same tokens, one voice, and one end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from easyspec_jax.checkpoint import directory
from easyspec_jax.errors import EasySpecError
from easyspec_jax.generate import main
from easyspec_jax.parallel import hosts, rendezvous
from easyspec_jax.parallel.mesh import MeshShape, spread
from easyspec_jax.parallel.rendezvous import Peer, find_peer
from tests.conftest import CACHE
from tests.support.models import add_refit, save_model
from tests.support.worker import PROMPT, CountingSource, decode

ROOT = Path(__file__).parents[2]
VERIFIERS = ["rejection", "coupled"]
WAYS = [
    {
        "method": method,
        "verifier": verifier,
        "num_speculative_tokens": 2,
        "tree_width": width,
        "lp_size": 2,
    }
    | {"refit": "auto" if verifier == "coupled" else "none"}
    for method, width, verifiers in (
        ("vanilla", 1, [None]),
        ("tree", 2, VERIFIERS),
        ("easyspec", 2, VERIFIERS),
    )
    for verifier in verifiers
] + [{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1}]
"""Groups without a refit by rejection, with one coupled."""


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def start(command: list[str], **options) -> subprocess.Popen[str]:
    fast = "--xla_backend_optimization_level=0"  # to compile
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment, **pipes, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3", vocab_size=260, eos_token_id=3, num_hidden_layers=3)
    add_refit(directory, 2, noise=0.1)
    return str(directory)


@pytest.fixture(scope="module")
def alone(model):
    """What one process decodes, and how many bytes it reads for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "SafetensorsSource", CountingSource)
        return [decode(model, way) for way in WAYS], sum(CountingSource.sizes)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_processes_give_the_tokens_of_one_and_read_their_shards_only(model, alone, count, tmp_path):
    flags = [model, json.dumps(WAYS), str(CACHE / "xla"), str(tmp_path), free_address(), str(count)]
    all_ = [start(["-m", "tests.support.worker", *flags, str(number)]) for number in range(count)]
    (first, *others) = [process.communicate(timeout=500) for process in all_]
    assert [process.returncode for process in all_] == [0] * count, first[1]
    assert others == [("", "")] * (count - 1)
    tokens, bytes_ = alone
    assert all(way[-1] == len(PROMPT) for way in tokens)  # bytes, each of them cached
    assert [json.loads(line) for line in first[0].splitlines()] == tokens
    read = [int((tmp_path / str(number)).read_text()) for number in range(count)]
    assert sum(read) >= bytes_ and max(read) < bytes_ * (1 / count + 0.1)  # norms are everybody's


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_one_line(model, victim):
    flags = [
        "-m",
        "easyspec_jax.generate",
        "--target",
        model,
        "--method",
        "vanilla",
        "--mesh",
        "2",
        "--max-new-tokens",
    ]
    flags += ["900", *["--prompt", "Hello"] * 30]  # whoever kills may come late
    flags += ["--distributed", "--coordinator", free_address(), "--num-processes", "2"]
    both = [start([*flags, "--process-id", str(number)]) for number in range(2)]
    assert both[0].stdout is not None and both[0].stdout.read(1)  # it is decoding
    both[victim].send_signal(signal.SIGKILL)
    _, complaint = both[1 - victim].communicate(timeout=60)
    both[victim].communicate()
    assert both[1 - victim].returncode == 2
    assert complaint == (
        f"easyspec_jax.generate: error: process {victim} has died or cannot be reached any more; "
        "this process stops too\n"
    )


@pytest.mark.parametrize(
    ("error", "waits"),
    [(ValueError("Gloo: connection closed by peer"), True), (EasySpecError("no such file"), False)],
)
def test_what_jax_says_while_the_watch_is_waited_for_is_not_heard(monkeypatch, capfd, error, waits):
    # A collective can fail before the watch sees that a process has died. JAX complains meanwhile.
    # A user's mistake is not such a failure.
    waited, stopped = [], []
    monkeypatch.setattr(hosts, "_joined", None)
    monkeypatch.setattr(hosts, "report", lambda peer, digest: ({}, "localhost:1"))
    monkeypatch.setattr(
        hosts, "Watch", lambda *_: SimpleNamespace(stop=lambda *words: stopped.append(words))
    )
    complain = SimpleNamespace(
        sleep=lambda seconds: waited.append(os.write(2, b"Terminating process"))
    )
    monkeypatch.setattr(hosts, "time", complain)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    with (
        pytest.raises(type(error), match=str(error)),
        hosts.joined("program", Peer("localhost:1", 2, 1), None),
    ):
        raise error
    os.write(2, b"afterwards")
    assert bool(waited) == waits and stopped == [(str(error), 2)]
    assert capfd.readouterr().err == "afterwards"


def test_the_layer_axis_stays_inside_a_process_as_far_as_it_fits():
    devices = [SimpleNamespace(process_index=number // 4, id=number) for number in range(8)]

    def hosts(shape):
        grid = spread(devices, shape, 2)
        assert sorted(device.id for device in grid.flat) == list(range(8))
        return [[device.process_index for device in row] for row in grid]

    assert hosts(MeshShape(4, 2)) == [[0, 1]] * 4
    assert hosts(MeshShape(2, 4)) == [[0, 0, 1, 1]] * 2
    assert hosts(MeshShape(8, 1)) == [[0]] * 4 + [[1]] * 4
    with pytest.raises(EasySpecError, match="asks for 4 devices a process, and process 1 has 3"):
        spread(devices[:-1], MeshShape(4, 2), 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--process-id", "0"], "--process-id needs --distributed"),
        (["--distributed", "--chat"], "--distributed holds no conversation"),
        (["--distributed", "--lp-strategy", "auto"], "--lp-strategy auto measures"),
        (
            ["--distributed", "--mesh", "3", "1.2.3.4:1", "2", "0"],
            "--mesh asks for 3 devices, which 2 processes",
        ),
        (["--distributed", "localhost:1", "2", "2"], "--process-id 2 must be from 0 to 1"),
        (["--distributed", "localhost:1", "0", "0"], "--num-processes 0 must be at least 1"),
        (["--distributed", "localhost", "2", "0"], "--coordinator 'localhost' is not HOST:PORT"),
        (["--distributed", "x" * 70 + ":9", "2", "0"], "is not HOST:PORT"),
    ],
)
def test_bad_flags_are_one_line(flags, words, capsys):
    if flags[-1].isdigit() and flags[-2].isdigit():
        address, count, number = flags[-3:]
        flags = [
            *flags[:-3],
            "--coordinator",
            address,
            "--num-processes",
            count,
            "--process-id",
            number,
        ]
    assert main(flags) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


def test_without_a_cluster_the_flags_are_asked_for():
    with pytest.raises(EasySpecError, match="give `coordinator` HOST:PORT"):
        find_peer(None, None, None)


def test_nobody_waits_for_ever(monkeypatch):
    monkeypatch.setattr(rendezvous, "START", 0.5)
    address = free_address()
    with pytest.raises(EasySpecError, match=r"process 1 did not come to 127\.0\.0\.1:\d+ within"):
        rendezvous.gather(Peer(address, 2, 0), "")
    with pytest.raises(EasySpecError, match="cannot be reached within"):
        rendezvous.report(Peer(address, 2, 1), "")


@pytest.mark.parametrize("says", ["[" * 4000 + "\n", "{"], ids=["nested", "slow"])
def test_strangers_are_ignored(monkeypatch, says):
    """They send JSON that is nested too deeply, or one letter at a time."""
    monkeypatch.setattr(rendezvous, "START", 1.5)
    monkeypatch.setattr(rendezvous, "HELLO", 0.5)
    address, told = free_address(), threading.Event()
    host, _, port = address.rpartition(":")

    def stranger() -> None:
        time.sleep(0.3)  # until the port is open
        with socket.create_connection((host, int(port))) as link, suppress(OSError):
            while not told.wait(0.1):
                link.sendall(says.encode())

    thread = threading.Thread(target=stranger)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(EasySpecError, match="process 1 did not come"):
        rendezvous.gather(Peer(address, 2, 0), "")
    told.set()
    thread.join()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("place", "digest", "complaint"),
    [((3, 1), "same", "given `num_processes` 3"), ((2, 1), "other", "other flags or prompts")],
)
def test_processes_that_disagree_are_refused_on_both_sides(place, digest, complaint):
    address, told = free_address(), []

    def report() -> None:
        with pytest.raises(EasySpecError) as refusal:
            rendezvous.report(Peer(address, *place), digest)
        told.append(str(refusal.value))

    thread = threading.Thread(target=report)
    thread.start()
    with pytest.raises(EasySpecError, match=complaint):
        rendezvous.gather(Peer(address, 2, 0), "same")
    thread.join()
    assert complaint in told[0]


def test_a_cluster_that_says_too_little_is_named(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "of no such form")
    with pytest.raises(
        EasySpecError, match=r"the cluster cannot be detected \(.*\); give `coordinator` HOST:PORT"
    ):
        find_peer(None, None, None)


def test_an_address_of_another_host_is_not_opened():
    with pytest.raises(EasySpecError, match=r"`coordinator` 192\.0\.2\.1:9 cannot be opened here"):
        rendezvous.gather(Peer("192.0.2.1:9", 2, 0), "")


def test_somebody_elses_server_is_no_coordinator():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            link, _ = server.accept()
            with link:
                link.recv(1)
                link.sendall(b"220 welcome\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(EasySpecError, match="did not answer like process 0"):
            rendezvous.report(Peer(address, 2, 1), "")
        thread.join()


def test_all_processes_hear_what_the_first_says():
    """In the order in which it was said, however late they ask."""
    ends = socket.socketpair()
    first, other = (hosts.Watch("test", own, {1 - own: end}) for own, end in enumerate(ends))
    said = [[0.1, None], [], [1e-9, 2.5]]
    assert [first.from_first(value) for value in said] == said
    assert [other.from_first(["its own"]) for _ in said] == said
    leaving = threading.Thread(target=other.meet, args=("done",))
    leaving.start()
    first.meet("done")
    leaving.join()


@pytest.mark.parametrize(
    "processes, platform, waits", [(1, "cpu", False), (2, "cpu", True), (2, "gpu", False)]
)
def test_only_calls_of_several_processes_on_cpus_wait(monkeypatch, processes, platform, waits):
    monkeypatch.setattr(hosts, "count", lambda: processes)
    assert hosts.calls_wait(platform) == waits
