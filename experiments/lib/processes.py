"""An experiment in several processes with a core each, which talk through Gloo as hosts would.

The command starts itself again, once for each process, with hidden flags that say which one it is.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from easyspec_jax import EasySpecError
from easyspec_jax.cli.command import Parser
from easyspec_jax.parallel.hosts import joined
from easyspec_jax.parallel.mesh import parse_mesh
from easyspec_jax.parallel.rendezvous import Peer

OWN_FLAGS = ("words", "coordinator", "num_processes", "process_id", "core")
"""Fields of add_process_flags(), which say nothing about what was measured."""


def add_process_flags(parser: Parser, argv: Sequence[str] | None) -> None:
    """Add the hidden flags of one process, and remember the command's own words.

    Args:
        parser: The command's parser.
        argv: The words it will parse; None stands for the command line.
    """
    kinds = {"--coordinator": str, "--num-processes": int, "--process-id": int, "--core": int}
    for flag, kind in kinds.items():
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    parser.set_defaults(words=sys.argv[1:] if argv is None else list(argv))


def check_processes(args: argparse.Namespace) -> None:
    """Check that --processes goes with --mesh.

    Raises:
        EasySpecError: It does not.
    """
    if args.processes > 1 and args.processes != parse_mesh(args.mesh).size:
        raise EasySpecError(
            f"--processes {args.processes} needs --mesh {args.processes}: one device a process"
        )


def in_processes(program: str, words: Sequence[str], count: int) -> Any:
    """Run a command in processes with a core each, and return what the first one measured.

    Args:
        program: Name of the command's module.
        words: Its command line, without the flags of one process.
        count: Number of processes. A single one still gets a core of its own.

    Raises:
        EasySpecError: A process fails, or there are too few cores.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise EasySpecError(f"{count} processes need {count} cores, and there is {len(cores)}")
    shared = ["--coordinator", address, "--num-processes", str(count)]
    command = [sys.executable, "-m", program, *words, *shared]
    started = [
        subprocess.Popen(
            [*command, "--process-id", str(number), "--core", str(cores[number])],
            stdout=subprocess.PIPE,
        )
        for number in range(count)
    ]
    found = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise EasySpecError("a process has failed, and said why")
    return json.loads(found[0])


def be_one_process(
    program: str, args: argparse.Namespace, measure: Callable[[argparse.Namespace], Any]
) -> None:
    """Measure on a core of this process's own; process 0 prints what it measured as JSON.

    Args:
        program: Begins the line of an error.
        args: The command's flags, with those of this process.
        measure: Takes the flags; every process calls it.
    """
    os.sched_setaffinity(0, {args.core})  # before XLA counts the cores
    if args.num_processes == 1:
        print(json.dumps(measure(args)))
        return
    own = ("process_id", "core", "command", "words")
    command = {name: value for name, value in vars(args).items() if name not in own}
    with joined(program, Peer(args.coordinator, args.num_processes, args.process_id), command):
        print(json.dumps(measure(args)))
