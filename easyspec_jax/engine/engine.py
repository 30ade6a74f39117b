"""From prompts to text: `Engine.generate` and what it needs. `pair.open_model` makes an Engine."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from easyspec_jax.checkpoint.directory import Checkpoint
from easyspec_jax.checkpoint.tensors import TensorSource
from easyspec_jax.decode.batch import Batch
from easyspec_jax.decode.loop import decode, warm_up
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.round import Fault, RoundConfig
from easyspec_jax.decode.stats import Stats
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.draft.refit_file import choose_layout
from easyspec_jax.engine.completion import Completion, Generation, batched
from easyspec_jax.engine.fits import Workload, check_memory, free_memory
from easyspec_jax.errors import EasySpecError
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.parallel import hosts
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape, connect
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.tokenizer import encode
from easyspec_jax.tokenizer.conversation import Prompt, Tokenizer
from easyspec_jax.tokenizer.stream import TextStream


@dataclass(frozen=True)
class Preparation:
    """Result of compile(): cache sizes in tokens, and seconds spent on weights and on programs."""

    capacities: list[int]
    load_seconds: float
    compile_seconds: float


class Engine:
    """A checked pair of models on a mesh; see open_model."""

    def __init__(
        self,
        target: Checkpoint,
        draft: Checkpoint | None,
        tokenizer: Tokenizer,
        layout: Layout,
        refit: TensorSource | None,
        mesh: Mesh,
        speculative: SpeculativeConfig,
        max_length: int,
        dtype: str,
    ) -> None:
        self.target, self.draft, self.tokenizer, self.layout, self.refit = (
            target,
            draft,
            tokenizer,
            layout,
            refit,
        )
        self.mesh, self.speculative, self.max_length, self.dtype = (
            mesh,
            speculative,
            max_length,
            dtype,
        )
        self._target: Decoder | None = None
        self._draft: Decoder | None = None
        self._programs: dict[RoundConfig, Programs] = {}
        self._compiled: set[tuple[RoundConfig, tuple[int, ...], int]] = set()

    def load(self, bar: Bar = no_bar) -> tuple[Decoder, Decoder | None]:
        """Target and draft on the mesh; read on the first call."""
        target = self._load_target(bar)
        if self._draft is None and self.draft is not None:
            with bar("Loading draft"):
                self._draft = load_draft(
                    self.loader(self.draft, self._draft_axes), self.layout, self.refit
                )
        hosts.meet()  # their disks may differ
        connect(self.mesh)
        return target, self._draft

    @property
    def _draft_axes(self) -> Axes:
        return ALL_AXES if self.speculative.draft_tensor_parallel_size == "all" else ()

    def _load_target(self, bar: Bar) -> Decoder:
        if self._target is None:
            loader = self.loader(self.target, ALL_AXES)
            with bar("Loading target", self.target.config.num_hidden_layers) as advance:
                layers = []
                for index in range(self.target.config.num_hidden_layers):
                    layers.append(loader.layer(index))
                    advance(1)
            self._target = loader.decoder(layers)
        return self._target

    def baseline(self) -> "Engine":
        """Plain decoding of the same target on the same mesh; its weights are shared."""
        return self.variant(
            SpeculativeConfig(method="vanilla", verifier=self.speculative.chosen_verifier)
        )

    def variant(
        self, speculative: SpeculativeConfig, shape: MeshShape | None = None, bar: Bar = no_bar
    ) -> "Engine":
        """The same pair on the same devices, decoded otherwise; weights that lie alike are shared.

        shape: how the devices are split, by default as here. Raises EasySpecError for groups that the draft cannot
        have, or if there is no draft.
        """
        mesh = self.mesh
        if shape is not None:
            devices = mesh.devices.reshape(shape.layer, shape.tensor)
            mesh = Mesh(devices, ALL_AXES, axis_types=mesh.axis_types)
        draft, layout, refit = None, Layout.uniform(()), None
        if speculative.method != "vanilla":
            if self.draft is None:
                raise EasySpecError(
                    f"--method {speculative.method} needs --draft DIR (or use --method vanilla)"
                )
            draft = self.draft
            layout, refit = choose_layout(speculative, draft)
        engine = Engine(
            self.target,
            draft,
            self.tokenizer,
            layout,
            refit,
            mesh,
            speculative,
            self.max_length,
            self.dtype,
        )
        engine._target = jax.tree.map(partial(_seen_from, mesh), self._load_target(bar))
        if mesh == self.mesh and speculative.weights_key == self.speculative.weights_key:
            engine._draft = self._draft
        return engine

    def encode(self, prompt: Prompt, chat: bool = False) -> list[int]:
        """A prompt's token ids. Raises EasySpecError if it is empty or leaves no room in max_length."""
        ids = encode(self.tokenizer, prompt, chat)
        if len(ids) >= self.max_length:
            raise EasySpecError(
                f"the prompt has {len(ids)} tokens, which leaves no room within --max-length {self.max_length} "
                "(by default what both models were made for); shorten it"
            )
        if max(ids) >= self.target.config.vocab_size:
            raise EasySpecError(
                f"the tokenizer gives id {max(ids)}, for which the target has no embedding"
            )
        return ids

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        chat: bool = False,
        batch_size: int = 1,
        on_text: Callable[[str], None] | None = None,
    ) -> Iterator[Completion]:
        """One Completion per prompt, in order, each as soon as its batch is done.

        Prompt i draws its noise from seed + i. chat: prompts that are text are put as a user's. batch_size: prompts
        decoded together, which changes no text in float32. on_text is given each piece of text as it is made, one
        prompt at a time. Raises EasySpecError for any bad prompt before anything is generated.
        """
        if isinstance(prompts, str):
            raise EasySpecError("generate() takes a list of prompts, not one string")
        if any(isinstance(prompt, Mapping) for prompt in prompts):
            raise EasySpecError(
                "generate() takes a list of prompts; put one conversation into a list"
            )
        if on_text is not None and batch_size > 1:
            raise EasySpecError(
                "texts of one batch cannot be streamed at once; leave out on_text or batch_size"
            )
        sampling = sampling or SamplingParams()
        batches = batched([(prompt, self.encode(prompt, chat)) for prompt in prompts], batch_size)
        return itertools.chain.from_iterable(
            self._complete(
                batch,
                replace(sampling, seed=(sampling.seed + number * batch_size) % 2**32),
                batch_size,
                on_text or _ignore,
            )
            for number, batch in enumerate(batches)
        )

    def programs(self, sampling: SamplingParams) -> Programs:
        """The compiled steps for a way of sampling; its numbers are arguments of theirs."""
        config = self.config(sampling)
        if config not in self._programs:
            target, draft = self.load()
            self._programs[config] = Programs(self.mesh, target, draft, config, self.max_length)
        return self._programs[config]

    def compile(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        chat: bool = False,
        batch_size: int = 1,
        bar: Bar = no_bar,
    ) -> Preparation:
        """Loads and compiles what generate() would use for these prompts, so that its times are times of decoding.

        Raises EasySpecError for any bad prompt, or if memory will not suffice, before any weight is read.
        """
        encoded = [self.encode(prompt, chat) for prompt in prompts]
        batches = batched(encoded, batch_size)
        tokens = max(len(ids) + self._limit(ids, sampling) for ids in encoded)
        self.check_memory(tokens, max(map(len, encoded)), batch_size, sampling)
        begun = time.perf_counter()
        jax.block_until_ready(jax.tree.leaves(self.load(bar)))
        loaded = time.perf_counter()
        programs = self.programs(sampling)
        growths = {self._growth(programs, batch, sampling) for batch in batches}
        wanted = [(programs.config, capacities, batch_size) for capacities in sorted(growths)]
        missing = [program for program in wanted if program not in self._compiled]
        if missing:
            with bar("Compiling", len(missing)) as advance:
                for _, capacities, rows in missing:
                    warm_up(programs, capacities, rows)
                    advance(1)
            self._compiled.update(missing)
        sizes = sorted(set().union(*growths))
        return Preparation(sizes, loaded - begun, time.perf_counter() - loaded)

    def _growth(
        self, programs: Programs, batch: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> tuple[int, ...]:
        """The sizes that the caches of a batch go through."""
        paths = [programs.capacities(len(ids), self._limit(ids, sampling)) for ids in batch]
        first, last = (max(path[place] for path in paths) for place in (0, -1))
        return tuple(size for size in sorted(set().union(*paths)) if first <= size <= last)

    def _complete(
        self,
        prompts: Sequence[tuple[Prompt, list[int]]],
        sampling: SamplingParams,
        batch_size: int,
        on_text: Callable[[str], None],
    ) -> Iterator[Completion]:
        """The completions of one batch; what it lacks in prompts are rows that are finished from the start."""
        programs = self.programs(sampling)
        rows = [self._row(prompt, ids, sampling) for prompt, ids in prompts]
        missing = batch_size - len(rows)
        encoded = [row.prompt_ids for row in rows] + [[0]] * missing
        limits = [row.limit for row in rows] + [0] * missing
        begun = time.perf_counter()
        for row in rows:
            row.begun = begun
        with closing(decode(programs, encoded, limits, sampling)) as reports:
            for report in reports:
                for place, row in enumerate(rows):
                    if not row.finished:
                        on_text(row.take(report, place))
                if all(row.finished for row in rows):
                    break
        on_text(rows[0].text.rest())
        yield from (self._completion(row) for row in rows)

    def row(self, prompt: Prompt, sampling: SamplingParams, *, chat: bool = False) -> Generation:
        """Prepare a prompt for complete_each(). Raises EasySpecError for a bad prompt."""
        return self._row(prompt, self.encode(prompt, chat), sampling)

    def complete_each(
        self, rows: Iterable[Generation], batch_size: int, *, checked: bool = False
    ) -> Iterator[tuple[int, Completion]]:
        """The number and the Completion of each row as it finishes; a finished one's place goes to the next at once.

        Rows are taken as places become free, so there may be any number of them. Each has its own sampling; one that
        needs other programs (greedy decoding, sampling, top-k or top-p) waits until all before it are done, so rows
        are best sorted by Engine.config. In float32 every text is what it is alone. checked: every row has passed
        check_memory.
        """
        if batch_size < 1:
            raise EasySpecError(f"--batch-size {batch_size} must be at least 1")
        for config, alike in itertools.groupby(
            enumerate(rows), lambda item: self.config(item[1].sampling)
        ):
            first = list(itertools.islice(alike, batch_size))
            if not checked:
                tokens = max(len(row.prompt_ids) + row.limit for _, row in first)
                prompt = max(len(row.prompt_ids) for _, row in first)
                self.check_memory(tokens, prompt, batch_size, first[0][1].sampling)
            programs = self.programs(first[0][1].sampling)
            assert programs.config == config
            capacity = max(
                programs.capacities(len(row.prompt_ids), row.limit)[0] for _, row in first
            )
            with closing(Batch(programs, batch_size, capacity)) as batch:
                yield from self._refilled(batch, itertools.chain(first, alike), batch_size)  # noqa: B031

    def _refilled(
        self, batch: Batch, waiting: Iterator[tuple[int, Generation]], batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        held: dict[int, tuple[int, Generation]] = {}
        while True:
            free = (place for place in range(batch_size) if place not in held)
            for place, item in zip(free, waiting, strict=False):
                held[place], row = item, item[1]
                row.begun = time.perf_counter()
                batch.enter(place, row.prompt_ids, row.limit, row.sampling)
            if not held:
                return
            for place, report, within in batch.step():
                number, row = held[place]
                row.take(report, within)
                if row.finished:
                    del held[place]
                    batch.leave(place)
                    yield number, self._completion(row)

    def config(self, sampling: SamplingParams) -> RoundConfig:
        """Static options of the programs for a way of sampling."""
        return RoundConfig.of(self.speculative, sampling, self.target.config.stop_ids)

    def _row(self, prompt: Prompt, ids: list[int], sampling: SamplingParams) -> Generation:
        levels = Stats(accepted_per_position=(0,) * self.config(sampling).levels)
        text = TextStream(self.tokenizer, sampling.stop, ids, self.target.config.stop_ids)
        return Generation(prompt, ids, text, levels, sampling, self._limit(ids, sampling))

    def _completion(self, row: Generation) -> Completion:
        directories = {Fault.TARGET: f"the target {self.target.directory}"}
        if self.draft is not None:
            directories[Fault.DRAFT] = f"the draft {self.draft.directory}"
        return row.completion(self.target.config.stop_ids, directories)

    def _limit(self, ids: Sequence[int], sampling: SamplingParams) -> int:
        return min(sampling.max_new_tokens, self.max_length - len(ids))

    def free_memory(self) -> int | None:
        """Bytes that the fullest device, or the machine of a CPU, still has; None if unknown."""
        return free_memory(self.mesh)

    def check_memory(
        self, tokens: int, prompt: int, rows: int, sampling: SamplingParams, free: int | None = None
    ) -> None:
        """Check that a batch would fit.

        Args:
            tokens: The longest text, prompt included.
            prompt: How many of them are the prompt.
            rows: Texts decoded together.
            sampling: How they are sampled.
            free: Bytes that there are, by default those that are free now.

        Raises:
            EasySpecError: It would not fit.
        """
        check_memory(
            self.workload(tokens, prompt, rows, sampling),
            self.free_memory() if free is None else free,
        )

    def workload(self, tokens: int, prompt: int, rows: int, sampling: SamplingParams) -> Workload:
        """Workload that check_memory is asked about: rows of up to `tokens` tokens, `prompt` of them the prompt."""
        return Workload(
            target=self.target.config,
            draft=self.draft and self.draft.config,
            layout=self.layout,
            refit=self.refit is not None,
            draft_axes=self._draft_axes,
            mesh=self.mesh,
            dtype=self.dtype,
            round=self.config(sampling),
            tokens=tokens,
            prompt=prompt,
            rows=rows,
            target_held=self._target is not None,
            draft_held=self._draft is not None,
            max_length=self.max_length,
        )

    def loader(self, checkpoint: Checkpoint, axes: Axes) -> Loader:
        """Loader of a checkpoint onto this mesh, its vocabulary aligned with that of the pair."""
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


def _seen_from(mesh: Mesh, array: jax.Array) -> jax.Array:
    """The same buffers as an array on a mesh of the same devices that is split otherwise."""
    sharding = NamedSharding(mesh, array.sharding.spec)  # pyright: ignore[reportAttributeAccessIssue]
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def _ignore(piece: str) -> None:
    """Discard streamed text."""
