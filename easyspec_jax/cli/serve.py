"""`easyspec serve`: a pair behind OpenAI's protocol, with a chat page at /."""

import argparse
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from easyspec_jax import demo
from easyspec_jax.cli.command import Parser, flags_in, run_command
from easyspec_jax.cli.generate import open_engine
from easyspec_jax.cli.generate_flags import CONVERSATION_PREFIXES, add_models
from easyspec_jax.cli.speculation_flags import add_speculation, check_tuned, speculative_of
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import check_whole

# Importing JAX takes a second, which --help and a mistyped flag need not wait for.
if TYPE_CHECKING:
    from easyspec_jax.engine.engine import Engine
    from easyspec_jax.engine.serving import Scheduler
    from easyspec_jax.server.app import Settings

PROGRAM = "easyspec_jax.serve"

LONGEST = 4096
"""Default of --max-length where the models could do more: caches are made for it at once."""

API_KEY = "EASYSPEC_API_KEY"
"""Environment variable that --api-key overrides; a flag shows in lists of processes."""

_SLACK = 5  # seconds after --grace in which answers that were cut short may still be sent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command until a signal ends it, and return its exit code."""
    parser = serve_parser()
    return run_command(PROGRAM, parser, lambda args: _run(args, flags_in(argv)), argv)


def serve_parser() -> Parser:
    """Return a parser of all flags."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    add_models(parser)
    add_speculation(parser)
    _add_server(parser)
    _add_limits(parser)
    return parser


def _add_server(parser: Parser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    server.add_argument(
        "--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)"
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that requests must carry (default: ${API_KEY}, or none)",
    )
    server.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="name in requests and answers (default: that of the target's directory)",
    )
    server.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template to render conversations with (default: the checkpoint's)",
    )
    server.add_argument(
        "--compare",
        action="store_true",
        help="serve plain decoding too, so that the page can measure what was gained",
    )
    server.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that texts may go on after SIGTERM (default: %(default)s)",
    )
    server.add_argument("--workers", type=int, default=1, help="1; see --batch-size instead")


def _add_limits(parser: Parser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--batch-size",
        type=int,
        default=4,
        metavar="B",
        help="texts decoded together (default: %(default)s)",
    )
    limits.add_argument(
        "--queue",
        type=int,
        default=64,
        metavar="Q",
        help="texts that may wait; further requests get status 429 (default: %(default)s)",
    )
    limits.add_argument(
        "--max-tokens", type=int, metavar="M", help="tokens of an answer (default: --max-length)"
    )
    limits.add_argument(
        "--max-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="time of an answer, which then ends where it is (default: %(default)s)",
    )
    limits.add_argument(
        "--max-body",
        type=int,
        default=1 << 20,
        metavar="BYTES",
        help="size of a request (default: %(default)s)",
    )


def _run(args: argparse.Namespace, given: set[str]) -> int:
    _check(args, given)
    try:
        from easyspec_jax.server import app, listening
    except ImportError as error:
        raise EasySpecError(f"{error.name} is missing: pip install 'easyspec_jax[serve]'") from None
    from easyspec_jax.engine.serving import Scheduler
    from easyspec_jax.progress import bar

    # Everything that can be wrong is found before a weight is read.
    with _bound(args.host, args.port) as listener:
        engine = _prepared(args, open_engine(args, speculative_of(args), bar))
        settings = _settings(args, engine)
        scheduler = Scheduler(
            engine,
            rows=args.batch_size,
            depth=args.queue,
            seconds=args.max_seconds,
            compare=args.compare,
        )
        application = app.build(scheduler, settings)
        server = listening.Server(application, scheduler, args.grace, _SLACK)
        listener.listen()  # before the address is announced, so that clients can connect
        _announce(args, listener, settings)
        begun = time.perf_counter()

        def changed() -> None:
            if scheduler.state == "ready":
                app.log_line(_ready(scheduler, time.perf_counter() - begun))
            else:
                server.stop()

        scheduler.start(bar, changed)
        server.run(listener)
    return _ended(scheduler, at_once=server.force_exit)


def _check(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse values that make no server. Raises EasySpecError."""
    check_tuned(args, given)
    if args.workers != 1:
        raise EasySpecError(
            f"--workers {args.workers}: one process owns the devices, and another would hold the "
            "weights again; --batch-size decodes more texts at once"
        )
    check_whole("batch_size", args.batch_size, 1)
    check_whole("queue", args.queue, 0)
    check_whole("max_body", args.max_body, 1024)
    check_whole("port", args.port, 0, 65535)
    if args.max_tokens is not None:
        check_whole("max_tokens", args.max_tokens, 1)
    for name in ("grace", "max_seconds"):
        if not 0 < getattr(args, name) < float("inf"):
            raise EasySpecError(f"`{name}` {getattr(args, name)} must be a time in seconds above 0")
    if args.api_key == "":
        raise EasySpecError("--api-key '' is empty; leave it out to serve without a key")


def _bound(host: str, port: int) -> socket.socket:
    """Bind a socket. Raises EasySpecError if the address is taken or none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A server that has just ended leaves its port in a state that blocks others for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, TypeError) as error:  # the latter for a name that has no encoding
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise EasySpecError(f"--host {host} --port {port} cannot be bound: {reason}") from None
    return listener


def _prepared(args: argparse.Namespace, engine: "Engine") -> "Engine":
    """Return the engine with the chat template and the longest text that the flags say."""
    from easyspec_jax.engine.pair import with_stop_ids
    from easyspec_jax.tokenizer.conversation import end_of_turn_ids

    if args.max_length is None:
        engine.max_length = min(engine.max_length, LONGEST)
    template = demo.CHAT_TEMPLATE if args.target is None else None
    if args.chat_template is not None:
        template = _template(args.chat_template)
    if template is not None:
        engine.tokenizer.chat_template = template
        engine.target = with_stop_ids(engine.target, end_of_turn_ids(engine.tokenizer))
    by_default = args.prefix_cache is None and not args.bit_stable
    if by_default:
        engine.prefix_cache = CONVERSATION_PREFIXES
    try:
        _check_memory(engine, args.batch_size)
    except EasySpecError:
        if not by_default:
            raise
        # A default must not keep a pair from fitting.
        engine.prefix_cache = 0
        _check_memory(engine, args.batch_size)
    return engine


def _check_memory(engine: "Engine", rows: int) -> None:
    """Raise EasySpecError if texts of any kind of sampling and with any option would not fit."""
    from easyspec_jax.engine.serving import KINDS, OPTIONS

    for sampling in KINDS:
        longest = engine.max_length
        engine.check_memory(longest, longest - 1, rows, sampling, kinds=OPTIONS)


def _template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EasySpecError(f"--chat-template {path} cannot be read: {error}") from None


def _settings(args: argparse.Namespace, engine: "Engine") -> "Settings":
    from easyspec_jax.server.answering import Limits
    from easyspec_jax.server.app import Settings, is_loopback

    longest = engine.max_length if args.max_tokens is None else args.max_tokens
    directory = Path(engine.target.directory).resolve().name
    name = "easyspec-demo" if args.target is None else directory
    return Settings(
        model=args.served_model_name or name,
        limits=Limits(args.max_body, min(longest, engine.max_length)),
        api_key=args.api_key or os.environ.get(API_KEY) or None,
        local=is_loopback(args.host),
    )


def _announce(args: argparse.Namespace, listener: socket.socket, settings: "Settings") -> None:
    from easyspec_jax.server.app import log_line

    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    log_line({"event": "loading", "url": url, "model": settings.model})
    if not settings.local and settings.api_key is None:
        log_line(
            {
                "event": "warning",
                "message": f"anyone who reaches {url} may use it; set {API_KEY}",
            }
        )


def _ready(scheduler: "Scheduler", seconds: float) -> dict[str, str | float]:
    """Return the log's record of a server that is ready, some seconds after its address was."""
    return {
        "event": "ready",
        "seconds": round(seconds, 1),
        "loading_seconds": round(scheduler.loading_seconds, 1),
        "compiling_seconds": round(scheduler.compiling_seconds, 1),
    }


def _ended(scheduler: "Scheduler", at_once: bool) -> int:
    """Wait for the engine's thread, and raise what ended it, if anything did.

    Args:
        scheduler: The scheduler.
        at_once: End the process even if threads are still at work.
    """
    from easyspec_jax.server.app import log_line

    scheduler.close(0)
    ended = scheduler.join(0 if at_once else _SLACK)
    log_line({"event": "stopped"})
    if scheduler.failure is not None and not at_once:
        raise scheduler.failure
    if at_once or not ended:
        # A thread may be at work that cannot be interrupted, and the interpreter would wait for it.
        os._exit(0)
    return 0
