"""Complete a file of prompts, and go on where a killed run stopped.

    python examples/batch_job.py prompts.jsonl completions.jsonl [TARGET DRAFT]

Each line of the input is a JSON object with an `id` and a `prompt` (or `messages`), and perhaps its
own `temperature`, `max_new_tokens` and so on. Each line of the output is a record with the
text and its statistics, in the order in which texts were finished.
"""

import json
import sys
from pathlib import Path

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.cli.jobs import read_job, run_job


def main(prompts: str, out: str, target: str | None = None, draft: str | None = None) -> None:
    # Four tokens at each of three levels are drafted, so that a round has more to choose from.
    speculative = SpeculativeConfig(num_speculative_tokens=3, tree_width=4)
    engine = open_model(target, draft, speculative=speculative)

    # Defaults for fields that a line leaves out. A bad line is kept, and gets an error record.
    job = read_job(prompts, SamplingParams(max_new_tokens=16))

    # Two texts are decoded together. When one is finished, the next line takes its place. Run this
    # again with the same arguments, and only the lines that have no record yet are completed.
    # The settings say what else changes a text: another pair cannot go on with this one's job.
    settings = {"target": target, "draft": draft, "max_new_tokens": 16}
    records, errors = run_job(engine, job, Path(out), batch_size=2, settings=settings)
    print(f"{records} records, {errors} of them errors")

    for line in Path(out).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        print(record["id"], "→", record.get("text", record.get("error")))


if __name__ == "__main__":
    main(*sys.argv[1:])
