"""A connection ends if its request does not come, and never while an answer is on its way."""

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("uvicorn")

import uvicorn
from uvicorn.server import ServerState

from easyspec_jax.server import connections as module
from easyspec_jax.server.connections import Connection

HEAD = b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 6\r\n\r\n"
LONG = 60.0
"""More seconds than a test takes."""


class Application:
    """Answers with the body, a while after it has come; notes clients that leave before that."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.has_left = seconds, asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.has_left.set()
                return
            body, more = body + message["body"], message["more_body"]
        await asyncio.sleep(self.seconds)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def connected(application: Application):
    """Connect to a server; yields the client's two ends and the server's state."""
    config = uvicorn.Config(
        application, http=Connection, ws="none", lifespan="off", log_config=None
    )
    config.load()
    state, loop = ServerState(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        yield reader, writer, state
        writer.close()


async def only(state: ServerState) -> Connection:
    """Return a server's one connection."""
    while not state.connections:
        await asyncio.sleep(0.001)
    (connection,) = state.connections
    assert isinstance(connection, Connection)
    return connection


@pytest.mark.parametrize("sent", [b"", HEAD[:20], HEAD, HEAD + b"abc"])
def test_a_client_that_falls_silent_is_left(sent, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)

    async def run() -> None:
        application = Application()
        async with connected(application) as (reader, writer, _):
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), LONG) == b""
            if sent.startswith(HEAD):
                await asyncio.wait_for(application.has_left.wait(), LONG)

    asyncio.run(run())


def test_an_answer_may_take_longer(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)

    async def run() -> None:
        async with connected(Application(seconds=0.5)) as (reader, writer, _):
            writer.write(HEAD + b"abcdef")
            assert (await asyncio.wait_for(reader.read(), LONG)).endswith(b"abcdef")

    asyncio.run(run())


def test_each_piece_of_a_request_renews_the_time():
    async def run() -> None:
        async with connected(Application()) as (reader, writer, state):
            connection = await only(state)
            for piece in (HEAD[:9], HEAD[9:], b"abc", b"def"):
                before = connection._deadline
                writer.write(piece)
                while connection._deadline is before:
                    await asyncio.sleep(0.001)
                assert before is not None and before.cancelled()
            assert (await asyncio.wait_for(reader.readuntil(b"abcdef"), LONG)).startswith(b"HTTP")

    asyncio.run(run())


def test_a_server_that_does_not_read_on_gives_the_client_time(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)

    async def run() -> None:
        async with connected(Application()) as (reader, _, state):
            connection = await only(state)
            connection.flow.pause_reading()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(), 0.5)
            connection.flow.resume_reading()
            assert await asyncio.wait_for(reader.read(), LONG) == b""

    asyncio.run(run())
