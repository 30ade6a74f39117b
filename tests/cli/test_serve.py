"""What `easyspec serve` refuses before it opens anything."""

import json
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from easyspec_jax.cli.serve import _check_memory, main
from easyspec_jax.engine.engine import Engine
from easyspec_jax.engine.serving import KINDS, OPTIONS
from tests.support.models import save_model

pytest.importorskip("starlette", reason="the extra `serve` is not installed")


@pytest.fixture
def refused(monkeypatch, capsys):
    """Return what the command says on stderr; no weight may be read."""
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("weights were read"))

    def run(*flags: str) -> str:
        assert main(["--platform", "cpu", "--port", "0", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("easyspec_jax.serve: error: ")
        assert error.count("\n") == 1
        return error

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "2"], "--workers 2: one process owns the devices"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--queue", "-1"], "--queue -1 must be at least 0"),
        (["--max-body", "5"], "--max-body 5 must be at least 1024"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--port", "70000"], "--port 70000 must be from 0 to 65535"),
        (["--grace", "nan"], "--grace nan must be a time in seconds above 0"),
        (["--max-seconds", "-1"], "--max-seconds -1.0 must be a time"),
        (["--api-key", ""], "--api-key '' is empty; leave it out to serve without a key"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 0 cannot be bound"),
        (["--host", "ü" * 70], "--port 0 cannot be bound"),
        (["--chat-template", "/nowhere"], "--chat-template /nowhere cannot be read"),
        (["--lp-strategy", "auto", "--lp-size", "2"], "--lp-strategy auto chooses --lp-size"),
        (["--max-length", "1"], "--max-length 1 must be from 2"),
        (["--batch-size", "100000000"], "memory"),
    ],
)
def test_bad_flags_are_one_line(refused, flags, message):
    assert message in refused(*flags)


def test_a_port_that_is_taken_is_one_line(refused):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert "cannot be bound: Address already in use" in refused("--port", port)


def test_without_its_packages_it_says_what_to_install(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    # As if this process had never imported it.
    monkeypatch.delitem(sys.modules, "easyspec_jax.server.listening", raising=False)
    monkeypatch.delattr("easyspec_jax.server.listening", raising=False)
    assert "uvicorn is missing: pip install 'easyspec_jax[serve]'" in refused()


def test_a_target_that_does_not_fit_is_refused(refused, tmp_path):
    save_model(tmp_path, "llama3", vocab_size=260)
    flags = ["--target", str(tmp_path), "--method", "vanilla", "--batch-size", "100000000"]
    assert "memory" in refused(*flags)


def test_memory_is_checked_for_requests_with_any_option():
    checked = []
    engine: Any = SimpleNamespace(
        max_length=64, check_memory=lambda *of, kinds: checked.append((of, kinds))
    )
    _check_memory(engine, 4)
    assert checked == [((64, 63, 4, sampling), OPTIONS) for sampling in KINDS]


def test_an_open_server_without_a_key_is_warned_of(monkeypatch, capsys):
    from easyspec_jax.server import listening

    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr("easyspec_jax.engine.serving.Scheduler.start", lambda *_: None)
    monkeypatch.setattr(listening.Server, "run", lambda *_: None)
    monkeypatch.delenv("EASYSPEC_API_KEY", raising=False)
    assert main(["--platform", "cpu", "--port", "0", "--host", "0.0.0.0"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [record["event"] for record in records] == ["loading", "warning", "stopped"]
    assert "set EASYSPEC_API_KEY" in records[1]["message"]
