"""How the processes of one command find each other before JAX starts.

Process 0 listens at the coordinator's address. Every other process connects, says who it is and
what it was asked to do, and hears either where JAX's own coordinator is or why it was refused. The
connections stay open afterwards; see hosts.Watch.
"""

import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from easyspec_jax.errors import EasySpecError, first_line

START = 60.0
"""Seconds that all processes have to come to the coordinator."""

HELLO = 5.0
"""Seconds that a connection has to say who it is."""

LONGEST_LINE = 4096

Links = dict[int, socket.socket]
"""Connections by the number of the process at the other end."""


@dataclass(frozen=True)
class Peer:
    """One of several processes that run a command together.

    Attributes:
        coordinator: HOST:PORT at which process 0 listens.
        num_processes: How many there are.
        process_id: Which one this is, from 0.
        local_device_ids: Its accelerators; None stands for all that it finds.

    Raises:
        EasySpecError: The address or a number is impossible.

    Examples:
        >>> Peer("[::1]:8476", num_processes=2, process_id=0).host
        '::1'
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None

    def __post_init__(self) -> None:
        _, _, port = self.coordinator.rpartition(":")
        is_port = port.isascii() and port.isdigit() and 0 < int(port) < 2**16
        if not (is_port and self.host and _is_encodable(self.host)):
            raise EasySpecError(f"`coordinator` {self.coordinator[:80]!r} is not HOST:PORT")
        if self.num_processes < 1:
            raise EasySpecError(f"`num_processes` {self.num_processes} must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise EasySpecError(
                f"`process_id` {self.process_id} must be from 0 to {self.num_processes - 1}"
            )

    @property
    def host(self) -> str:
        """The coordinator's host, without the brackets of an IPv6 address."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The coordinator's port."""
        return int(self.coordinator.rpartition(":")[2])


def find_peer(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Peer:
    """Return which process this is, as given or as the cluster says.

    Slurm, Open MPI, Cloud TPU and Kubernetes are asked for what is not given.

    Raises:
        EasySpecError: Something is missing, and no cluster says it.
    """
    if coordinator is not None and num_processes is not None and process_id is not None:
        return Peer(coordinator, num_processes, process_id)
    # JAX's public API detects a cluster only while it initialises, which is too late for us: who
    # takes part must be known before JAX looks for devices.
    from jax._src.clusters import ClusterEnv

    advice = "give `coordinator` HOST:PORT, `num_processes` N and `process_id` I"
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, None, int(START)
        )
    except Exception as error:  # a cluster's environment may lack anything
        raise EasySpecError(
            f"`distributed`: the cluster cannot be detected ({first_line(error)}); {advice}"
        ) from None
    address, processes, own, devices = found
    if address is None or processes is None or own is None:
        raise EasySpecError(f"`distributed`: JAX detects no cluster here; {advice}")
    return Peer(address, processes, own, None if devices is None else list(devices))


def _is_encodable(host: str) -> bool:
    """Whether sockets can look a name up; a part of it may be too long for that."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def gather(peer: Peer, digest: str) -> tuple[Links, str]:
    """Wait as process 0 until all others have come.

    Args:
        peer: This process.
        digest: Identifies the command; all processes must have the same.

    Returns:
        The connections to the others, and the address for JAX's coordinator.

    Raises:
        EasySpecError: The address cannot be opened, a process does not come in time, or one has
            other numbers or another command.
    """
    deadline = time.monotonic() + START
    links: Links = {}
    try:
        # Resolves names and both kinds of addresses; the first result says which kind to use.
        addresses = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
        family, _, _, _, own = addresses[0]
        server = socket.create_server((own[0], peer.port), family=family)
    except OSError as error:
        raise EasySpecError(
            f"`coordinator` {peer.coordinator} cannot be opened here: {first_line(error)}"
        ) from None
    with server:
        while len(links) < peer.num_processes - 1:
            _accept(server, peer, digest, links, deadline)
    # Port 0 asks the system for a free one, which JAX's coordinator then takes.
    with socket.create_server((own[0], 0), family=family) as free:
        port = free.getsockname()[1]
    address = f"{peer.coordinator.rpartition(':')[0]}:{port}"
    for link in links.values():
        with suppress(OSError):  # the watch will notice that it is gone
            link.sendall(json.dumps({"address": address}).encode() + b"\n")
    return links, address


def _accept(server: socket.socket, peer: Peer, digest: str, links: Links, deadline: float) -> None:
    """Add the next process that comes to the links; ignore what is not one."""
    server.settimeout(max(0.01, deadline - time.monotonic()))
    link = None
    try:
        link, _ = server.accept()
        # Anyone can connect to an open port; what does not speak JSON like us is ignored below.
        hello = json.loads(_line(link, time.monotonic() + HELLO))
        number = hello["process"]
        complaint = _complaint(hello, peer, digest, links)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        if link is not None:
            link.close()
        if time.monotonic() < deadline:
            return  # not one of our processes, or it said nothing
        missing = min(set(range(1, peer.num_processes)) - links.keys())
        _refuse(
            links,
            f"process {missing} did not come to {peer.coordinator} within {START:.0f} s",
        )
    if complaint is not None:
        _refuse({**links, -1: link}, complaint)
    links[number] = link


def _complaint(hello: Mapping[str, Any], peer: Peer, digest: str, links: Links) -> str | None:
    """Say why a process cannot take part; None if it can."""
    number, processes = hello["process"], hello["processes"]
    if processes != peer.num_processes:
        return (
            f"process {number} was given `num_processes` {processes}, and process 0 "
            f"{peer.num_processes}"
        )
    if number == 0 or number in links:
        return f"two processes were given `process_id` {number}"
    if hello["command"] != digest:
        return (
            f"process {number} was given other flags or prompts than process 0; all need the same"
        )
    return None


def _refuse(links: Mapping[int, socket.socket], complaint: str) -> NoReturn:
    """Tell everyone who has come why nothing starts, and raise it here."""
    for link in links.values():
        with suppress(OSError):
            link.sendall(json.dumps({"refused": complaint}).encode() + b"\n")
        link.close()
    raise EasySpecError(f"`distributed`: {complaint}")


def report(peer: Peer, digest: str) -> tuple[Links, str]:
    """Come to process 0 as any other process; arguments and results as for gather()."""
    link = _connected(peer)
    hello = {"process": peer.process_id, "processes": peer.num_processes, "command": digest}
    link.settimeout(START + HELLO)
    try:
        link.sendall(json.dumps(hello).encode() + b"\n")
        answer = json.loads(_line(link, time.monotonic() + START + HELLO))
        if "refused" not in answer:
            return {0: link}, answer["address"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        link.close()
        raise EasySpecError(
            f"`coordinator` {peer.coordinator} did not answer like process 0; is another "
            "program using that port?"
        ) from None
    link.close()
    raise EasySpecError(f"`distributed`: {answer['refused']}")


def _connected(peer: Peer) -> socket.socket:
    """Connect to process 0, which may start later than this one."""
    deadline = time.monotonic() + START
    while True:
        try:
            timeout = max(0.01, deadline - time.monotonic())
            return socket.create_connection((peer.host, peer.port), timeout=timeout)
        except OSError as error:
            if time.monotonic() > deadline:
                raise EasySpecError(
                    f"`coordinator` {peer.coordinator} cannot be reached within {START:.0f} s "
                    f"({first_line(error)}); start process 0 there"
                ) from None
            # Refused: process 0 has not started yet.
            time.sleep(0.2)


def _line(link: socket.socket, deadline: float) -> bytes:
    """Read one line, byte by byte, because the watch reads what follows it.

    Raises:
        ValueError: The connection ends, or the line is too long.
        TimeoutError: It is not there by the deadline, by time.monotonic().
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        link.settimeout(left)
        byte = link.recv(1)
        if not byte or len(line) > LONGEST_LINE:
            raise ValueError("no line")
        line += byte
    return bytes(line)
