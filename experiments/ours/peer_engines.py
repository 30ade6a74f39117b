"""Other engines on the same weights, greedily: transformers, llama.cpp and vLLM."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from convert.huggingface import open_huggingface
from convert.shards import HUGGING_FACE
from convert.stream import convert
from easyspec_jax.checkpoint.directory import open_checkpoint
from experiments.lib.machine import cores, torch_device
from experiments.ours.gguf_file import write_gguf

Complete = Callable[[Sequence[int]], list[int]]
"""Returns the ids generated after a prompt's ids, a stop token included."""

EXACT = "the checkpoint's"


class Missing(Exception):
    """An engine cannot be compared here; the message says why. This is not an error."""


@dataclass(frozen=True)
class Peer:
    """A way of decoding.

    Attributes:
        weights: EXACT, or how the weights it reads differ from the checkpoint's.
    """

    complete: Complete
    version: str
    weights: str = EXACT


@dataclass(frozen=True)
class Task:
    """What every engine is given.

    Attributes:
        directory: Where exports go.
        length: Of prompt and text together.
        gguf: Another file of the target's weights, for llama.cpp.
        gguf_draft: Another file of the draft's, to draft for that one.
        allow_links: Follow links that lead out of a checkpoint's directory.
    """

    target: Path
    draft: Path
    directory: Path
    platform: str
    dtype: str
    stop_ids: tuple[int, ...]
    num_speculative_tokens: int
    max_new_tokens: int
    length: int
    gguf: Path | None = None
    gguf_draft: Path | None = None
    allow_links: bool = False

    def exported(self, name: str) -> Path:
        """Export the "target" or the "draft" as a Hugging Face directory in the task's dtype."""
        out = self.directory / name
        if not out.exists():
            model = open_huggingface(getattr(self, name), self.allow_links)
            convert(model, out, self.dtype, HUGGING_FACE)
        return out

    def ended(self, tokens: Sequence[int]) -> list[int]:
        """Cut a text after the first stop token, and at the length that was asked for."""
        end = next(
            (place + 1 for place, token in enumerate(tokens) if token in self.stop_ids), None
        )
        return list(tokens[:end])[: self.max_new_tokens]


def transformers_peers(task: Task) -> dict[str, Peer]:
    """Open plain and assisted generation on torch.

    Assisted generation runs with its own defaults, and with drafts as long as ours.
    """
    device = torch_device(task.platform)
    import torch
    from transformers import AutoModelForCausalLM

    if device == "cpu":
        torch.set_num_threads(cores())
    options: dict[str, Any] = {"dtype": getattr(torch, task.dtype)}
    models: Any = AutoModelForCausalLM
    target, draft = (
        models.from_pretrained(task.exported(name), **options).to(device)
        for name in ("target", "draft")
    )
    defaults = draft.generation_config.to_dict()

    def complete(prompt: Sequence[int], **options: Any) -> list[int]:
        ids = torch.tensor([list(prompt)], device=device)
        made = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(task.stop_ids),
            **options,
        )
        return made[0, len(prompt) :].tolist()

    def assisted(prompt: Sequence[int], **settings: Any) -> list[int]:
        draft.generation_config.update(**(defaults | settings))  # generate() changes them
        return complete(prompt, assistant_model=draft)

    fixed = {
        "num_assistant_tokens": task.num_speculative_tokens,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    ways: dict[str, Complete] = {
        "transformers": complete,
        "transformers, assisted": assisted,
        f"transformers, assisted by {task.num_speculative_tokens}": partial(assisted, **fixed),
    }
    return {
        name: Peer(way, f"{version('transformers')}, torch {torch.__version__}")
        for name, way in ways.items()
    }


def llama_cpp_peers(task: Task) -> dict[str, Peer]:
    """Open plain decoding, prompt lookup, and drafting by the pair's draft (a Python hook)."""
    llama = LlamaCpp(task)
    files = {name: task.directory / f"{name}.gguf" for name in ("target", "draft")}
    for name, path in files.items():
        write_gguf(open_checkpoint(getattr(task, name), allow_links=task.allow_links), path)
    target, levels = files["target"], task.num_speculative_tokens
    return {
        "llama.cpp": llama.peer(target),
        "llama.cpp, prompt lookup": llama.peer(target, draft_model=llama.lookup(levels)),
        f"llama.cpp, drafts of {levels}": llama.peer(target, second=llama.opened(files["draft"])),
    }


def gguf_peers(task: Task) -> dict[str, Peer]:
    """Open llama.cpp on other files of the target's weights and the draft's, if there are any."""
    if task.gguf is None:
        return {}
    llama, own = LlamaCpp(task), task.gguf.name
    name, levels = f"llama.cpp, {own}", task.num_speculative_tokens
    note = f"as {own} has them: the same only where the checkpoint was converted from it"
    peers = {name: llama.peer(task.gguf, note)}
    if task.gguf_draft is not None:
        second = llama.opened(task.gguf_draft)
        peers[f"{name}, drafts of {levels}"] = llama.peer(task.gguf, note, second)
    return peers


class LlamaCpp:
    """Opens models of llama.cpp for a task, with caches in float32 and a thread for each core."""

    def __init__(self, task: Task) -> None:
        """Import llama.cpp.

        Raises:
            Missing: It is not installed, or the task is for other devices.
        """
        if task.platform != "cpu":
            raise Missing("compared on the CPU alone")
        self._task, self._module = task, _installed("llama_cpp")

    def opened(self, path: Path, **options: Any) -> Any:
        """Open a file."""
        float32: int = self._module.GGML_TYPE_F32
        caches = {"type_k": float32, "type_v": float32}
        threads = {"n_threads": cores(), "n_threads_batch": cores()}
        # Room for drafts past the end.
        length = self._task.length + self._task.num_speculative_tokens + 1
        return self._module.Llama(
            str(path), n_ctx=length, verbose=False, **threads, **caches, **options
        )

    def lookup(self, levels: int) -> Any:
        """Return llama.cpp's own prompt lookup."""
        return import_module("llama_cpp.llama_speculative").LlamaPromptLookupDecoding(
            num_pred_tokens=levels
        )

    def peer(self, path: Path, weights: str = EXACT, second: Any = None, **options: Any) -> Peer:
        """Open a file as a way of decoding, drafted by a second model if there is one."""
        task = self._task
        if second is not None:
            options["draft_model"] = _drafts(second, task.num_speculative_tokens)
        model = self.opened(path, **options)

        def complete(prompt: Sequence[int]) -> list[int]:
            for own in filter(None, (model, second)):
                own.reset()  # forget the prompt's keys from the last time
            made: list[int] = []
            for token in model.generate(prompt, temp=0.0):
                made.append(token)
                if token in task.stop_ids or len(made) == task.max_new_tokens:
                    break
            return made

        return Peer(complete, f"llama-cpp-python {self._module.__version__}", weights)


def _drafts(model: Any, levels: int) -> Callable[..., np.ndarray]:
    """Let llama.cpp's target ask a model of llama.cpp's for that many greedy tokens."""

    def drafted(ids: np.ndarray, /, **_: Any) -> np.ndarray:
        made = model.generate(ids.tolist(), temp=0.0)
        return np.fromiter(itertools.islice(made, levels), np.intc)

    return drafted


def vllm_peers(task: Task) -> dict[str, Peer]:
    """Open plain decoding on a GPU."""
    if task.platform != "gpu":
        raise Missing("compared on GPUs alone")
    vllm = _installed("vllm")
    model = vllm.LLM(
        str(task.exported("target")),
        dtype=task.dtype,
        max_model_len=task.length,
        gpu_memory_utilization=0.4,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=task.max_new_tokens,
        stop_token_ids=list(task.stop_ids),
        detokenize=False,
    )

    def complete(prompt: Sequence[int]) -> list[int]:
        (made,) = model.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)
        return task.ended(made.outputs[0].token_ids)

    return {"vLLM": Peer(complete, vllm.__version__)}


def _installed(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise Missing("not installed") from None


Open = Callable[[Task], dict[str, Peer]]
"""Opens the ways of an engine, by name."""

ENGINES: Mapping[str, Open] = {
    "transformers": transformers_peers,
    "llama.cpp": llama_cpp_peers,
    "gguf": gguf_peers,
    "vLLM": vllm_peers,
}


def open_peers(task: Task, engines: Mapping[str, Open]) -> tuple[dict[str, Peer], dict[str, str]]:
    """Open all that can be compared here, by name, and say why the other engines cannot."""
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, opens in engines.items():
        try:
            found |= opens(task)
        except Missing as reason:
            missing[name] = str(reason)
    return found, missing
