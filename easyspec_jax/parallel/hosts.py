"""Several processes, usually on several hosts, that run one command as one program.

rendezvous.py brings them together. From then on a Watch in each of them notices when another dies,
because JAX's collectives would wait for a dead process for ever.
"""

import atexit
import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.parallel.rendezvous import LONGEST_LINE, START, Peer, gather, report

BEAT = 5.0
"""Seconds between two signs of life."""

SILENCE = 60.0
"""Seconds without a sign of life after which a process counts as dead."""


class Watch:
    """Watches the connections to other processes, and ends this process when one of them fails.

    Process 0 is connected to all others, and they only to it. When one falls silent, leaves or says
    that it stops, this process prints one line on stderr and exits with 2.
    """

    def __init__(self, program: str, own: int, links: Mapping[int, socket.socket]) -> None:
        self._program = program
        self._own = own
        self._links = links
        self._stderr = os.dup(2)  # fd 2 itself is muted in all processes but the first
        self._ending = threading.Lock()
        self._arrival = threading.Condition()
        self._arrived = set[int]()
        self._said = deque[str]()
        for number, link in links.items():
            link.settimeout(SILENCE)
            threading.Thread(target=self._listen, args=(number, link), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def meet(self, word: str = "here") -> None:
        """Wait until all processes call this. After the word "done", connections may close."""
        if self._own:
            self._send(word)
        with self._arrival:
            self._arrival.wait_for(lambda: self._arrived == self._links.keys())
            self._arrived.clear()
        if not self._own:
            self._send(word)

    def from_first(self, value: Any) -> Any:
        """Return what process 0 gives, in all processes; it does not wait for the others.

        Args:
            value: Something that JSON can hold, and that comes back equal.
        """
        if not self._own:
            self._send(f"says {json.dumps(value, separators=(',', ':'))}")
            return value
        with self._arrival:
            self._arrival.wait_for(lambda: self._said)
            return json.loads(self._said.popleft())

    def stop(self, reason: str, code: int) -> None:
        """Tell the others why this process stops. It then exits with a code of its own."""
        self._ending.acquire()  # never released: nothing the others say may end it any more
        self._send(f"stopped process {self._own} has stopped: {reason}")
        atexit.register(_leave, code)  # runs before JAX's handler, which waits for the others

    def _listen(self, number: int, link: socket.socket) -> None:
        reason = f"process {number} has died or cannot be reached any more"
        with suppress(OSError), link.makefile("r", encoding="utf-8", errors="replace") as lines:
            while line := lines.readline(LONGEST_LINE):
                what, _, rest = line.strip().partition(" ")
                if what in ("here", "done"):
                    with self._arrival:
                        self._arrived.add(number)
                        self._arrival.notify()
                if what == "says":
                    with self._arrival:
                        self._said.append(rest)
                        self._arrival.notify()
                if what == "done":
                    return
                if what == "stopped":
                    reason = rest
                    break
        self._end(reason)

    def _end(self, reason: str) -> None:
        self._ending.acquire()  # never released: the first reason is the one to print
        self._send(f"stopped {reason}")
        message = f"{self._program}: error: {reason}; this process stops too\n"
        with suppress(OSError):
            os.write(self._stderr, message.encode())
        # The main thread may wait in a collective for ever, so no exception would get through.
        os._exit(2)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            self._send("alive")

    def _send(self, line: str) -> None:
        data = " ".join(line.split()).encode(errors="replace")[: LONGEST_LINE - 1] + b"\n"
        for link in self._links.values():
            with suppress(OSError):  # the thread that reads this link notices
                link.sendall(data)


_joined: tuple[Peer, Watch] | None = None


def count() -> int:
    """Return how many processes run this program together."""
    return 1 if _joined is None else _joined[0].num_processes


def calls_wait(platform: str) -> bool:
    """Return whether a call waits until the devices have run it: with several processes of CPUs.

    Args:
        platform: As JAX names that of the devices.
    """
    return platform == "cpu" and count() > 1


def meet() -> None:
    """Wait until all processes call this, however long that takes."""
    if _joined is not None:
        _joined[1].meet()


def from_first(value: Any) -> Any:
    """Return process 0's value in all processes, which all call this in the same order.

    Args:
        value: Something that JSON can hold, such as a list of numbers.
    """
    return value if _joined is None else _joined[1].from_first(value)


@contextmanager
def joined(
    program: str, peer: Peer, command: Any, wording: Callable[[str], str] = str
) -> Iterator[None]:
    """Make this process one of several while the block runs.

    Must be entered before JAX looks for devices. All processes but the first print nothing, so that
    only their errors show. If the block fails, this process exits with 2, after Ctrl-C with 130,
    and with 0 if the reader of its output has closed it.

    Args:
        program: Begins the line of an error.
        peer: Which process this is.
        command: What all processes must agree on, as JSON can hold it.
        wording: Rewords an error for the other processes' terminals.

    Raises:
        EasySpecError: The others do not come in time, or run another command.
    """
    import jax

    global _joined
    digest = hashlib.sha256(json.dumps(command, sort_keys=True, default=str).encode()).hexdigest()
    links, address = (gather if peer.process_id == 0 else report)(peer, digest)
    watch = Watch(program, peer.process_id, links)
    _joined = peer, watch
    with ExitStack() as muted:
        try:
            # Gloo matches collectives by arrival: two programs in flight would mix theirs up.
            jax.config.update("jax_cpu_enable_async_dispatch", False)
            # This service would ignore SIGTERM.
            jax.config.update("jax_enable_preemption_service", False)
            jax.distributed.initialize(
                address,
                peer.num_processes,
                peer.process_id,
                local_device_ids=peer.local_device_ids,
                cluster_detection_method="deactivate",
                initialization_timeout=int(START),
                shutdown_timeout_seconds=int(START),
                coordinator_bind_address=address,
            )
            muted.enter_context(_spoken_for(peer.process_id == 0))
            yield
        except BaseException as error:
            if _may_be_a_peers_fault(error):
                # The watch is about to name the process and end this one. Until then stay muted:
                # JAX complains meanwhile.
                time.sleep(SILENCE + BEAT)
            reason = first_line(error) if isinstance(error, Exception) else "it was interrupted"
            watch.stop(wording(reason), _exit_code(error))
            raise
        watch.meet("done")
        jax.distributed.shutdown()
    _joined = None


def _may_be_a_peers_fault(error: BaseException) -> bool:
    """Whether a collective may have failed; JAX raises one of these types then."""
    import jax

    if isinstance(error, EasySpecError):  # a ValueError, but never JAX's
        return False
    failed = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return failed and "RESOURCE_EXHAUSTED" not in str(error)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 0 if isinstance(error, BrokenPipeError) else 2


@contextmanager
def _spoken_for(first: bool) -> Iterator[None]:
    """Show the output of the first process only, and Gloo's chatter of none."""
    sys.stdout.flush()
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        # Gloo prints from C++ to fd 1, so muting sys.stdout would not be enough.
        stdout = _muted(1, nowhere.fileno(), stack)
        if first:
            kept = stack.enter_context(open(stdout, "w", errors="backslashreplace", closefd=False))
            stack.enter_context(redirect_stdout(kept))
        else:
            _muted(2, nowhere.fileno(), stack)
            _slow_to_abort(stack)
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def _muted(number: int, nowhere: int, stack: ExitStack) -> int:
    """Point a file descriptor elsewhere until the stack unwinds; return a copy of the original."""
    kept = os.dup(number)
    stack.callback(os.close, kept)
    stack.callback(os.dup2, kept, number)
    os.dup2(nowhere, number)
    return kept


def _slow_to_abort(stack: ExitStack) -> None:
    """Delay JAX's abort when process 0 dies, so that the watch can say why first.

    JAX's coordination service calls abort() from a C++ thread as soon as it loses process 0, before
    our watch has read that the connection is gone. A Python handler would never run, because the
    main thread is inside a collective. So the handler is a C function that takes one int and
    returns: libc's sleep. It is called with the signal's number, SIGABRT = 6, and sleeps for six
    seconds, in which the watch prints its line and exits.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    stack.callback(libc.signal, signal.SIGABRT, before)


def _leave(code: int) -> None:
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
