"""From two checkpoint directories to an Engine. Everything is checked before a weight is read."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from easyspec_jax import demo
from easyspec_jax.checkpoint.directory import Checkpoint, open_checkpoint
from easyspec_jax.checkpoint.quantized import check_narrower
from easyspec_jax.checkpoint.translated import translated
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.refit_file import choose_layout
from easyspec_jax.engine.corpus import corpus_of
from easyspec_jax.engine.engine import Engine
from easyspec_jax.engine.models import checked_draft
from easyspec_jax.engine.tuned_file import find, key_of
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import (
    DType,
    KVDType,
    Platform,
    SpeculativeConfig,
    Weights,
    check_choice,
    check_prefix_cache,
    check_weights,
    resolve_dtype,
)
from easyspec_jax.parallel.mesh import open_mesh, parse_mesh
from easyspec_jax.tokenizer import have_same_ids, load_tokenizer, translate
from easyspec_jax.tokenizer.conversation import Tokenizer, end_of_turn_ids


def open_model(
    target: str | Path | None = None,
    draft: str | Path | None = None,
    *,
    mesh: str = "1",
    platform: Platform | None = None,
    speculative: SpeculativeConfig | Literal["tuned"] | None = None,
    max_length: int | None = None,
    dtype: DType = "auto",
    weights: Weights | None = None,
    draft_weights: Weights | None = None,
    kv_dtype: KVDType = "auto",
    prefix_cache: int = 0,
    allow_links: bool = False,
) -> Engine:
    """Open and check a target and its draft.

    Weights are read later, by Engine.load or the first Engine.generate. A text ends at the ids that
    the target's configuration names, and at the end of a turn as its chat template writes it.

    Args:
        target: Checkpoint directory, as converted or as from Hugging Face. None opens the bundled
            demo pair, which runs on virtual CPU devices if there are too few accelerators.
        draft: Directory of a smaller model of the same family.
        mesh: Devices: "8" or "layer=4,tensor=2", as a string.
        platform: "cpu", "gpu" or "tpu"; by default the fastest one present.
        speculative: How to draft and verify; by default groups of four layers and chains of five
            tokens. "tuned" is the way that `easyspec_jax.tune` found fastest and stored.
        max_length: The most tokens of a text, its prompt included; by default as many as both
            models were made for. RoPE scalings that depend on the length of a text take this one.
        dtype: Type to compute in. "auto" is float32 on a CPU, otherwise the checkpoint's.
        weights: Type to keep the target's matrices in, the embedding and the head included: rounded
            to "int8" or "int4", or "bfloat16". None keeps the checkpoint's own if it is quantized,
            and otherwise `dtype`. The text is that of the rounded model.
        draft_weights: Likewise for the draft, which changes how fast a text comes but not the text.
        kv_dtype: Type that both models' caches are kept in. "auto" is the one that is computed in;
            "int8", with a scale per entry and head, takes about half the memory of 16 bits.
        prefix_cache: Bytes, on each device or of a CPU's memory, in which keys and values of
            earlier texts are kept. A prompt that begins like one of them prefills only the rest.
            0 keeps none.
        allow_links: Follow links that lead out of a checkpoint's directory.

    Raises:
        EasySpecError: Anything that would not work, in one line.

    Examples:
        >>> engine = open_model(platform="cpu")
        >>> from easyspec_jax import SamplingParams
        >>> next(engine.generate(["def add(a, b):"], SamplingParams(max_new_tokens=8))).text
        '\\n    \"\"\"Return a string of the'
    """
    if speculative == "tuned":
        return _open_tuned(
            target,
            draft,
            mesh=mesh,
            platform=platform,
            max_length=max_length,
            dtype=dtype,
            weights=weights,
            draft_weights=draft_weights,
            kv_dtype=kv_dtype,
            prefix_cache=prefix_cache,
            allow_links=allow_links,
        )
    if isinstance(speculative, str):
        raise EasySpecError(
            f"speculative must be a SpeculativeConfig or 'tuned', not {speculative!r}"
        )
    check_weights(weights, draft_weights)
    speculative = speculative or SpeculativeConfig()
    check_choice("kv_dtype", kv_dtype, get_args(KVDType))
    check_prefix_cache(prefix_cache, speculative)
    parse_mesh(mesh)  # before the checkpoints, which take longer
    # The bundled pair must run anywhere, so it may use virtual devices; see open_mesh().
    bundled = target is None
    if target is None:
        if draft is not None:
            raise EasySpecError("`draft` needs `target` DIR; leave both out for the bundled pair")
        target, draft = demo.TARGET, demo.DRAFT
    opened = open_checkpoint(target, allow_links=allow_links)
    check_narrower(opened.source, weights, str(target))
    tokenizer = load_tokenizer(opened.directory)
    opened = with_stop_ids(opened, end_of_turn_ids(tokenizer))
    second, layout, refit = None, Layout.uniform(()), None
    if speculative.needs_draft:
        given = None if draft is None else open_checkpoint(draft, allow_links=allow_links)
        second = checked_draft(speculative, given)
        check_narrower(second.source, draft_weights, str(draft), "draft_weights")
        second = _speaking(opened, second, tokenizer)
        layout, refit = choose_layout(speculative, second)
    corpus = corpus_of(speculative, tokenizer, opened.config.vocab_size)
    # As much as possible is checked before open_mesh(), which starts JAX.
    length = _checked_length(max_length, opened, second)
    opened, second = at_length(opened, length), second and at_length(second, length)
    devices = open_mesh(parse_mesh(mesh, group_size=layout.lp_size), platform, or_cpu=bundled)
    return Engine(
        target=opened,
        draft=second,
        tokenizer=tokenizer,
        layout=layout,
        refit=refit,
        mesh=devices,
        speculative=speculative,
        max_length=length,
        dtype=resolve_dtype(dtype, devices.devices.flat[0].platform, opened.config.dtype),
        weights=weights,
        draft_weights=draft_weights,
        kv_dtype=kv_dtype,
        prefix_cache=prefix_cache,
        corpus=corpus,
    )


def _open_tuned(
    target: str | Path | None, draft: str | Path | None, *, mesh: str, **options
) -> Engine:
    """Open a pair as it was tuned. Raises EasySpecError if it has not been, on this mesh."""
    ordinary = SpeculativeConfig(method="sd")
    pair = open_model(target, draft, mesh=mesh, speculative=ordinary, **options)
    assert pair.draft is not None
    # Choices are stored per device kind and type, which only an opened pair knows.
    choice = find(key_of(pair, mesh), pair.draft.directory)
    if choice is None:
        raise EasySpecError(
            "this pair has not been tuned on this mesh and machine; run easyspec_jax.tune first"
        )
    # Opening again costs little, because no weight has been read.
    return open_model(target, draft, mesh=choice.mesh, speculative=choice.speculative, **options)


def _checked_length(max_length: int | None, target: Checkpoint, draft: Checkpoint | None) -> int:
    """Return the most tokens of a text. Raises EasySpecError if a model has too few positions."""
    models = [target] if draft is None else [target, draft]
    if max_length is None:
        return min(model.config.ordinary_length for model in models)
    smallest = min(models, key=lambda model: model.config.longest_text)
    positions = smallest.config.longest_text
    if not 2 <= max_length <= positions:
        raise EasySpecError(
            f"`max_length` {max_length} must be from 2 to the {positions} positions of "
            f"{smallest.directory}"
        )
    return max_length


def _speaking(target: Checkpoint, draft: Checkpoint, tokenizer: Tokenizer) -> Checkpoint:
    """Return the draft with its target's ids. Raises EasySpecError if it lacks too many."""
    own = load_tokenizer(draft.directory)
    if have_same_ids(tokenizer, own):
        return draft
    found = translate(tokenizer, own, target.config.vocab_size, draft.config.vocab_size)
    return translated(draft, found.draft_ids, found.known)


def at_length(checkpoint: Checkpoint, tokens: int) -> Checkpoint:
    """Return the checkpoint for texts of up to some tokens, see `checkpoint.rope`."""
    return replace(checkpoint, config=checkpoint.config.at_length(tokens))


def with_stop_ids(checkpoint: Checkpoint, further: Iterable[int]) -> Checkpoint:
    """Return the checkpoint with further ids that end a text, if its embedding has them."""
    config = checkpoint.config
    added = [i for i in further if i not in config.stop_ids and i < config.vocab_size]
    if not added:
        return checkpoint
    return replace(checkpoint, config=replace(config, stop_ids=(*config.stop_ids, *added)))
