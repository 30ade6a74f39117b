"""`python -m easyspec_jax.generate`: text from a target model, sped up by a draft on a device mesh."""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from easyspec_jax.command import Parser
from easyspec_jax.config import (
    DraftTensorParallelSize,
    DType,
    Method,
    Platform,
    SamplingParams,
    SpeculativeConfig,
    Verifier,
)
from easyspec_jax.errors import EasySpecError

if TYPE_CHECKING:  # importing JAX takes a second, which --help and a mistyped flag need not wait for
    from easyspec_jax.engine import Completion, Engine

PROGRAM = "easyspec_jax.generate"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # text goes through any terminal's encoding
    try:
        return _run(_parser().parse_args(argv))
    except EasySpecError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has had enough
        _abandon_stdout()
        return 0
    except OSError as error:
        _abandon_stdout()
        print(f"{PROGRAM}: error: {str(error)[:200]}", file=sys.stderr)
        return 2
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = "use more devices, a smaller --dtype, or lower --max-new-tokens"
        print(f"{PROGRAM}: error: the devices' memory does not suffice; {advice}", file=sys.stderr)
        return 2


def _abandon_stdout() -> None:
    """Keeps the interpreter from flushing what nobody can take."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    models = parser.add_argument_group("models and devices")
    models.add_argument("--target", metavar="DIR", help="converted or Hugging Face checkpoint of the model to speak")
    models.add_argument("--draft", metavar="DIR", help="a smaller model of the same family")
    models.add_argument("--mesh", default="1", help='devices: "8", or "layer=4,tensor=2" (default: %(default)s)')
    models.add_argument("--platform", choices=get_args(Platform), help="default: the fastest one present")
    models.add_argument("--dtype", default="auto", choices=get_args(DType),
                        help="default: float32 on a CPU, else the checkpoint's")  # fmt: skip
    models.add_argument("--max-length", type=int, metavar="L", help="prompt and generated tokens together")

    prompts = parser.add_argument_group("prompts")
    source = prompts.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt a line")
    prompts.add_argument("--chat", action="store_true", help="wrap each prompt in the checkpoint's chat template")

    default = SpeculativeConfig()
    drafting = parser.add_argument_group("speculation")
    drafting.add_argument("--method", default=default.method, choices=get_args(Method),
                          help="default: %(default)s")  # fmt: skip
    drafting.add_argument("--num-speculative-tokens", type=int, default=default.num_speculative_tokens, metavar="N",
                          help="tokens drafted per round (default: %(default)s)")  # fmt: skip
    drafting.add_argument("--tree-width", type=int, default=1, metavar="W", help="nodes a level (1: a chain)")
    drafting.add_argument("--lp-size", type=int, default=default.lp_size, metavar="N",
                          help="layers that run at once (default: %(default)s)")  # fmt: skip
    drafting.add_argument("--lp-strategy", metavar="S", help='explicit groups, such as "0,1-3,4-7,8"')
    drafting.add_argument("--no-calibration", action="store_true", help="keep the fuzzy KV of accepted tokens")
    drafting.add_argument("--draft-tensor-parallel-size", default=default.draft_tensor_parallel_size,
                          choices=get_args(DraftTensorParallelSize),
                          help="what of the draft is not layer-parallel is replicated or split over all devices "
                          "(default: %(default)s)")  # fmt: skip
    drafting.add_argument("--verifier", default=default.verifier, choices=get_args(Verifier),
                          help="default: %(default)s")  # fmt: skip

    sampling = parser.add_argument_group("sampling")
    chosen = SamplingParams()
    sampling.add_argument("--temperature", type=float, default=chosen.temperature, metavar="T",
                          help="0 is greedy (default: %(default)s)")  # fmt: skip
    sampling.add_argument("--top-k", type=int, default=chosen.top_k, metavar="K")
    sampling.add_argument("--top-p", type=float, default=chosen.top_p, metavar="P")
    sampling.add_argument("--seed", type=int, default=chosen.seed, help="prompt i uses seed + i")
    sampling.add_argument("--max-new-tokens", type=int, default=chosen.max_new_tokens, metavar="M",
                          help="default: %(default)s")  # fmt: skip

    output = parser.add_argument_group("output")
    output.add_argument("--no-stream", action="store_true", help="print each text when it is complete")
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt and nothing else")
    return parser


def _run(args: argparse.Namespace) -> int:
    sampling = SamplingParams(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    speculative = SpeculativeConfig(
        method=args.method,
        num_speculative_tokens=args.num_speculative_tokens,
        lp_size=args.lp_size,
        lp_strategy=args.lp_strategy,
        calibration=not args.no_calibration,
        draft_tensor_parallel_size=args.draft_tensor_parallel_size,
        verifier=args.verifier,
    )
    if args.tree_width != 1:
        raise EasySpecError("--tree-width: token trees are not available yet; leave it out")
    if args.target is None:
        raise EasySpecError("--target DIR is needed; there is no bundled model yet")
    prompts = _prompts(args)

    from easyspec_jax.engine import open_model

    _cache_compilations()
    engine = open_model(
        args.target,
        args.draft,
        mesh=args.mesh,
        platform=args.platform,
        speculative=speculative,
        max_length=args.max_length,
        dtype=args.dtype,
    )
    with _status("loading and compiling"):
        engine.compile(prompts, sampling, args.chat)
    completions = []
    stream = None if args.json or args.no_stream else _show
    for completion in engine.generate(prompts, sampling, chat=args.chat, on_text=stream):
        whole = json.dumps(completion.as_dict()) if args.json else completion.text
        print("" if stream else whole, flush=True)
        completions.append(completion)
    if not args.json:
        _print_summary(completions, engine)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is None:
        raise EasySpecError("no prompt; give --prompt TEXT or --prompt-file FILE")
    try:
        lines = Path(args.prompt_file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EasySpecError(f"--prompt-file {args.prompt_file} cannot be read: {error}") from None
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise EasySpecError(f"--prompt-file {args.prompt_file} holds no prompt")
    return prompts


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _print_summary(completions: list["Completion"], engine: "Engine") -> None:
    """One line on stderr, so that stdout stays the text."""
    from rich.console import Console

    stats = sum((completion.stats for completion in completions[1:]), completions[0].stats)
    mesh = ",".join(f"{axis}={size}" for axis, size in engine.mesh.shape.items())
    fields = [
        f"{sum(len(completion.token_ids) for completion in completions)} tokens",
        f"[bold green]{stats.tokens_per_second:.1f} tokens/s[/]",
    ]
    if stats.drafted:
        fields += [
            f"[bold]{stats.mean_acceptance_length:.2f}[/] tokens a round",
            f"acceptance rate {stats.acceptance_rate:.2f}",
        ]
    fields += [f"prefill {stats.prefill_seconds:.2f} s", f"{engine.speculative.method} on {mesh}"]
    Console(stderr=True, highlight=False, soft_wrap=True).print("[dim]—[/] " + " · ".join(fields))


def _status(what: str):
    """A spinner on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)


def _cache_compilations() -> None:
    """A second run of the same models and mesh starts at once, unless JAX is told of another cache."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "easyspec_jax" / "xla"
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    sys.exit(main())
