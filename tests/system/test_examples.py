"""The examples run as they are, and show what they say."""

import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(capsys, monkeypatch):
    """Run an example as the main program, and return what it prints."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_has_a_test_and_is_on_the_site():
    source = Path(__file__).read_text(encoding="utf-8")
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in source
        # Formatters of code within documents have rewritten these lines before.
        assert f'```{{.python}}\n--8<-- "examples/{path.name}"\n```' in page


def test_a_conversation_is_answered_line_by_line(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def add(a, b):\nimport os\n"))
    printed = run("chat.py")
    assert len(re.findall(r"\n\[\d\.\d tokens per pass of the target\]\n", printed)) == 2


def test_a_job_goes_on_where_it_stopped(run, tmp_path):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": "one", "prompt": "import "}, {"id": "bad"}, {"id": "two", "prompt": "def f("}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = run("batch_job.py", prompts, out)
    assert printed.startswith("3 records, 1 of them errors\nbad → line 2: ")
    records = out.read_text().splitlines(keepends=True)
    out.write_text("".join(records[:2]) + records[2][:9])  # as if it had been killed while writing
    assert run("batch_job.py", prompts, out) == printed


def test_a_mesh_holds_a_pair_in_equal_parts(run):
    printed = run("sharded_load.py", "layer=2,tensor=2")
    assert "4 devices; layers that run together: 0,1,2-3,4-5,6-7,8-9,10,11\n" in printed
    assert re.search(r"blocks\.2\.attention\.qkv\.weight\S* +\(2, .*P\('layer', 'tensor'", printed)
    held = re.findall(r"holds (\S+) MiB", printed)
    assert len(held) == 4 and len(set(held)) == 1


def test_a_lenient_verifier_accepts_more(run):
    strict, lenient = run("custom_verifier.py").split("margin ")[1:]
    (completion,) = open_model(speculative=SpeculativeConfig(method="vanilla")).generate(
        ["def read_lines(path):\n"], SamplingParams(max_new_tokens=24)
    )
    assert completion.text in strict and completion.text not in lenient
    assert float(strict.split()[1]) < float(lenient.split()[1])
