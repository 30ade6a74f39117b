"""From prompts to text. `pair.open_model` makes an Engine."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import jax

from easyspec_jax.arithmetic import wrap_seed
from easyspec_jax.decode.loop import Batch
from easyspec_jax.decode.prefixes import (
    PrefixStore,
    Repeat,
    Spared,
    prefill_sizes,
    spared,
)
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import Fault
from easyspec_jax.decode.stats import Stats, TierStats
from easyspec_jax.decode.warming import Warmed
from easyspec_jax.engine.completion import (
    Completion,
    EncodedPrompt,
    Generation,
    batched,
    repeated,
)
from easyspec_jax.engine.models import Models
from easyspec_jax.engine.running import RunningBatch
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.sampling.adjustments import PLAIN, Kinds
from easyspec_jax.tokenizer import encode
from easyspec_jax.tokenizer.conversation import Prompt
from easyspec_jax.tokenizer.stream import TextStream


@dataclass(frozen=True)
class Preparation:
    """Result of `Engine.compile`.

    Attributes:
        capacities: Cache sizes, in tokens, that the programs were compiled for.
        load_seconds: Time spent on weights.
        compile_seconds: Time spent on programs.
    """

    capacities: list[int]
    load_seconds: float
    compile_seconds: float


@dataclass(eq=False, repr=False)
class Engine(Models):
    """Models that complete prompts; see `open_model`, which makes one."""

    _warmed: Warmed = field(default_factory=Warmed, init=False, repr=False)

    def prepare(
        self, prompts: Sequence[Prompt | EncodedPrompt], *, chat: bool = False
    ) -> list[EncodedPrompt]:
        """Encode prompts, so that compile() and generate() need not do it again.

        Args:
            prompts: Texts and conversations. Those that are encoded already stay as they are.
            chat: Put texts as a user's message.

        Raises:
            EasySpecError: A prompt is empty or too long, or `prompts` is not a list of prompts.
        """
        if isinstance(prompts, str):
            raise EasySpecError("give a list of prompts, not one string")
        if any(isinstance(prompt, Mapping) for prompt in prompts):
            raise EasySpecError("give a list of prompts; put one conversation into a list")
        rows = []
        for prompt in prompts:
            if isinstance(prompt, EncodedPrompt):
                self._check(prompt.ids)  # it may come from an engine with more room
                rows.append(prompt)
            else:
                rows.append(EncodedPrompt(prompt, self.encode(prompt, chat)))
        return rows

    def encode(self, prompt: Prompt, chat: bool = False) -> list[int]:
        """Return a prompt's token ids.

        Raises:
            EasySpecError: It is empty, leaves no room in max_length, or has an id that the target
                has no embedding for.
        """
        ids = encode(self.tokenizer, prompt, chat)
        self._check(ids)
        return ids

    def _check(self, ids: Sequence[int]) -> None:
        """Raise EasySpecError for ids that encode() would not return."""
        if len(ids) >= self.max_length:
            models = [self.target] if self.draft is None else [self.target, self.draft]
            most = min(model.config.longest_text for model in models)
            longer = f", or give a larger one, up to {most}" if most > self.max_length else ""
            raise EasySpecError(
                f"the prompt has {len(ids)} tokens, which leaves no room within `max_length` "
                f"{self.max_length} (by default what both models were made for); shorten "
                f"it{longer}"
            )
        if max(ids) >= self.target.config.vocab_size:
            raise EasySpecError(
                f"the tokenizer gives id {max(ids)}, for which the target has no embedding"
            )

    def row(
        self,
        prompt: Prompt | EncodedPrompt,
        sampling: SamplingParams,
        *,
        chat: bool = False,
        kinds: Kinds = PLAIN,
    ) -> Generation:
        """Return what complete_each() takes.

        Args:
            prompt: A text or a conversation, encoded or not.
            sampling: How to sample.
            chat: Put a text as a user's message.
            kinds: Options that its programs shall know besides its own. Rows that name those of
                their neighbours share programs, and so a batch.

        Raises:
            EasySpecError: The prompt is bad, or an id is none of the target's.
        """
        (encoded,) = self.prepare([prompt], chat=chat)
        return self._row(encoded, sampling, kinds)

    def _row(
        self, prompt: EncodedPrompt, sampling: SamplingParams, kinds: Kinds = PLAIN
    ) -> Generation:
        sampling = self.with_ids(sampling)
        config = self.config(sampling)
        tiers = (*config.tiers, config.levels) if config.tiers else ()
        stop_ids = sampling.end_ids(self.target.config.stop_ids)
        return Generation(
            prompt=prompt.prompt,
            prompt_ids=prompt.ids,
            text=TextStream(self.tokenizer, sampling.stop, prompt.ids, stop_ids),
            stats=Stats(
                accepted_per_position=(0,) * config.levels, tiers=tuple(map(TierStats, tiers))
            ),
            sampling=sampling,
            limit=self._limit(prompt.ids, sampling),
            stop_ids=stop_ids,
            kinds=kinds,
        )

    def _limit(self, ids: Sequence[int], sampling: SamplingParams) -> int:
        return min(sampling.max_new_tokens, self.max_length - len(ids))

    def compile(
        self,
        prompts: Sequence[Prompt | EncodedPrompt],
        sampling: SamplingParams,
        *,
        chat: bool = False,
        batch_size: int = 1,
        bar: Bar = no_bar,
    ) -> Preparation:
        """Load and compile what generate() would use, so that its times are times of decoding.

        Prompts that reuse each other's prefixes may still compile a chunk's size while generating.

        Args:
            prompts: As for generate(); those of prepare() are not encoded again.
            sampling: As for generate().
            chat: As for generate().
            batch_size: As for generate().
            bar: Shows the progress.

        Raises:
            EasySpecError: A prompt is bad, or memory will not suffice. No weight has been read.
        """
        rows = repeated(self.prepare(prompts, chat=chat), sampling.n)
        batches = batched([row.ids for row in rows], batch_size)
        tokens = max(len(row.ids) + self._limit(row.ids, sampling) for row in rows)
        self.check_memory(tokens, max(len(row.ids) for row in rows), batch_size, sampling)
        begun = time.perf_counter()
        jax.block_until_ready(jax.tree.leaves(self.load(bar)))
        loaded = time.perf_counter()
        programs = self.programs(sampling)
        # Batches whose caches go through the same sizes need the same programs, but for the chunks
        # of their prompts.
        wanted: dict[tuple[int, ...], set[int]] = {}
        for batch in batches:
            growth, rows = self._growth(programs, batch, sampling), dict(enumerate(batch))
            ways = [spared(programs, self.prefixes, rows, growth[0], batch_size)]
            is_one = all(ids == batch[0] for ids in batch)
            is_new = self.prefixes is None and self.store_for(len(batch[0])) is not None
            if is_one and batch_size % sampling.n and is_new:
                # The next batch finds the prompt of this one; see generate().
                end = programs.sizes.prefill_from(
                    len(batch[0]), len(batch[0]) - 1, growth[0], batch_size
                )
                ways += [Spared(end, {}, [Repeat((0,), end)])] if end else []
            for found in ways:
                sizes = prefill_sizes(programs, found, rows, growth[0], batch_size)
                wanted.setdefault(growth, set()).update(sizes.chunks)
                self._warmed.warm_sharing(programs, growth[0], sizes, batch_size)
        self._warmed.warm(programs, wanted, batch_size, bar)
        capacities = sorted(set().union(*wanted))
        return Preparation(capacities, loaded - begun, time.perf_counter() - loaded)

    def _growth(
        self, programs: Programs, batch: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> tuple[int, ...]:
        """Return the cache sizes that a batch goes through.

        The caches of all rows have one size. A batch of two rows whose own paths would be
        (256, 512) and (512, 1024) starts at 512 and ends at 1024.
        """
        paths = [programs.sizes.capacities(len(ids), self._limit(ids, sampling)) for ids in batch]
        first = max(path[0] for path in paths)
        last = max(path[-1] for path in paths)
        return tuple(size for size in sorted(set().union(*paths)) if first <= size <= last)

    def generate(
        self,
        prompts: Sequence[Prompt | EncodedPrompt],
        sampling: SamplingParams | None = None,
        *,
        chat: bool = False,
        batch_size: int = 1,
        on_text: Callable[[str], None] | None = None,
        bar: Bar = no_bar,
    ) -> Iterator[Completion]:
        """Complete prompts, in order, each as soon as its batch is done.

        Args:
            prompts: Texts, conversations, or rows of prepare().
            sampling: How tokens are chosen; greedily by default. Text j of prompt i draws its noise
                from seed + i * n + j.
            chat: Put texts as a user's message.
            batch_size: Prompts decoded together, which changes no text in float32.
            on_text: Called with each piece of text as it is made, one prompt at a time.
            bar: Shows the progress of reading long prompts.

        Returns:
            An iterator of `n` Completions per prompt, one after the other.

        Raises:
            EasySpecError: A prompt is bad, batch_size is less than 1, or on_text is given with a
                larger batch; nothing is generated. Memory is not checked, see compile().
        """
        if on_text is not None and batch_size > 1:
            raise EasySpecError(
                "texts of one batch cannot be streamed at once; leave out on_text or batch_size"
            )
        sampling = self.with_ids(sampling or SamplingParams())
        rows = repeated(self.prepare(prompts, chat=chat), sampling.n)
        batches = batched(rows, batch_size)
        # Within a batch, texts for one prompt share its prefill. Over several, they need a store.
        longest = max((len(row.ids) for row in rows), default=0)
        store = self.store_for(longest if batch_size % sampling.n else 0)
        return itertools.chain.from_iterable(
            self._complete(
                batch,
                # Text i draws from seed + i whatever the batch size, so batching changes no text.
                replace(sampling, seed=wrap_seed(sampling.seed + number * batch_size)),
                batch_size,
                on_text or _ignore,
                bar,
                store,
            )
            for number, batch in enumerate(batches)
        )

    def _complete(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingParams,
        batch_size: int,
        on_text: Callable[[str], None],
        bar: Bar,
        store: PrefixStore | None,
    ) -> list[Completion]:
        """Complete one batch. Rows that it lacks prompts for are finished from the start."""
        # Not a generator, which would keep the batch's caches alive for as long as a caller holds
        # it.
        programs = self.programs(sampling)
        rows = [self._row(prompt, sampling) for prompt in prompts]
        # Programs are compiled for a fixed number of rows. Those without a prompt get one token and
        # a limit of 0, so that they are done from the start.
        missing = batch_size - len(rows)
        encoded = [row.prompt_ids for row in rows] + [[0]] * missing
        limits = [row.limit for row in rows] + [0] * missing
        begun = time.perf_counter()
        for row in rows:
            row.begun = begun
        filled = Batch.filled(programs, encoded, limits, sampling, bar, store)
        with closing(filled) as running:
            for index, row in enumerate(rows):
                row.stats = replace(row.stats, cached_tokens=int(running.cached[index]))
            for report in running.reports():
                for index, row in enumerate(rows):
                    if row.finished:
                        continue
                    on_text(row.take(report, index, running.read_at[index]))
                    if row.finished and not report.done[index]:
                        running.stop(index)
                # Whatever the devices still add is dropped.
                if all(row.finished for row in rows):
                    break
        # Text is held back while it could be the beginning of a stop string.
        on_text(rows[0].text.rest())
        return [self.completion(row) for row in rows]

    def complete_each(
        self,
        rows: Iterable[Generation],
        batch_size: int,
        *,
        checked: bool = False,
        repeats: bool = False,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete rows as places become free: the place of a finished one goes to the next.

        Each row has its own sampling, and is one text whatever its `n`. One that needs other
        programs (see RoundConfig.of) waits until all before it are done, so rows are best sorted by
        config(). In float32 every text is what it would be alone.

        Args:
            rows: See row(). They are taken as places become free, so there may be any number.
            batch_size: Texts decoded together.
            checked: Every row has passed check_memory() already.
            repeats: Some rows that follow one another have the same prompt, which is then prefilled
                once.

        Returns:
            An iterator of the number and the Completion of each row, in the order they finish.

        Raises:
            EasySpecError: Memory does not suffice, or batch_size is less than 1.
        """
        if batch_size < 1:
            raise EasySpecError(f"`batch_size` {batch_size} must be at least 1")
        # groupby() takes rows one by one, so that an endless iterator of rows works too.
        for config, alike in itertools.groupby(
            enumerate(rows), lambda item: self.config(item[1].sampling, item[1].kinds)
        ):
            first = list(itertools.islice(alike, batch_size))
            sampling = first[0][1].sampling
            if not checked:
                tokens = max(len(row.prompt_ids) + row.limit for _, row in first)
                prompt = max(len(row.prompt_ids) for _, row in first)
                self.check_memory(tokens, prompt, batch_size, sampling)
            programs = self.programs(sampling, config.kinds)
            assert programs.config == config
            # Caches start at the size that the first texts need, and grow with later ones.
            capacity = max(
                programs.sizes.capacities(len(row.prompt_ids), row.limit)[0] for _, row in first
            )
            longest = max(len(row.prompt_ids) for _, row in first)
            store = self.store_for(longest if repeats else 0)
            free = Batch.empty(programs, batch_size, capacity, store)
            with closing(free) as batch:
                waiting = itertools.chain(first, alike)  # noqa: B031 (used up before the next group)
                yield from self._refilled(RunningBatch(batch, batch_size), waiting)

    def _refilled(
        self, running: RunningBatch[int], waiting: Iterator[tuple[int, Generation]]
    ) -> Iterator[tuple[int, Completion]]:
        while True:
            # Every free row gets a text before the next round, while there are any.
            for number, row in itertools.islice(waiting, running.free):
                running.enter(number, row)
            if not running:
                return
            for number, row in running.step():
                if row.finished:
                    yield number, self.completion(row)

    def completion(self, row: Generation) -> Completion:
        """Return what a row has become, finished or not; at least its prefill must have been."""
        directories = {Fault.TARGET: f"the target {self.target.directory}"}
        if self.draft is not None:
            directories[Fault.DRAFT] = f"the draft {self.draft.directory}"
        return row.completion(directories)


def _ignore(piece: str) -> None:
    """Discard streamed text."""
