"""`python -m easyspec_jax.generate`: text from a target model, drafted on a device mesh."""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyspec_jax import demo
from easyspec_jax.cli.command import cache_compilations, flags_in, flags_of, run_command, with_flags
from easyspec_jax.cli.flags import pair_options_of
from easyspec_jax.cli.generate_flags import (
    CONVERSATION_PREFIXES,
    check_flags,
    generate_parser,
    prompts_of,
)
from easyspec_jax.cli.sampling_flags import sampling_of
from easyspec_jax.cli.speculation_flags import AUTO, speculative_of
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams, SpeculativeConfig, check_prefix_cache
from easyspec_jax.parallel import hosts
from easyspec_jax.parallel.rendezvous import Peer, find_peer
from easyspec_jax.tokenizer.conversation import Prompt, with_system

# Importing JAX takes a second, which --help and a mistyped flag need not wait for.
if TYPE_CHECKING:
    from easyspec_jax.engine.completion import Completion
    from easyspec_jax.engine.engine import Engine
    from easyspec_jax.progress import Bar

PROGRAM = "easyspec_jax.generate"


LATER_FLAGS = {
    "system": None,
    "weights": None,
    "draft_weights": None,
    "kv_dtype": "auto",
    "min_p": 0.0,
    "logit_bias": [],
    "min_new_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "bad_words": [],
    "json_schema": None,
    "regex": None,
    "choice": [],
    "n": 1,
    "logprobs": None,
    "prompt_logprobs": None,
    "bit_stable": False,
    "prompt_lookup": False,
    "prompt_lookup_max": SpeculativeConfig.prompt_lookup_max,
    "prompt_lookup_min": SpeculativeConfig.prompt_lookup_min,
    "prompt_lookup_corpus": None,
    "adapt": None,
    "confidence_threshold": 0.0,
}
"""Flags that a job's settings leave out at their defaults."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a job has bad lines, else as run_command."""
    # Text goes through any terminal's encoding; input that is not text is refused as a prompt.
    for stream, errors in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    parser = generate_parser(PROGRAM, str(__doc__))
    wording = partial(with_flags, flags=flags_of(parser))
    return run_command(PROGRAM, parser, lambda args: _run(args, flags_in(argv), wording), argv)


def _run(args: argparse.Namespace, given: set[str], wording: Callable[[str], str]) -> int:
    check_flags(args, given)
    sampling, speculative = sampling_of(args), speculative_of(args)
    if args.prompts is not None:
        return _run_job(args, speculative, sampling)
    prompts = prompts_of(args)
    if not prompts and sampling.n > 1:
        raise EasySpecError("a conversation has one answer a turn: leave out --n")
    if args.system is not None:
        prompts = [with_system(prompt, args.system) for prompt in prompts]
    if not args.distributed:
        return _speak(args, speculative, sampling, prompts)
    # All processes must decode the same, so they compare their flags and prompts.
    peer = _peer(args, prompts)
    # Of files the contents must be the same, wherever a host has them.
    own = ("process_id", "json_schema", "prompt_lookup_corpus")
    flags = {name: value for name, value in vars(args).items() if name not in own}
    command = [flags, prompts, sampling.json_schema, _digest(args.prompt_lookup_corpus)]
    with hosts.joined(PROGRAM, peer, command, wording):
        return _speak(args, speculative, sampling, prompts)


def _digest(path: str | None) -> str | None:
    """Return a digest of a file, or its name if it is none that can be read twice."""
    with suppress(OSError):  # open_model() says what is wrong
        if path is not None and Path(path).is_file():
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return path


def _peer(args: argparse.Namespace, prompts: Sequence[Prompt]) -> Peer:
    """Return which process this is. Raises EasySpecError for what several processes cannot do."""
    if not prompts:
        raise EasySpecError(
            "--distributed holds no conversation: give --prompt TEXT or --prompt-file FILE"
        )
    from easyspec_jax.parallel.mesh import parse_mesh

    peer = find_peer(args.coordinator, args.num_processes, args.process_id)
    size = parse_mesh(args.mesh).size
    if size % peer.num_processes:
        raise EasySpecError(
            f"--mesh asks for {size} devices, which {peer.num_processes} processes cannot share "
            "equally"
        )
    return peer


def _speak(
    args: argparse.Namespace,
    speculative: SpeculativeConfig,
    sampling: SamplingParams,
    prompts: Sequence[Prompt],
) -> int:
    from easyspec_jax.progress import bar, no_bar

    bars = no_bar if args.json else bar
    engine = open_engine(args, speculative, bars)
    if prompts:
        _complete(args, engine, prompts, sampling, bars)
    else:
        _converse(args, engine, sampling, bars)
    return 0


def _run_job(
    args: argparse.Namespace, speculative: SpeculativeConfig, sampling: SamplingParams
) -> int:
    """Do what is left of a job, and return 1 if some of its lines have errors."""
    from easyspec_jax.cli.console import print_note
    from easyspec_jax.cli.jobs import check_results, describe_job, read_job, run_job
    from easyspec_jax.progress import bar

    # A job may resume with other values of these: none changes a text in float32, and where
    # numbers round differently a text may be that of either run.
    free = {"prompts", "out", "batch_size", "verbose", "mesh", "platform", "allow_links"}
    free.add("prefix_cache")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    # Jobs begun before these flags existed lack them.
    for later, default in LATER_FLAGS.items():
        if settings[later] == default:
            del settings[later]
    if sampling.json_schema is not None:
        settings["json_schema"] = sampling.json_schema  # not its file, which may change
    job, out = read_job(args.prompts, sampling, args.system), Path(args.out)
    check_results(out, describe_job(job, settings, args.chat))
    engine = open_engine(args, speculative, bar)
    engine.check_memory(2, 1, args.batch_size, sampling)  # the least that any line needs
    engine.load(bar)
    together = {"chat": args.chat, "batch_size": args.batch_size}
    done, errors = run_job(
        engine, job, out, **together, settings=settings, bar=bar, note=print_note
    )
    print_note(f"{done} lines in {args.out}, {errors} of them errors")
    return 1 if errors else 0


def open_engine(args: argparse.Namespace, speculative: SpeculativeConfig, bar: "Bar") -> "Engine":
    """Open the pair that the flags name, as they say or as it was tuned."""
    cache_compilations()
    engine = _open_pair(args, speculative, bar)
    _note_missing_accelerators(args, engine)
    return engine


def _open_pair(args: argparse.Namespace, speculative: SpeculativeConfig, bar: "Bar") -> "Engine":
    """Open the pair as the flags say, or as it was tuned."""
    prefix_cache = args.prefix_cache or 0
    check_prefix_cache(prefix_cache, speculative)
    if args.lp_strategy != AUTO:
        from easyspec_jax.engine.pair import open_model

        return open_model(
            args.target,
            args.draft,
            speculative=speculative,
            max_length=args.max_length,
            prefix_cache=prefix_cache,
            **pair_options_of(args),
        )
    from easyspec_jax.cli.console import print_note
    from easyspec_jax.parallel.mesh import parse_mesh
    from easyspec_jax.tune.tuning import auto, open_pair

    pair = open_pair(args.target, args.draft, max_length=args.max_length, **pair_options_of(args))
    choice = auto(pair, args.mesh, args.target is None, bar, print_note)
    engine = pair.variant(
        as_tuned(args, choice.speculative),
        parse_mesh(choice.mesh),
        bar,
    )
    engine.prefix_cache = prefix_cache
    return engine


def as_tuned(args: argparse.Namespace, tuned: SpeculativeConfig) -> SpeculativeConfig:
    """Return how to draft as tuned, and to verify as the flags say.

    Rounds adapt, and texts are looked up, where the way to verify allows it.
    """
    adapts = tuned.adapt and args.verifier in (None, "coupled")
    if args.adapt is not None:
        adapts = speculative_of(args).adapt
    needs_chains = args.bit_stable or args.verifier == "block"
    if needs_chains and tuned.width > 1:
        flag = "--bit-stable" if args.bit_stable else "--verifier block"
        raise EasySpecError(
            f"--lp-strategy auto drafts trees for this pair, and {flag} needs a chain: leave out "
            "one of the two"
        )
    return replace(
        tuned,
        verifier=args.verifier,
        bit_stable=args.bit_stable,
        adapt=adapts,
        prompt_lookup=tuned.prompt_lookup and not needs_chains,
    )


def _complete(
    args: argparse.Namespace,
    engine: "Engine",
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    bar: "Bar",
) -> None:
    """Complete every prompt, and with --compare once more by plain decoding."""
    from easyspec_jax.cli import console
    from easyspec_jax.progress import no_bar

    rows = engine.prepare(prompts, chat=args.chat)
    prepared = engine.compile(rows, sampling, batch_size=args.batch_size, bar=bar)
    baseline = engine.baseline() if args.compare else None
    if baseline is not None:
        baseline.compile(rows, sampling, batch_size=args.batch_size, bar=bar)
    if args.verbose:
        console.print_devices(engine, sampling, prepared, args.batch_size)
    stream = None if args.json or args.no_stream or args.batch_size > 1 else _show
    # The example's text continues its prompt in mid-function, so show the prompt first.
    if stream and prompts == [demo.PROMPT]:
        console.print_example(demo.PROMPT)
    # Without streaming there is a bar already, and next to text there must be none: a prompt is
    # read before its text begins.
    reading = bar if stream else no_bar
    texts = engine.generate(rows, sampling, batch_size=args.batch_size, on_text=stream, bar=reading)
    plain_texts = None
    if baseline is not None:
        plain_texts = baseline.generate(rows, sampling, batch_size=args.batch_size)
    completions, plain = [], []
    count = len(prompts) * sampling.n
    for number in range(count):
        # A bar next to streaming text would garble both.
        with (no_bar if stream else bar)("Generating", count) as advance:
            advance(number)
            completions.append(next(texts))
        if not args.json:
            print("" if stream else completions[-1].text, flush=True)
        if plain_texts is not None:
            with bar("Decoding plainly", count) as advance:
                advance(number)
                plain.append(next(plain_texts))
        if args.json:
            print(json.dumps(_as_dict(completions[-1], plain[-1] if plain else None)), flush=True)
    # Texts come first, then what went wrong: a fault of one prompt costs no other its text.
    for completion in completions:
        if completion.error is not None:
            raise EasySpecError(completion.error)
    if args.json:
        return
    if baseline is not None:
        console.print_comparison(completions, plain, engine, args.batch_size)
    else:
        console.print_summary(completions, engine, args.batch_size)


def _converse(
    args: argparse.Namespace, engine: "Engine", sampling: SamplingParams, bar: "Bar"
) -> None:
    """Hold a conversation. Weights are loaded first, so that the first answer starts at once."""
    from easyspec_jax.cli.chat import GREETING, converse
    from easyspec_jax.cli.console import print_devices

    by_default = args.prefix_cache is None and not args.bit_stable
    if by_default:
        engine.prefix_cache = CONVERSATION_PREFIXES
    try:
        prepared = engine.compile([GREETING], sampling, bar=bar)
    except EasySpecError:
        if not by_default:
            raise
        # A default must not keep a pair from fitting.
        engine.prefix_cache = 0
        prepared = engine.compile([GREETING], sampling, bar=bar)
    if args.verbose:
        print_devices(engine, sampling, prepared, 1)
    converse(engine, sampling, bar, system=args.system)


def _as_dict(completion: "Completion", plain: "Completion | None") -> dict[str, Any]:
    """Return the object that `--json` prints, with its plain counterpart if there is one."""
    from easyspec_jax.cli.console import speedup

    printed = completion.as_dict()
    if plain is not None:
        printed["plain"] = {
            "stats": plain.stats.as_dict(),
            "same_tokens": plain.token_ids == completion.token_ids,
            "speedup": speedup(completion.stats, plain.stats),
        }
    return printed


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _note_missing_accelerators(args: argparse.Namespace, engine: "Engine") -> None:
    import jax

    from easyspec_jax.cli.console import print_note

    used, best = engine.mesh.devices.flat[0].platform, jax.default_backend()
    if args.platform is None and used != best:
        count = jax.device_count()
        print_note(
            f"{engine.mesh.size} devices were asked for and there are {count} of platform {best}: "
            f"the bundled pair runs on virtual CPU devices; --mesh {count} uses the {best}"
        )
