"""From two checkpoint directories to text: `open_model` checks everything, `Engine.generate` speaks."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from easyspec_jax.checkpoint import Checkpoint, open_checkpoint
from easyspec_jax.config import DType, Platform, SamplingParams, SpeculativeConfig, resolve_dtype
from easyspec_jax.decode.loop import Programs, decode, warm_up
from easyspec_jax.decode.metrics import Stats
from easyspec_jax.decode.round import Report, RoundConfig
from easyspec_jax.draft.grouping import Group, paper_groups, parse_groups
from easyspec_jax.draft.parallel import load_draft
from easyspec_jax.errors import EasySpecError
from easyspec_jax.mesh import ALL_AXES, Axes, open_mesh, parse_mesh
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.tokenizer import TextStream, Tokenizer, check_same_ids, decode_text, encode, load_tokenizer
from easyspec_jax.verify import choose


@dataclass(frozen=True)
class Completion:
    """What one prompt became. token_ids: generated ids, a stop token included; finish_reason: "stop" or "length"."""

    prompt: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stats": self.stats.as_dict(),
        }


def open_model(
    target: str | Path,
    draft: str | Path | None = None,
    *,
    mesh: str = "1",
    platform: Platform | None = None,
    speculative: SpeculativeConfig | None = None,
    max_length: int | None = None,
    dtype: DType = "auto",
) -> "Engine":
    """Opens and checks a target and its draft; weights are read by Engine.load or the first Engine.generate.

    mesh: "8" or "layer=4,tensor=2". max_length: prompt and generated tokens together, by default what both models were
    made for. dtype "auto" is float32 on a CPU and otherwise the checkpoint's. Raises EasySpecError for anything that
    would not work.
    """
    speculative = speculative or SpeculativeConfig()
    parse_mesh(mesh)  # a mistyped mesh should not wait for the checkpoints
    opened = open_checkpoint(target)
    tokenizer = load_tokenizer(opened.directory)
    second, groups = None, ()
    if speculative.method != "vanilla":
        if draft is None:
            raise EasySpecError(f"--method {speculative.method} needs --draft DIR (or use --method vanilla)")
        second = open_checkpoint(draft)
        check_same_ids(tokenizer, load_tokenizer(second.directory))
        groups = _groups(speculative, second.config.num_hidden_layers)
    smallest = min((c for c in (opened, second) if c is not None), key=lambda c: c.config.max_position_embeddings)
    positions = smallest.config.max_position_embeddings
    if max_length is not None and not 2 <= max_length <= positions:
        raise EasySpecError(
            f"--max-length {max_length} must be from 2 to the {positions} positions of {smallest.directory}"
        )
    devices = open_mesh(parse_mesh(mesh, group_size=max(map(len, groups), default=1)), platform)
    return Engine(
        target=opened,
        draft=second,
        tokenizer=tokenizer,
        groups=groups,
        mesh=devices,
        speculative=speculative,
        max_length=max_length or positions,
        dtype=resolve_dtype(dtype, devices.devices.flat[0].platform, opened.config),
    )


def _groups(speculative: SpeculativeConfig, num_layers: int) -> tuple[Group, ...]:
    if speculative.method == "sd":
        return tuple(range(layer, layer + 1) for layer in range(num_layers))
    if speculative.lp_strategy is not None:
        return parse_groups(speculative.lp_strategy, num_layers)
    return paper_groups(num_layers, speculative.lp_size)


class Engine:
    """A checked pair of models on a mesh; see open_model."""

    def __init__(
        self,
        target: Checkpoint,
        draft: Checkpoint | None,
        tokenizer: Tokenizer,
        groups: tuple[Group, ...],
        mesh: Mesh,
        speculative: SpeculativeConfig,
        max_length: int,
        dtype: str,
    ) -> None:
        self.target, self.draft, self.tokenizer, self.groups = target, draft, tokenizer, groups
        self.mesh, self.speculative, self.max_length, self.dtype = mesh, speculative, max_length, dtype
        self._models: tuple[Decoder, Decoder | None] | None = None
        self._programs: dict[RoundConfig, Programs] = {}

    def load(self) -> tuple[Decoder, Decoder | None]:
        """Target and draft on the mesh; read on the first call."""
        if self._models is None:
            target = self._loader(self.target, ALL_AXES)
            layers = [target.layer(index) for index in range(self.target.config.num_hidden_layers)]
            draft = None
            if self.draft is not None:
                axes = ALL_AXES if self.speculative.draft_tensor_parallel_size == "all" else ()
                draft = load_draft(self._loader(self.draft, axes), self.groups)
            self._models = target.decoder(layers), draft
        return self._models

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """A prompt's token ids. Raises EasySpecError if it is empty or leaves no room in max_length."""
        ids = encode(self.tokenizer, prompt, chat)
        if len(ids) >= self.max_length:
            raise EasySpecError(
                f"the prompt has {len(ids)} tokens, which leaves no room within --max-length {self.max_length} "
                "(by default what both models were made for); shorten it"
            )
        if max(ids) >= self.target.config.vocab_size:
            raise EasySpecError(f"the tokenizer gives id {max(ids)}, for which the target has no embedding")
        return ids

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingParams | None = None,
        *,
        chat: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Iterator[Completion]:
        """One Completion per prompt, in order, each as soon as it is done.

        Prompt i draws its noise from seed + i. on_text is given each piece of text as it is made. Raises EasySpecError
        for any bad prompt before anything is generated.
        """
        if isinstance(prompts, str):
            raise EasySpecError("generate() takes a list of prompts, not one string")
        sampling = sampling or SamplingParams()
        encoded = [self.encode(prompt, chat) for prompt in prompts]
        return (
            self._complete(prompt, ids, replace(sampling, seed=(sampling.seed + i) % 2**32), on_text)
            for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True))
        )

    def programs(self, temperature: float) -> Programs:
        """The compiled steps for a temperature; all positive ones share theirs."""
        levels = 0 if self.draft is None else self.speculative.num_speculative_tokens
        config = RoundConfig(
            levels=levels,
            # An exact draft's own KV is exact already: there is nothing to calibrate.
            calibration=self.speculative.calibration and self.speculative.method == "easyspec",
            verifier=choose(temperature),
            stop_ids=self.target.config.stop_ids,
        )
        if config not in self._programs:
            target, draft = self.load()
            self._programs[config] = Programs(self.mesh, target, draft, config)
        return self._programs[config]

    def compile(self, prompts: Sequence[str], sampling: SamplingParams, chat: bool = False) -> None:
        """Loads and compiles what generate() would use for these prompts, so that its times are times of decoding.

        Raises EasySpecError for any bad prompt before any weight is read.
        """
        encoded = [self.encode(prompt, chat) for prompt in prompts]
        programs = self.programs(sampling.temperature)
        for capacity in sorted({programs.capacity(len(ids) + self._limit(ids, sampling)) for ids in encoded}):
            warm_up(programs, capacity)

    def _complete(
        self, prompt: str, ids: list[int], sampling: SamplingParams, on_text: Callable[[str], None] | None
    ) -> Completion:
        programs = self.programs(sampling.temperature)
        text = TextStream(self.tokenizer)
        tokens: list[int] = []
        stats = Stats(accepted_per_position=(0,) * programs.config.levels)
        begun = time.perf_counter()
        for number, report in enumerate(decode(programs, [ids], [self._limit(ids, sampling)], sampling)):
            new = _row(report, 0)
            tokens += new
            if number == 0:
                first = time.perf_counter()
                stats = replace(stats, prefill_seconds=first - begun)
            else:
                stats = stats.with_round(len(new), int(report.drafted[0]), int(report.accepted[0]))
                stats = replace(stats, decode_seconds=time.perf_counter() - begun - stats.prefill_seconds)
            if on_text is not None:
                on_text(text.push(new))
        if on_text is not None:
            on_text(text.rest())
        stopped = tokens[-1] in self.target.config.stop_ids
        return Completion(
            prompt, ids, tokens, decode_text(self.tokenizer, tokens), "stop" if stopped else "length", stats
        )

    def _limit(self, ids: Sequence[int], sampling: SamplingParams) -> int:
        return min(sampling.max_new_tokens, self.max_length - len(ids))

    def _loader(self, checkpoint: Checkpoint, axes: Axes) -> Loader:
        configs = [c.config for c in (self.target, self.draft) if c is not None]
        return Loader(
            source=checkpoint.source,
            config=checkpoint.config,
            mesh=self.mesh,
            axes=axes,
            dtype=np.dtype(self.dtype),
            vocab_rows=padded_vocab_size(self.mesh, *configs),
            num_ids=min(self.target.config.vocab_size, checkpoint.config.vocab_size),
        )


def _row(report: Report, row: int) -> list[int]:
    return [int(token) for token in report.tokens[row, : report.num_tokens[row]]]
