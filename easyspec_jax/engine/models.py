"""A pair of models on a mesh: weights read once, programs compiled once, memory checked first."""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from easyspec_jax.arithmetic import power_of_two
from easyspec_jax.checkpoint.directory import Checkpoint
from easyspec_jax.checkpoint.quantized import stored_integers, stored_weights
from easyspec_jax.checkpoint.tensors import TensorSource
from easyspec_jax.decode.prefixes import PrefixStore
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.sizes import CAPACITY_UNIT
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.layer_group import load_draft
from easyspec_jax.draft.refit_file import choose_layout
from easyspec_jax.engine.corpus import corpus_of
from easyspec_jax.engine.fits import check_memory, free_memory
from easyspec_jax.engine.needs import Workload, bytes_per_entry
from easyspec_jax.errors import EasySpecError
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.options import (
    KVDType,
    SamplingParams,
    SpeculativeConfig,
    Weights,
    check_prefix_cache,
)
from easyspec_jax.parallel import hosts
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape, connect
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.sampling.adjustments import PLAIN, Kinds
from easyspec_jax.sampling.grammar import Grammars
from easyspec_jax.tokenizer import bad_words_ids
from easyspec_jax.tokenizer.conversation import Tokenizer


@dataclass(eq=False, repr=False)
class Models:
    """A checked target and its draft on a mesh: their weights, programs and memory.

    Attributes:
        target: The model whose distribution the text has.
        draft: The model that drafts, or None.
        tokenizer: The target's.
        layout: Which layers of the draft run at once.
        refit: Projections fitted to that layout, or None.
        mesh: The devices.
        speculative: How rounds draft and verify.
        max_length: The most tokens of a text, its prompt included.
        dtype: Type to compute in.
        weights: Type of the target's matrices; None for that of the checkpoint if it is quantized,
            else `dtype`.
        draft_weights: Likewise of the draft's.
        kv_dtype: Type of the caches; "auto" is `dtype`.
        prefix_cache: Bytes that prefixes may take, on each device or of a CPU's memory; 0 keeps
            none.
        corpus: Tokens in which repeats are looked up besides the texts themselves, or None.
    """

    target: Checkpoint
    draft: Checkpoint | None
    tokenizer: Tokenizer
    layout: Layout
    refit: TensorSource | None
    mesh: Mesh
    speculative: SpeculativeConfig
    max_length: int
    dtype: str
    weights: Weights | None = None
    draft_weights: Weights | None = None
    kv_dtype: KVDType = "auto"
    prefix_cache: int = 0
    corpus: np.ndarray | None = None
    _target: Decoder | None = field(default=None, init=False, repr=False)
    _draft: Decoder | None = field(default=None, init=False, repr=False)
    _programs: dict[RoundConfig, Programs] = field(default_factory=dict, init=False, repr=False)
    _prefixes: PrefixStore | None = field(default=None, init=False, repr=False)

    def load(self, bar: Bar = no_bar) -> tuple[Decoder, Decoder | None]:
        """Return target and draft on the mesh; the first call reads them."""
        target = self._load_target(bar)
        if self._draft is None and self.draft is not None:
            with bar("Loading draft"):
                loader = self.loader(self.draft, self._draft_axes)
                self._draft = load_draft(loader, self.layout, self.refit)
        # Processes wait for each other here, because one disk may be much slower than another.
        hosts.meet()
        connect(self.mesh)
        return target, self._draft

    @property
    def _draft_axes(self) -> Axes:
        return ALL_AXES if self.speculative.draft_tensor_parallel_size == "all" else ()

    def _load_target(self, bar: Bar) -> Decoder:
        if self._target is None:
            loader = self.loader(self.target, ALL_AXES)
            layers = []
            with bar("Loading target", self.target.config.num_hidden_layers) as advance:
                for index in range(self.target.config.num_hidden_layers):
                    layers.append(loader.layer(index))
                    advance(1)
            self._target = loader.decoder(layers)
        return self._target

    def loader(self, checkpoint: Checkpoint, axes: Axes) -> Loader:
        """Return a Loader of a checkpoint onto this mesh.

        Both models of a pair get embeddings of the same number of rows, because one token's
        probabilities under both are compared shard by shard.
        """
        configs = [c.config for c in (self.target, self.draft) if c is not None]
        return Loader(
            source=checkpoint.source,
            config=checkpoint.config,
            mesh=self.mesh,
            axes=axes,
            dtype=np.dtype(self.dtype),
            vocab_rows=padded_vocab_size(self.mesh, *configs),
            # A draft may have more embedding rows than the target has ids; those get no
            # probability.
            num_ids=min(self.target.config.vocab_size, checkpoint.config.vocab_size),
            weights=self.draft_weights if checkpoint is self.draft else self.weights,
            kv_dtype=self.kv_dtype,
            tokens=None if checkpoint is self.draft else self._split_for,
        )

    @property
    def _split_for(self) -> int:
        """Tokens of the passes that the target's experts are split for."""
        # Texts of all kinds share the weights, also those that do not adapt by themselves.
        own = replace(self.speculative, adapt=self.speculative.always_adapts)
        return RoundConfig.of(own, SamplingParams(), ()).split_for

    def baseline(self) -> Self:
        """Return plain decoding of the same target on the same mesh. The weights are shared.

        It keeps no prefixes.
        """
        own = self.speculative
        plain = SpeculativeConfig(method="vanilla", verifier=own.chosen_verifier)
        if own.bit_stable:
            rows = own.num_speculative_tokens
            plain = replace(plain, bit_stable=True, num_speculative_tokens=rows)
        baseline = self.variant(plain)
        baseline.prefix_cache = 0  # memory is checked for one store
        return baseline

    def variant(
        self, speculative: SpeculativeConfig, shape: MeshShape | None = None, bar: Bar = no_bar
    ) -> Self:
        """Return the same pair on the same devices, decoded in another way.

        Weights that lie alike on the devices are shared; the target's always are. Prefixes are not.

        Args:
            speculative: The other way.
            shape: How to split the devices; by default as here.
            bar: Shows the target being read, if it has not been yet.

        Raises:
            EasySpecError: The draft cannot have these groups, or is missing; or prefixes are kept,
                which the other way forbids.
        """
        check_prefix_cache(self.prefix_cache, speculative)
        mesh = self.mesh
        if shape is not None:
            # The order of the devices stays, so that every shard of the target stays where it is.
            devices = mesh.devices.reshape(shape.layer, shape.tensor)
            mesh = Mesh(devices, ALL_AXES, axis_types=mesh.axis_types)
        draft, layout, refit = None, Layout.uniform(()), None
        if speculative.needs_draft:
            draft = checked_draft(speculative, self.draft)
            layout, refit = choose_layout(speculative, draft)
        target = self._load_target(bar)
        corpus = self.corpus
        if speculative.prompt_lookup_corpus != self.speculative.prompt_lookup_corpus:
            corpus = corpus_of(speculative, self.tokenizer, self.target.config.vocab_size)
        other = replace(
            self,
            draft=draft,
            layout=layout,
            refit=refit,
            mesh=mesh,
            speculative=speculative,
            corpus=corpus,
        )
        other._target = jax.tree.map(partial(_seen_from, mesh), target)
        # The draft can be shared only if the same layers lie together on the same devices.
        if mesh == self.mesh and speculative.weights_key == self.speculative.weights_key:
            other._draft = self._draft
        return other

    def draft_alone(self) -> Self:
        """Return the draft as a model of its own on the same mesh, with the pair's tokenizer.

        Its texts end where the target's or its own would. It reads its weights itself. An engine
        without a draft returns itself.
        """
        if self.draft is None:
            return self
        config = self.draft.config
        # dict.fromkeys() drops repeated ids and keeps their order.
        ends = dict.fromkeys((*config.stop_ids, *self.target.config.stop_ids))
        stop_ids = tuple(i for i in ends if i < config.vocab_size)
        return replace(
            self,
            target=replace(self.draft, config=replace(config, stop_ids=stop_ids)),
            draft=None,
            layout=Layout.uniform(()),
            refit=None,
            speculative=SpeculativeConfig(method="vanilla"),
            max_length=config.ordinary_length,
            weights=self.draft_weights,
        )

    def target_alone(self) -> Self:
        """Return the target as a model of its own on the same mesh.

        It shares the target's weights if they have been read. Otherwise it reads them itself, and
        they are freed with it.
        """
        speculative = SpeculativeConfig(method="vanilla")
        alone = replace(
            self, draft=None, layout=Layout.uniform(()), refit=None, speculative=speculative
        )
        alone._target = self._target
        return alone

    def config(self, sampling: SamplingParams, kinds: Kinds = PLAIN) -> RoundConfig:
        """Return the static options of the programs for a way of sampling.

        Args:
            sampling: How to sample.
            kinds: Options that the programs shall know as well, for other texts of a batch.

        Raises:
            EasySpecError: The sampling names an id that the target lacks.
        """
        sampling = self.with_ids(sampling)
        speculative = self.speculative
        if speculative.adapt == "auto" and not (self._rounds_alike or speculative.bit_stable):
            speculative = replace(speculative, adapt=False)
        own = RoundConfig.of(speculative, sampling, self.target.config.stop_ids)
        kinds = own.kinds | kinds
        return replace(
            own,
            kinds=kinds,
            grammars=self.grammars if kinds.grammar else None,
            keeps_windows=self.keeps_windows,
        )

    @property
    def _rounds_alike(self) -> bool:
        """Whether a pass over one token rounds as one over several does, or nearly so.

        Where it does not, rounds that are chosen by the clock make the text depend on it.
        """
        return self.dtype == "float32" and self.kv_dtype == "auto"

    @property
    def keeps_windows(self) -> bool:
        """Whether caches of sliding layers keep only what may still be read.

        Kept prefixes need all of a text, and bit-stable texts read it from its beginning.
        """
        slide = any(c is not None and c.config.has_windows for c in (self.target, self.draft))
        return slide and not self.prefix_cache and not self.speculative.bit_stable

    def with_ids(self, sampling: SamplingParams) -> SamplingParams:
        """Return a way of sampling with its bad words as ids, and no more tokens than a text has.

        Raises:
            EasySpecError: The sampling names an id that the target lacks, or its grammar cannot be
                used.
        """
        if sampling.bad_words:
            ids = (*sampling.bad_words_ids, *bad_words_ids(self.tokenizer, sampling.bad_words))
            sampling = replace(sampling, bad_words=(), bad_words_ids=ids)
        sampling.check_ids(self.target.config.vocab_size)
        if sampling.grammar is not None:
            self.grammars.check(sampling)
        sampling = sampling.limited(self.max_length)
        # A sequence longer than the text cannot be in it, but would enlarge the programs' arrays.
        most = sampling.max_new_tokens
        ids = tuple(word for word in sampling.bad_words_ids if len(word) <= most)
        return sampling if ids == sampling.bad_words_ids else replace(sampling, bad_words_ids=ids)

    @cached_property
    def grammars(self) -> Grammars:
        """Grammars of the target's vocabulary, which mask forbidden tokens."""
        config = self.target.config
        return Grammars(self.tokenizer, config.vocab_size, config.stop_ids)

    def programs(self, sampling: SamplingParams, kinds: Kinds = PLAIN) -> Programs:
        """Return the compiled steps for a kind of sampling; see config()."""
        config = self.config(sampling, kinds)
        # Temperature, top_k and so on are arguments of the programs. Only what changes the
        # computation itself (greedy or not, truncated or not) is in the RoundConfig.
        if config not in self._programs:
            target, draft = self.load()
            self._programs[config] = Programs(
                self.mesh, target, draft, config, self.max_length, self.corpus
            )
        return self._programs[config]

    @property
    def prefixes(self) -> PrefixStore | None:
        """The store of prefixes, or None if there is none."""
        if self.prefix_cache and self._prefixes is None:
            self._prefixes = PrefixStore(self.prefix_cache, self._entry_bytes)
        return self._prefixes if self.prefix_cache else None

    def store_for(self, prompt: int) -> PrefixStore | None:
        """Return the store of prefixes, or a new one for a single prompt if there is none.

        No new one is made where caches keep only a window, or texts are bit-stable.

        Args:
            prompt: Tokens of the longest prompt that several texts have; 0 if none has.
        """
        alone = self.speculative.bit_stable or self.keeps_windows
        if self.prefixes is not None or not prompt or alone:
            return self.prefixes
        size = power_of_two(max(prompt, CAPACITY_UNIT))
        return PrefixStore(self._entry_bytes * size, self._entry_bytes)

    @property
    def _entry_bytes(self) -> int:
        return bytes_per_entry(self.workload(2, 1, 1, SamplingParams()))

    def free_memory(self) -> int | None:
        """Return the free bytes of the fullest device, or of a CPU's machine; None if unknown."""
        return free_memory(self.mesh)

    def check_memory(
        self,
        tokens: int,
        prompt: int,
        rows: int,
        sampling: SamplingParams,
        free: int | None = None,
        kinds: Kinds = PLAIN,
    ) -> None:
        """Check that a batch would fit.

        Args:
            tokens: Length of the longest text, its prompt included.
            prompt: Length of its prompt.
            rows: Texts decoded together.
            sampling: How they are sampled.
            free: Bytes available; by default those that are free now.
            kinds: Options that the programs know besides those of the sampling.

        Raises:
            EasySpecError: It would not fit.
        """
        if free is None:
            free = self.free_memory()
            if free is not None and self._prefixes is not None:
                free += self._prefixes.bytes  # the workload counts the whole store
        check_memory(self.workload(tokens, prompt, rows, sampling, kinds), free)

    @property
    def kept_weights(self) -> str:
        """Types of the target's and the draft's matrices where they differ from `dtype`.

        For example "target int8, draft int4", or "" for neither.
        """
        kept = []
        for role, checkpoint, weights in (
            ("target", self.target, self.weights),
            ("draft", self.draft, self.draft_weights),
        ):
            if checkpoint is not None:
                dtype = weights or stored_weights(checkpoint.source)
                kept += [f"{role} {dtype}"] if dtype not in (None, self.dtype) else []
        return ", ".join(kept)

    def workload(
        self,
        tokens: int,
        prompt: int,
        rows: int,
        sampling: SamplingParams,
        kinds: Kinds = PLAIN,
    ) -> Workload:
        """Return the models and texts that check_memory() asks about; the arguments are its own."""
        return Workload(
            target=self.target.config,
            draft=self.draft and self.draft.config,
            layout=self.layout,
            refit=self.refit is not None,
            draft_axes=self._draft_axes,
            mesh=self.mesh,
            dtype=self.dtype,
            round=self.config(sampling, kinds),
            tokens=tokens,
            prompt=prompt,
            rows=rows,
            target_held=self._target is not None,
            draft_held=self._draft is not None,
            max_length=self.max_length,
            target_weights=self.weights,
            draft_weights=self.draft_weights,
            kv_dtype=self.kv_dtype,
            prefixes=self.prefix_cache,
            shares=sampling.n > 1 and not self.speculative.bit_stable,
            target_stored=stored_integers(self.target.source),
            draft_stored=() if self.draft is None else stored_integers(self.draft.source),
            split_for=self._split_for,
        )


def checked_draft(speculative: SpeculativeConfig, draft: Checkpoint | None) -> Checkpoint:
    """Return the draft. Raises EasySpecError if a method that drafts has none."""
    if draft is None:
        raise EasySpecError(
            f"`method` {speculative.method} needs `draft` DIR (or use `method` ngram or vanilla)"
        )
    return draft


def _seen_from(mesh: Mesh, array: jax.Array) -> jax.Array:
    """Return the same buffers as an array on a mesh that splits the same devices differently."""
    sharding = NamedSharding(mesh, array.sharding.spec)  # pyright: ignore[reportAttributeAccessIssue]
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)
