"""Several processes, usually on several hosts, that run one command as one program.

Process 0 listens at the coordinator's address. Everybody tells it who they are and what they were asked to do, and
hears where JAX's own coordinator is. The connections stay, to notice a process that dies: JAX's collectives would wait
for it.
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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from easyspec_jax.errors import EasySpecError, first_line

START = 60.0
"""Seconds that everybody has to come to the coordinator."""

BEAT, SILENCE = 5.0, 60.0
"""Seconds between two signs of life, and without one until a process counts as dead."""

_LONGEST_LINE = 4096


@dataclass(frozen=True)
class Peer:
    """One process among all: the coordinator's HOST:PORT, how many processes there are, which one this is.

    local_device_ids: the accelerators that are its own, by default all that it finds. Raises EasySpecError for an
    address or a number that cannot be.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None

    def __post_init__(self) -> None:
        _, _, port = self.coordinator.rpartition(":")
        if not (self.host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise EasySpecError(f"--coordinator {self.coordinator[:80]!r} is no HOST:PORT")
        if self.num_processes < 1:
            raise EasySpecError(f"--num-processes {self.num_processes} must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise EasySpecError(
                f"--process-id {self.process_id} must be from 0 to {self.num_processes - 1}"
            )

    @property
    def host(self) -> str:
        """The coordinator's, without the brackets of an IPv6 address."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def find_peer(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Peer:
    """This process's place: as given, or as the cluster (Slurm, Open MPI, Cloud TPU, Kubernetes) says.

    Raises EasySpecError where neither does.
    """
    if coordinator is not None and num_processes is not None and process_id is not None:
        return Peer(coordinator, num_processes, process_id)
    from jax._src.clusters import ClusterEnv  # JAX offers detection only together with initialising

    advice = "give --coordinator HOST:PORT, --num-processes N and --process-id I"
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, None, int(START)
        )
    except Exception as error:  # whatever a cluster's environment lacks
        raise EasySpecError(
            f"--distributed: the cluster cannot be told ({first_line(error)}); {advice}"
        ) from None
    address, processes, own, devices = found
    if address is None or processes is None or own is None:
        raise EasySpecError(f"--distributed: no cluster that JAX knows is found here; {advice}")
    return Peer(address, processes, own, None if devices is None else list(devices))


class Watch:
    """Connections to the others (process 0: to all; everybody else: to process 0), read by threads.

    Whoever falls silent, leaves, or says that it stops, ends this process with one line on stderr and exit code 2.
    """

    def __init__(self, program: str, own: int, links: Mapping[int, socket.socket]) -> None:
        self._program, self._own, self._links, self._stderr = program, own, links, os.dup(2)
        self._ending, self._arrival, self._arrived = (
            threading.Lock(),
            threading.Condition(),
            set[int](),
        )
        for number, link in links.items():
            link.settimeout(SILENCE)
            threading.Thread(target=self._listen, args=(number, link), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def meet(self, word: str = "here") -> None:
        """Waits until everybody is here; connections that close after the word "done" mean no harm."""
        if self._own:
            self._send(word)
        with self._arrival:
            self._arrival.wait_for(lambda: self._arrived == self._links.keys())
            self._arrived.clear()
        if not self._own:
            self._send(word)

    def stop(self, reason: str, code: int) -> None:
        """Tells the others that this process stops, and why; what they then say ends it no more."""
        self._ending.acquire()  # for good
        self._send(f"stopped process {self._own} has stopped: {reason}")
        atexit.register(_leave, code)  # before JAX's own, which waits for the others

    def _listen(self, number: int, link: socket.socket) -> None:
        reason = f"process {number} has died or cannot be reached any more"
        with suppress(OSError), link.makefile("r", encoding="utf-8", errors="replace") as lines:
            while line := lines.readline(_LONGEST_LINE):
                what, _, rest = line.strip().partition(" ")
                if what in ("here", "done"):
                    with self._arrival:
                        self._arrived.add(number)
                        self._arrival.notify()
                if what == "done":
                    return
                if what == "stopped":
                    reason = rest
                    break
        self._end(reason)

    def _end(self, reason: str) -> None:
        self._ending.acquire()  # for good: one line is enough
        self._send(f"stopped {reason}")
        with suppress(OSError):
            os.write(
                self._stderr, f"{self._program}: error: {reason}; this process stops too\n".encode()
            )
        os._exit(2)  # the other threads may wait in collectives for ever

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            self._send("alive")

    def _send(self, line: str) -> None:
        data = " ".join(line.split()).encode(errors="replace")[: _LONGEST_LINE - 1] + b"\n"
        for link in self._links.values():
            with suppress(OSError):  # its reader notices
                link.sendall(data)


_joined: tuple[Peer, Watch] | None = None


def count() -> int:
    """How many processes run this program together."""
    return 1 if _joined is None else _joined[0].num_processes


def meet() -> None:
    """Waits until all processes are here, however long that takes."""
    if _joined is not None:
        _joined[1].meet()


@contextmanager
def joined(program: str, place: Peer, command: Any) -> Iterator[None]:
    """Makes this process one of several while the block runs; to be entered before JAX has looked for devices.

    All but process 0 print nothing, so that only errors of theirs are seen. If the block fails, the exit code is 2,
    130 for Ctrl-C, or 0 if nobody reads the output any more. command: what everybody has to agree on, as JSON has it.
    Raises EasySpecError if the others do not come in time or run another command.
    """
    import jax

    global _joined
    digest = hashlib.sha256(json.dumps(command, sort_keys=True, default=str).encode()).hexdigest()
    links, address = _gather(place, digest) if place.process_id == 0 else _report(place, digest)
    watch = Watch(program, place.process_id, links)
    _joined = place, watch
    with ExitStack() as muted:
        try:
            # Gloo answers to whoever calls first: two programs in flight would meet each other's collectives.
            jax.config.update("jax_cpu_enable_async_dispatch", False)
            jax.config.update("jax_enable_preemption_service", False)  # it ignores SIGTERM
            jax.distributed.initialize(
                address,
                place.num_processes,
                place.process_id,
                local_device_ids=place.local_device_ids,
                cluster_detection_method="deactivate",
                initialization_timeout=int(START),
                shutdown_timeout_seconds=int(START),
                coordinator_bind_address=address,
            )
            muted.enter_context(_spoken_for(place.process_id == 0))
            yield
        except BaseException as error:
            # A collective that failed is one or the other; the watch is about to say whose fault it is.
            if isinstance(
                error, jax.errors.JaxRuntimeError | ValueError
            ) and "RESOURCE_EXHAUSTED" not in str(error):
                time.sleep(SILENCE + BEAT)  # muted still: JAX complains meanwhile
            code = (
                130
                if isinstance(error, KeyboardInterrupt)
                else 0
                if isinstance(error, BrokenPipeError)
                else 2
            )
            watch.stop(
                first_line(error) if isinstance(error, Exception) else "it was interrupted", code
            )
            raise
        watch.meet("done")
        jax.distributed.shutdown()
    _joined = None


@contextmanager
def _spoken_for(first: bool) -> Iterator[None]:
    """Show the output of the first process only, and Gloo's chatter of none."""
    sys.stdout.flush()
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
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
    """Turns a file descriptor elsewhere until the stack unwinds; what it was is the one returned."""
    kept = os.dup(number)
    stack.callback(os.close, kept)
    stack.callback(os.dup2, kept, number)
    os.dup2(nowhere, number)
    return kept


def _slow_to_abort(stack: ExitStack) -> None:
    """Delay JAX's abort when process 0 dies, so that the watch can say why first."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    # A handler is given the signal's number: six seconds.
    before = libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    stack.callback(libc.signal, signal.SIGABRT, before)


def _leave(code: int) -> None:
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _gather(place: Peer, digest: str) -> tuple[dict[int, socket.socket], str]:
    """Connections to all others, by number, and where JAX's coordinator is to be."""
    deadline, links = time.monotonic() + START, dict[int, socket.socket]()
    try:
        family, _, _, _, own = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[
            0
        ]
        server = socket.create_server((own[0], place.port), family=family)
    except OSError as error:
        raise EasySpecError(
            f"--coordinator {place.coordinator} cannot be opened here: {first_line(error)}"
        ) from None
    with server:
        while len(links) < place.num_processes - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link, _ = server.accept()
                link.settimeout(BEAT)
                hello = json.loads(_line(link))
                number = hello["process"]
                complaint = _complaint(hello, place, digest, links)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # somebody who said nothing
                missing = sorted(set(range(1, place.num_processes)) - links.keys())
                _refuse(
                    links,
                    f"process {missing[0]} did not come to {place.coordinator} within {START:.0f} s",
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue  # none of ours
            links[number if complaint is None else -1] = link
            if complaint is not None:
                _refuse(links, complaint)
    with socket.create_server((own[0], 0), family=family) as free:
        port = free.getsockname()[1]
    address = f"{place.coordinator.rpartition(':')[0]}:{port}"
    for link in links.values():
        with suppress(OSError):  # the watch notices
            link.sendall(json.dumps({"address": address}).encode() + b"\n")
    return links, address


def _complaint(
    hello: Mapping[str, Any], place: Peer, digest: str, links: Mapping[int, socket.socket]
) -> str | None:
    number, processes = hello["process"], hello["processes"]
    if processes != place.num_processes:
        return f"process {number} was given --num-processes {processes}, and process 0 {place.num_processes}"
    if number == 0 or number in links:
        return f"two processes were given --process-id {number}"
    if hello["command"] != digest:
        return (
            f"process {number} was given other flags or prompts than process 0; all need the same"
        )
    return None


def _refuse(links: Mapping[int, socket.socket], complaint: str) -> NoReturn:
    for link in links.values():
        with suppress(OSError):
            link.sendall(json.dumps({"refused": complaint}).encode() + b"\n")
        link.close()
    raise EasySpecError(f"--distributed: {complaint}")


def _report(place: Peer, digest: str) -> tuple[dict[int, socket.socket], str]:
    """The connection to process 0, and where JAX's coordinator is."""
    deadline = time.monotonic() + START
    while True:
        try:
            link = socket.create_connection(
                (place.host, place.port), timeout=max(0.01, deadline - time.monotonic())
            )
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise EasySpecError(
                    f"--coordinator {place.coordinator} cannot be reached within {START:.0f} s "
                    f"({first_line(error)}); start process 0 there"
                ) from None
            time.sleep(0.2)
    hello = {"process": place.process_id, "processes": place.num_processes, "command": digest}
    link.settimeout(START + BEAT)
    try:
        link.sendall(json.dumps(hello).encode() + b"\n")
        answer = json.loads(_line(link))
        if "refused" not in answer:
            return {0: link}, answer["address"]
    except (OSError, ValueError, KeyError, TypeError):
        link.close()
        raise EasySpecError(
            f"--coordinator {place.coordinator} gives no answer that process 0 would give"
        ) from None
    link.close()
    raise EasySpecError(f"--distributed: {answer['refused']}")


def _line(link: socket.socket) -> bytes:
    """One line, read byte by byte: what follows it belongs to whoever reads next. Raises ValueError without one."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = link.recv(1)
        if not byte or len(line) > _LONGEST_LINE:
            raise ValueError("no line")
        line += byte
    return bytes(line)
