"""Speed of one stream against transformers on the same weights: `python -m experiments.bench_peer`.

Every way of decoding completes the same prompts in turn, several times over in one run: a shared machine drifts.
What is compared is the whole time of a completion, its prompt included. Both engines run on the CPU.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, demo, open_model
from easyspec_jax.command import Parser, read_prompts
from easyspec_jax.options import Method
from experiments.output import check_destination, save
from experiments.pair import names

HERE = Path(__file__).parent

Complete = Callable[[str], list[int]]
"""From a prompt to the generated ids."""


@dataclass(frozen=True)
class Way:
    """A way of decoding, and the seconds that each pass over all prompts took."""

    name: str
    complete: Complete
    seconds: list[float]
    tokens: list[list[int]]

    def run(self, prompts: Sequence[str]) -> None:
        """Completes all prompts once more."""
        begun = time.perf_counter()
        self.tokens[:] = [self.complete(prompt) for prompt in prompts]
        self.seconds.append(time.perf_counter() - begun)


def ours(args: argparse.Namespace, method: Method) -> Complete:
    """Decoding by this package, compiled before it is timed."""
    speculative = SpeculativeConfig(
        method=method, num_speculative_tokens=args.num_speculative_tokens, lp_size=args.lp_size
    )
    engine = open_model(
        args.target, args.draft, mesh=args.mesh, platform="cpu", speculative=speculative, dtype="float32"
    )
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens)
    return lambda prompt: next(engine.generate([prompt], sampling)).token_ids


def peers(args: argparse.Namespace, directory: Path) -> dict[str, Complete]:
    """Plain and assisted generation by transformers on torch, from an export of the same checkpoints."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from convert.huggingface import open_huggingface
    from convert.shards import HUGGING_FACE
    from convert.stream import convert

    models: list[Any] = []
    for name, source in (("target", args.target or demo.TARGET), ("draft", args.draft or demo.DRAFT)):
        convert(open_huggingface(Path(source)), directory / name, "float32", HUGGING_FACE)
        models.append(AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32))
    target, draft = models
    tokenizer = AutoTokenizer.from_pretrained(directory / "target")

    def complete(prompt: str, **options: Any) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        made = target.generate(**ids, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=0, **options)
        return made[0, ids.input_ids.shape[1] :].tolist()

    def assisted(prompt: str) -> list[int]:
        return complete(prompt, assistant_model=draft)

    return {"transformers": complete, "transformers, assisted": assisted}


def measure(args: argparse.Namespace, directory: Path) -> list[Way]:
    """All ways, each timed `repeats` times, one after the other; a first pass of each is not timed."""
    if args.repeats < 1:
        raise EasySpecError(f"--repeats {args.repeats} must be at least 1")
    check_destination(args.out)
    prompts = read_prompts(args.prompt_file)
    methods: tuple[Method, ...] = ("vanilla", "sd", "easyspec")
    completes = {method: ours(args, method) for method in methods} | peers(args, directory)
    ways = [Way(name, complete, [], []) for name, complete in completes.items()]
    for _ in range(args.repeats + 1):
        for way in ways:
            way.run(prompts)
    for way in ways:
        del way.seconds[0]
    return ways


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.bench_peer", description=__doc__)
    parser.add_argument("--target", help="default: the bundled pair")
    parser.add_argument("--draft")
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--lp-size", type=int, default=4)
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-file", type=Path, default=HERE / "code_prompts.txt")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bench_peer.json")
    try:
        args = parser.parse_args(argv)
        with tempfile.TemporaryDirectory() as directory:
            report(measure(args, Path(directory)), args)
    except (EasySpecError, OSError) as error:
        print(f"experiments.bench_peer: error: {error}", file=sys.stderr)
        return 2
    return 0


def report(ways: list[Way], args: argparse.Namespace) -> None:
    """Prints the table and writes the JSON. Ratios are medians over the repeats, each within its own repeat."""
    plain = ways[0]
    table = Table("", "tokens/s", "over vanilla", "vanilla's tokens")
    rows = []
    for way in ways:
        count = sum(map(len, way.tokens))
        plain_speed = [sum(map(len, plain.tokens)) / seconds for seconds in plain.seconds]
        speed = [count / seconds for seconds in way.seconds]
        ratios = [own / other for own, other in zip(speed, plain_speed, strict=True)]
        same = sum(a == b for a, b in zip(way.tokens, plain.tokens, strict=True))
        rows.append({"name": way.name, "tokens_per_second": speed, "over_vanilla": ratios, "same_tokens": same})
        table.add_row(way.name, f"{median(speed):.1f}", f"{median(ratios):.2f}", f"{same} of {len(plain.tokens)}")
    Console().print(table)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "prompt_file")}
    save(args.out, json.dumps(settings | names(args) | {"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
