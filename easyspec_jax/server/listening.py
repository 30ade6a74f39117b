"""The HTTP server: uvicorn with signals that let texts finish."""

import asyncio
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from easyspec_jax.engine.serving import Scheduler
from easyspec_jax.server.connections import Connection


class Server(uvicorn.Server):
    """Uvicorn's server of one application in one process.

    SIGTERM and Ctrl-C stop it: it accepts no more connections, texts that were asked for go on for
    the grace, and those still running end where they are. A second signal ends it at once.
    """

    def __init__(
        self, application: ASGIApp, scheduler: Scheduler, grace: float, slack: float
    ) -> None:
        """Configure the server; run() starts it.

        Args:
            application: What answers.
            scheduler: Told when the server stops.
            grace: Seconds that texts may go on after the first signal.
            slack: Further seconds for sending what is left.
        """
        self._scheduler, self._grace = scheduler, grace
        config = uvicorn.Config(
            application,
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace + slack),
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after a signal; uvicorn would raise it again once the server has ended."""
        self.force_exit = self.should_exit
        self.stop()

    def stop(self) -> None:
        """Stop as after a signal; from any thread."""
        self._scheduler.close(self._grace)
        self.should_exit = True

    def run(self, listener: socket.socket) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Serve at a bound socket until it is stopped.

        Args:
            listener: The socket.
        """
        runner = asyncio.Runner()
        try:
            runner.run(self.serve(sockets=[listener]))
        finally:
            if not self.force_exit:
                runner.close()  # waits for threads that still encode prompts or try grammars
