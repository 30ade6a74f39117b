"""`python -m easyspec_jax.generate`: text from a target model, sped up by a draft on a device mesh."""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from easyspec_jax import demo
from easyspec_jax.command import Parser, cache_compilations, flags_in, read_prompts
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import (
    DraftTensorParallelSize,
    DType,
    Method,
    Platform,
    SamplingParams,
    SpeculativeConfig,
    Verifier,
)

if TYPE_CHECKING:  # importing JAX takes a second, which --help and a mistyped flag need not wait for
    from easyspec_jax.engine import Completion, Engine
    from easyspec_jax.progress import Bar

PROGRAM = "easyspec_jax.generate"

AUTO = "auto"
TUNED = ("--method", "--num-speculative-tokens", "--tree-width", "--tree-nodes", "--lp-size", "--mlp-lp-size",
         "--refit", "--no-refit", "--no-calibration", "--draft-tensor-parallel-size")  # fmt: skip
"""What --lp-strategy auto chooses, and nobody else then may."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # text goes through any terminal's encoding
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused as a prompt, in one line
    try:
        args = _parser().parse_args(argv)
        _check_auto(args, flags_in(argv))
        return _run(args)
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
    models.add_argument("--target", metavar="DIR", help="converted or Hugging Face checkpoint of the model to speak "
                        "(default: a small bundled pair that completes Python)")  # fmt: skip
    models.add_argument("--draft", metavar="DIR", help="a smaller model of the same family")
    models.add_argument("--mesh", default="1", help='devices: "8", or "layer=4,tensor=2" (default: %(default)s)')
    models.add_argument("--platform", choices=get_args(Platform), help="default: the fastest one present")
    models.add_argument("--dtype", default="auto", choices=get_args(DType),
                        help="default: float32 on a CPU, else the checkpoint's")  # fmt: skip
    models.add_argument("--max-length", type=int, metavar="L", help="prompt and generated tokens together")

    prompts = parser.add_argument_group("prompts")
    source = prompts.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT",
                        help="may be repeated (default: an example, for the bundled pair)")  # fmt: skip
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt a line")
    prompts.add_argument("--batch-size", type=int, default=1, metavar="B",
                         help="prompts decoded together (default: %(default)s)")  # fmt: skip
    prompts.add_argument("--chat", action="store_true",
                         help="wrap each prompt in the checkpoint's chat template; "
                         "without a prompt, hold a conversation")  # fmt: skip

    default = SpeculativeConfig()
    drafting = parser.add_argument_group("speculation")
    drafting.add_argument("--method", default=default.method, choices=get_args(Method),
                          help="default: %(default)s")  # fmt: skip
    drafting.add_argument("--num-speculative-tokens", type=int, default=default.num_speculative_tokens, metavar="N",
                          help="depth of the draft of a round (default: %(default)s)")  # fmt: skip
    drafting.add_argument("--tree-width", type=int, metavar="W",
                          help="tokens drafted at each depth (default: 1, a chain; 4 for --method tree)")  # fmt: skip
    drafting.add_argument("--tree-nodes", type=int, metavar="M",
                          help="how many of them, the best, the target verifies (default: all)")  # fmt: skip
    drafting.add_argument("--lp-size", type=int, default=default.lp_size, metavar="N",
                          help="layers that run at once (default: %(default)s)")  # fmt: skip
    drafting.add_argument("--lp-strategy", metavar="S",
                          help='explicit groups, such as "0,1-3,4-7,8"; or "auto": how to speculate at all, as '
                          "easyspec_jax.tune chose it, which is run first if need be")  # fmt: skip
    drafting.add_argument("--mlp-lp-size", type=int, default=default.mlp_lp_size, metavar="M",
                          help="MLPs of a group that run at once (default: %(default)s)")  # fmt: skip
    refit = drafting.add_mutually_exclusive_group()
    refit.add_argument("--refit", default=default.refit, metavar="DIR",
                       help="projections fitted to these groups (default: the draft directory's, if any)")  # fmt: skip
    refit.add_argument("--no-refit", dest="refit", action="store_const", const="none", help="use none")
    drafting.add_argument("--no-calibration", action="store_true", help="keep the fuzzy KV of accepted tokens")
    drafting.add_argument("--draft-tensor-parallel-size", default=default.draft_tensor_parallel_size,
                          choices=get_args(DraftTensorParallelSize),
                          help="what of the draft is not layer-parallel is replicated or split over all devices "
                          "(default: %(default)s)")  # fmt: skip
    drafting.add_argument("--verifier", choices=get_args(Verifier),
                          help="default: rejection for chains, coupled for trees")  # fmt: skip

    sampling = parser.add_argument_group("sampling")
    chosen = SamplingParams()
    sampling.add_argument("--temperature", type=float, default=chosen.temperature, metavar="T",
                          help="0 is greedy (default: %(default)s)")  # fmt: skip
    sampling.add_argument("--top-k", type=int, default=chosen.top_k, metavar="K")
    sampling.add_argument("--top-p", type=float, default=chosen.top_p, metavar="P")
    sampling.add_argument("--seed", type=int, default=chosen.seed, help="prompt i uses seed + i")
    sampling.add_argument("--max-new-tokens", type=int, default=chosen.max_new_tokens, metavar="M",
                          help="default: %(default)s")  # fmt: skip
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT",
                          help="ends the text before it; may be repeated")  # fmt: skip

    output = parser.add_argument_group("output")
    output.add_argument("--no-stream", action="store_true", help="print each text when it is complete")
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt, and no text")
    output.add_argument(
        "--compare", action="store_true", help="decode each prompt plainly too, and show what was gained"
    )
    output.add_argument("--verbose", action="store_true", help="show the mesh, the groups and each device's memory")
    return parser


def _check_auto(args: argparse.Namespace, given: set[str]) -> None:
    """Raises EasySpecError for flags that contradict --lp-strategy auto."""
    contrary = [flag for flag in TUNED if flag in given]
    if args.lp_strategy == AUTO and contrary:
        raise EasySpecError(f"--lp-strategy auto chooses {contrary[0]} itself: leave out one of the two")


def _run(args: argparse.Namespace) -> int:
    sampling = SamplingParams(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens,
                              tuple(args.stop))  # fmt: skip
    speculative = SpeculativeConfig(
        method=args.method,
        num_speculative_tokens=args.num_speculative_tokens,
        tree_width=args.tree_width,
        tree_nodes=args.tree_nodes,
        lp_size=args.lp_size,
        lp_strategy=args.lp_strategy,
        mlp_lp_size=args.mlp_lp_size,
        refit=args.refit,
        calibration=not args.no_calibration,
        draft_tensor_parallel_size=args.draft_tensor_parallel_size,
        verifier=args.verifier,
    )
    prompts = _prompts(args)

    from easyspec_jax.progress import bar, no_bar

    cache_compilations()
    bars = no_bar if args.json else bar
    engine = _open(args, speculative, bars)
    _note_missing_accelerators(args, engine)
    if prompts:
        _complete(args, engine, prompts, sampling, bars)
    else:
        _converse(args, engine, sampling, bars)
    return 0


def _open(args: argparse.Namespace, speculative: SpeculativeConfig, bar: "Bar") -> "Engine":
    """The pair as the flags want it, or as it was tuned."""
    if args.lp_strategy != AUTO:
        from easyspec_jax.engine import open_model

        return open_model(
            args.target,
            args.draft,
            mesh=args.mesh,
            platform=args.platform,
            speculative=speculative,
            max_length=args.max_length,
            dtype=args.dtype,
        )
    from easyspec_jax.mesh import parse_mesh
    from easyspec_jax.terminal import print_note
    from easyspec_jax.tune.tuning import auto, open_pair

    pair = open_pair(args.target, args.draft, args.mesh, args.platform, args.max_length, args.dtype)
    choice = auto(pair, args.mesh, args.target is None, bar, print_note)
    return pair.variant(replace(choice.speculative, verifier=args.verifier), parse_mesh(choice.mesh), bar)


def _complete(
    args: argparse.Namespace, engine: "Engine", prompts: list[str], sampling: SamplingParams, bar: "Bar"
) -> None:
    """Completes every prompt, and with --compare once more by plain decoding."""
    from easyspec_jax import terminal
    from easyspec_jax.progress import no_bar

    together = {"chat": args.chat, "batch_size": args.batch_size}
    prepared = engine.compile(prompts, sampling, **together, bar=bar)
    baseline = engine.baseline() if args.compare else None
    if baseline is not None:
        baseline.compile(prompts, sampling, **together, bar=bar)
    if args.verbose:
        terminal.print_devices(engine, sampling, prepared)
    stream = None if args.json or args.no_stream or args.batch_size > 1 else _show
    if stream and prompts == [demo.PROMPT]:
        terminal.print_example(demo.PROMPT)
    texts = engine.generate(prompts, sampling, **together, on_text=stream)
    plain_texts = baseline.generate(prompts, sampling, **together) if baseline is not None else None
    completions, plain = [], []
    for number in range(len(prompts)):
        # A bar beside streaming text would garble both.
        with (no_bar if stream else bar)("Generating", len(prompts)) as advance:
            advance(number)
            completions.append(next(texts))
        if not args.json:
            print("" if stream else completions[-1].text, flush=True)
        if plain_texts is not None:
            with bar("Decoding plainly", len(prompts)) as advance:
                advance(number)
                plain.append(next(plain_texts))
        if args.json:
            print(json.dumps(_as_dict(completions[-1], plain[-1] if plain else None)), flush=True)
    if args.json:
        return
    if baseline is not None:
        terminal.print_comparison(completions, plain, engine, args.batch_size)
    else:
        terminal.print_summary(completions, engine, args.batch_size)


def _converse(args: argparse.Namespace, engine: "Engine", sampling: SamplingParams, bar: "Bar") -> None:
    """Whoever has typed a question should not wait for the weights: they are loaded before."""
    from easyspec_jax.chat import GREETING, converse
    from easyspec_jax.terminal import print_devices

    prepared = engine.compile([GREETING], sampling, bar=bar)
    if args.verbose:
        print_devices(engine, sampling, prepared)
    converse(engine, sampling, bar)


def _as_dict(completion: "Completion", plain: "Completion | None") -> dict[str, Any]:
    """A completion as `--json` prints it, beside its plain counterpart if there is one."""
    from easyspec_jax.terminal import speedup

    printed = completion.as_dict()
    if plain is not None:
        printed["plain"] = {
            "stats": plain.stats.as_dict(),
            "same_tokens": plain.token_ids == completion.token_ids,
            "speedup": speedup(completion.stats, plain.stats),
        }
    return printed


def _prompts(args: argparse.Namespace) -> list[str]:
    """What is to be completed; nothing if a conversation is wanted instead."""
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is None:
        if args.chat and not (args.json or args.compare or args.no_stream):
            return []
        if args.target is None:
            return [demo.PROMPT]
        raise EasySpecError("no prompt; give --prompt TEXT or --prompt-file FILE, or only --chat for a conversation")
    return read_prompts(args.prompt_file)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _note_missing_accelerators(args: argparse.Namespace, engine: "Engine") -> None:
    import jax

    from easyspec_jax.terminal import print_note

    used, best = engine.mesh.devices.flat[0].platform, jax.default_backend()
    if args.platform is None and used != best:
        count = jax.device_count()
        print_note(
            f"{engine.mesh.size} devices were asked for and there are {count} of platform {best}: "
            f"the bundled pair runs on virtual CPU devices; --mesh {count} uses the {best}"
        )


if __name__ == "__main__":
    sys.exit(main())
