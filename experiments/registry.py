"""Every script, once: its name, its folder, the results it writes and the settings for small runs.

A script NAME runs as `python -m experiments.NAME`. Its module has `main`, which measures. Where it
writes results, the module also has `tabulate`, which turns a file of results into the rows of a
table, and `draw`, which makes the picture next to the file, if there is one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent


@dataclass(frozen=True)
class Result:
    """A file in results/.

    Attributes:
        name: Its name without `.json`.
        title: The heading of its section in the page of results; `{subject}` is the pair that it
            is about.
        quick: The flags with which `run --quick` measures it; None if `run` leaves it alone.
        smoke: The flags with which `run --smoke` measures it; None to leave it out there.
    """

    name: str
    title: str
    quick: str | None = None
    smoke: str | None = None


@dataclass(frozen=True)
class Script:
    """A command.

    Attributes:
        name: What to type after `python -m experiments.`
        folder: Where its module is, "" for experiments/ itself.
        about: One line for the list of scripts.
        results: The files that the committed results hold of it, in the order of the page.
        draws: Its module has a `draw` function.
        by_shape: Results are named NAME_SHAPE, with the title `by_shape: SHAPE`.
    """

    name: str
    folder: str
    about: str
    results: tuple[Result, ...] = ()
    draws: bool = False
    by_shape: str | None = None

    @property
    def module(self) -> str:
        """Return the module's full name."""
        return ".".join(part for part in ("experiments", self.folder, self.name) if part)

    @property
    def path(self) -> Path:
        """Return the module's file."""
        return HOME / self.folder / f"{self.name}.py"

    def function(self, name: str) -> Callable[..., Any]:
        """Import the module and return one of its functions."""
        return getattr(import_module(self.module), name)


SCRIPTS = (
    Script(
        "run",
        "",
        "measures everything anew, or what `--only` names, and updates the documents",
    ),
    Script("page", "", "writes the tables of all documents from the results; `--check` compares"),
    Script("draw", "", "draws a file of results again"),
    Script(
        "table2",
        "paper",
        "Table 2: every way of decoding on the same prompts, drafting and verification apart",
        (
            Result(
                "table2",
                "Table 2: ways of decoding",
                "--profile-phases --mesh 2 --max-new-tokens 64 --repeats 9 --fit-tokens 6000",
            ),
            Result("table2_smollm2", "Table 2: SmolLM2-135M-Instruct as its own draft"),
            Result("table2_qwen", "Table 2: Qwen2.5-Coder-1.5B drafted by 0.5B, one device"),
            Result(
                "table2_qwen_processes",
                "Table 2: Qwen2.5-Coder-1.5B drafted by 0.5B, two processes, a core each",
            ),
            Result(
                "table2_qwen_processes_n2",
                "Table 2: Qwen2.5-Coder-1.5B drafted by 0.5B with N = 2, two processes",
            ),
            Result(
                "table2_qwen_processes_n7",
                "Table 2: Qwen2.5-Coder-1.5B drafted by 0.5B with N = 7, two processes",
            ),
        ),
        draws=True,
    ),
    Script(
        "spec_bench",
        "paper",
        "Table 3: Spec-Bench's questions, or a dozen of ours, answered with and without a draft",
        (
            Result("spec_bench", "Table 3: questions in Spec-Bench's form", "--max-new-tokens 64"),
            Result("spec_bench_smollm2", "Table 3: SmolLM2-135M-Instruct as its own draft"),
            Result("spec_bench_qwen", "Table 3: Qwen2.5-Coder-1.5B drafted by 0.5B, one device"),
        ),
        draws=True,
    ),
    Script(
        "table4",
        "paper",
        "Table 4: cosines of what a group approximates, and what is left of the draft's "
        "distribution",
        (
            Result(
                "table4",
                "Table 4: what groups approximate",
                "--max-new-tokens 64",
                "--lp-sizes 2 --max-new-tokens 8",
            ),
            Result("table4_smollm2", "Table 4: SmolLM2-135M-Instruct, six prompts"),
            Result(
                "table4_smollm2_unseen",
                "Table 4: SmolLM2-135M-Instruct, ten prompts that no fit and no choice has seen",
            ),
            Result("table4_qwen", "Table 4: Qwen2.5-Coder-0.5B-Instruct"),
        ),
        draws=True,
    ),
    Script(
        "frontier",
        "ours",
        "what each layout keeps of the draft, against the collectives that it waits for",
        (
            Result(
                "frontier",
                "Fidelity against collectives",
                "--max-new-tokens 64",
                "--lp-strategies 0,1-3,4-7x4,8-10,11 --max-new-tokens 8",
            ),
            Result("frontier_smollm2", "Fidelity against collectives: SmolLM2-135M-Instruct"),
            Result("frontier_qwen", "Fidelity against collectives: Qwen2.5-Coder-0.5B-Instruct"),
        ),
        draws=True,
    ),
    Script(
        "table5",
        "paper",
        "Table 5: groups of attentions against groups of whole layers",
        (
            Result(
                "table5",
                "Table 5: attentions or whole layers at once",
                "--mesh 2 --max-new-tokens 64 --repeats 9",
                "--lp-sizes 2 --max-new-tokens 8 --repeats 2",
            ),
            Result("table5_qwen", "Table 5: Qwen2.5-Coder-1.5B drafted by 0.5B, one device"),
        ),
        draws=True,
    ),
    Script(
        "table6",
        "paper",
        "Table 6: speed by the number of devices, measured or by the cost model",
        (Result("table6", "Table 6: steps a second by the number of devices", ""),),
        draws=True,
    ),
    Script(
        "table8",
        "paper",
        "Table 8: drafts of several sizes for one target",
        (Result("table8", "Table 8: other pairs", "--max-new-tokens 64"),),
        draws=True,
    ),
    Script(
        "figure2",
        "paper",
        "Figure 2: what every device does in a round, from a profile",
        (
            Result(
                "figure2",
                "Figure 2: what the devices do in a round",
                "--max-new-tokens 32 --rounds 5 --repeats 5",
                "--mesh 2 --lp-size 2 --max-new-tokens 8 --rounds 2 --repeats 2",
            ),
        ),
        draws=True,
    ),
    Script("round_picture", "paper", "draws `docs/round.svg`, one round step by step"),
    Script(
        "acceptance",
        "ours",
        "Figure 4: acceptance by tree width and number of layers at once",
        (
            Result(
                "figure4",
                "Figure 4: acceptance by N and width",
                "--temperatures 0 --widths 1 4 --lp-sizes 1 2 3 4 5 --max-new-tokens 64 "
                "--batch-size 8",
                "--temperatures 0 --widths 1 --lp-sizes 1 2 --max-new-tokens 8",
            ),
            Result("acceptance_demo", "Acceptance: the bundled pair"),
            Result("acceptance_demo_refit", "Acceptance with a refit: the bundled pair"),
            Result("acceptance", "{subject}"),
            Result("acceptance_qwen", "Acceptance: Qwen2.5-Coder-1.5B drafted by 0.5B"),
            Result(
                "acceptance_qwen_sampled",
                "Acceptance at temperature 0.8: Qwen2.5-Coder-1.5B drafted by 0.5B",
            ),
            Result(
                "acceptance_qwen_code", "Acceptance on code: Qwen2.5-Coder-1.5B drafted by 0.5B"
            ),
            Result(
                "acceptance_qwen_prose", "Acceptance on prose: Qwen2.5-Coder-1.5B drafted by 0.5B"
            ),
        ),
        draws=True,
    ),
    Script(
        "quantization",
        "ours",
        "perplexity and acceptance with matrices and caches in narrower types",
        (
            Result(
                "quantization",
                "Narrower types: the bundled pair",
                "",
                "--tokens 256 --max-new-tokens 8",
            ),
            Result("quantization_qwen", "Narrower types: Qwen2.5-Coder-1.5B drafted by 0.5B"),
            Result(
                "quantization_qwen_code",
                "Narrower types: Qwen2.5-Coder-1.5B drafted by 0.5B, eight tasks of code",
            ),
            Result(
                "quantization_qwen_openings",
                "Narrower types: Qwen2.5-Coder-1.5B drafted by 0.5B, 48 openings of code",
            ),
            Result(
                "quantization_smollm2",
                "Narrower types: SmolLM2-135M-Instruct as its own draft",
            ),
        ),
    ),
    Script(
        "bit_stability",
        "ours",
        "whether texts in bfloat16 are those of plain decoding, and what that costs",
        (
            Result("bit_stability", "Texts in bfloat16: the bundled pair"),
            Result(
                "bit_stability_smollm2",
                "Texts in bfloat16: SmolLM2-135M-Instruct as its own draft",
            ),
            Result("bit_stability_qwen", "Texts in bfloat16: Qwen2.5-Coder 1.5B and 0.5B"),
        ),
    ),
    Script(
        "lookup",
        "ours",
        "drafts that are looked up in the text, by kinds of prompts, and ways to find them",
        (Result("lookup_smollm2", "Looked-up drafts: SmolLM2-135M-Instruct"),),
    ),
    Script(
        "adapt",
        "ours",
        "rounds that adapt, against plain decoding and every fixed number of levels",
        (
            Result("adapt_qwen", "Rounds that adapt: Qwen2.5-Coder-1.5B drafted by 0.5B"),
            Result(
                "adapt_qwen_sampled",
                "Rounds that adapt, sampled: Qwen2.5-Coder-1.5B drafted by 0.5B",
            ),
            Result(
                "adapt_qwen_processes",
                "Rounds that adapt: Qwen2.5-Coder-1.5B drafted by 0.5B, two processes",
            ),
            Result(
                "adapt_qwen_processes_sampled",
                "Rounds that adapt, sampled: Qwen2.5-Coder-1.5B drafted by 0.5B, two processes",
            ),
            Result(
                "adapt_qwen_auto",
                "Rounds that adapt and end early: Qwen2.5-Coder-1.5B drafted by 0.5B",
            ),
            Result("adapt_qwen_ngram", "Rounds that adapt: Qwen2.5-Coder-1.5B with lookups"),
            Result(
                "adapt_qwen_lookup",
                "Rounds that adapt, with lookups too: Qwen2.5-Coder-1.5B drafted by 0.5B",
            ),
        ),
    ),
    Script(
        "early_end",
        "ours",
        "tokens and draft steps of rounds that end where no path is likely enough",
        (
            Result("early_end", "Drafts that end early: the bundled pair"),
            Result("early_end_qwen", "Drafts that end early: Qwen2.5-Coder 1.5B and 0.5B"),
        ),
    ),
    Script(
        "grammar",
        "ours",
        "what a grammar costs, and whether its texts are valid and those of plain decoding",
        (Result("grammar_qwen", "Grammars: Qwen2.5-Coder 1.5B and 0.5B"),),
    ),
    Script("fidelity", "ours", "how faithful one way of drafting is to the exact draft"),
    Script(
        "tune_check",
        "ours",
        "whether `tune` chooses the fastest of all candidates",
        (
            Result("tune_check", "What tune chooses, among all candidates"),
            Result(
                "tune_check_smollm2",
                "What tune chooses: SmolLM2-135M-Instruct as its own draft",
            ),
        ),
        draws=True,
    ),
    Script(
        "simulate",
        "paper",
        "the paper's pairs on machines that are not here, by the cost model",
        (
            Result(
                "simulate",
                "Simulation: machines that are not here (estimates)",
                "--topologies a100:8 h100:8 v5p:2x2x1",
            ),
        ),
        draws=True,
    ),
    Script(
        "two_processes",
        "endurance",
        "a draft step where all-reduces are slow, as between hosts",
        (
            Result("two_processes", "Two processes, a core each", "--repeats 9 --calls 4"),
            Result("two_processes_smollm2", "Two processes, a core each: SmolLM2-135M-Instruct"),
        ),
        draws=True,
    ),
    Script(
        "peers",
        "ours",
        "transformers, llama.cpp and vLLM on the same weights and prompts",
        (
            Result("peers", "Other engines in the same run", "--max-new-tokens 64 --repeats 3"),
            Result(
                "peers_smollm2",
                "Other engines in the same run: SmolLM2-135M-Instruct as its own draft",
            ),
            Result("peers_qwen", "llama.cpp in the same run: Qwen2.5-Coder-1.5B drafted by 0.5B"),
            Result(
                "peers_qwen_transformers",
                "transformers in the same run: Qwen2.5-Coder-1.5B drafted by 0.5B",
            ),
            Result(
                "peers_qwen_gguf",
                "llama.cpp on files of four bits: Qwen2.5-Coder-1.5B drafted by 0.5B",
            ),
        ),
        draws=True,
    ),
    Script(
        "second_turn",
        "ours",
        "time to the first token of a second turn, with and without kept prefixes",
        (
            Result(
                "second_turn",
                "The second turn of a conversation",
                "",
                "--tokens 200 --max-new-tokens 8 --repeats 2",
            ),
            Result(
                "second_turn_smollm2",
                "The second turn of a conversation: SmolLM2-135M-Instruct as its own draft",
            ),
            Result(
                "second_turn_qwen",
                "The second turn of a conversation: Qwen2.5-Coder-1.5B drafted by 0.5B",
            ),
        ),
    ),
    Script(
        "context_length",
        "ours",
        "steps and rounds by the length of the text and the capacity of the caches",
        (
            Result(
                "context_length",
                "Long texts: steps by the length of the text",
                "--repeats 5",
                "--capacities 4096 --lengths 100 1000 --repeats 1",
            ),
        ),
        draws=True,
    ),
    Script(
        "bench_round",
        "bench",
        "what a round takes beyond its passes",
        (Result("bench_round", "Bookkeeping: what a round takes beyond its passes"),),
    ),
    Script(
        "kill_check",
        "endurance",
        "a batch job killed again and again, compared with one that was not",
        (Result("kill_check", "A job of 500 prompts, killed at random moments"),),
    ),
    Script(
        "soak",
        "endurance",
        "memory, programs and speed over tens of thousands of rounds",
        (Result("soak", "A soak: memory, programs and speed over many rounds"),),
        draws=True,
    ),
    Script(
        "load",
        "endurance",
        "a server under 1, 8 and 32 clients: every text checked, throughput, time to first token",
        (Result("load", "A server under load", smoke="--clients 2 --seconds 3 --requests 4"),),
        draws=True,
    ),
    Script(
        "ready",
        "endurance",
        "how long a server takes until it is ready, with an empty and a full cache of programs",
        (Result("ready", "A server until it is ready", "--repeats 1"),),
    ),
    Script(
        "bench_checkpoints",
        "bench",
        "memory and speed of converting and opening a checkpoint",
        by_shape="Conversion and opening of a checkpoint",
    ),
    Script(
        "bench_roofline",
        "bench",
        "passes and whole texts against the machine's bandwidth and against transformers",
        by_shape="Passes and rounds against the machine's bandwidth",
    ),
    Script(
        "bench_lookup",
        "bench",
        "what the search for repeats takes, with and without a corpus",
        (Result("bench_lookup", "The search for repeats"),),
    ),
    Script("train_demo", "demo", "trains the bundled pair on a CPU"),
    Script(
        "gpu_hour",
        "gpu",
        "everything worth measuring on one GPU within half an hour, step by step; `--rehearse` "
        "runs the same steps on a CPU",
    ),
    Script(
        "dry_compile",
        "gpu",
        "compiles the programs of gpu_hour for a GPU that is absent, and counts kernels and copies",
        (Result("dry_compile_h100", "8B and 1B in bfloat16, compiled for an absent H100"),),
    ),
    Script(
        "roofline_terms",
        "gpu",
        "what each pass of a round costs on machines that are absent, term by term",
        (Result("roofline_terms", "A round's terms on absent machines (estimates)", ""),),
    ),
    Script("gpu_environment", "gpu", "the accelerator, its clocks and the versions of packages"),
    Script(
        "gpu_correctness",
        "gpu",
        "tokens and logits of a device against those that a CPU made of the same weights",
    ),
)
"""A new experiment is one entry here. Its `main` takes --out if it has results with `quick`."""

FORMER = {"readme": "page", "draw_round": "round_picture"} | {
    f"draw_{script.name}": "draw" for script in SCRIPTS if script.draws
}
"""Names that some scripts had, and their names today."""


def named(name: str) -> Script | None:
    """Find a script by its name, or by one that it had."""
    name = FORMER.get(name, name)
    return next((script for script in SCRIPTS if script.name == name), None)


def known(stem: str) -> tuple[Script, Result] | None:
    """Find what a file of results is, by its name without `.json`."""
    for script in SCRIPTS:
        for result in script.results:
            if result.name == stem:
                return script, result
        if script.by_shape and stem.startswith(f"{script.name}_"):
            shape = stem.removeprefix(f"{script.name}_")
            return script, Result(stem, f"{script.by_shape}: {shape}")
    return None
