"""From two checkpoint directories to an Engine: everything is checked before a weight is read."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from easyspec_jax import demo
from easyspec_jax.checkpoint.directory import Checkpoint, open_checkpoint
from easyspec_jax.draft.grouping import Layout
from easyspec_jax.draft.refit_file import choose_layout
from easyspec_jax.engine.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import DType, Platform, SpeculativeConfig, resolve_dtype
from easyspec_jax.parallel.mesh import open_mesh, parse_mesh
from easyspec_jax.tokenizer import check_same_ids, load_tokenizer
from easyspec_jax.tokenizer.conversation import end_of_turn_ids


def open_model(
    target: str | Path | None = None,
    draft: str | Path | None = None,
    *,
    mesh: str = "1",
    platform: Platform | None = None,
    speculative: SpeculativeConfig | None = None,
    max_length: int | None = None,
    dtype: DType = "auto",
    allow_links: bool = False,
) -> Engine:
    """Opens and checks a target and its draft; weights are read by Engine.load or the first Engine.generate.

    Without a target it is the bundled demo pair, which runs on virtual CPU devices where accelerators are too few.
    mesh: "8" or "layer=4,tensor=2". max_length: prompt and generated tokens together, by default what both models were
    made for. dtype "auto" is float32 on a CPU and otherwise the checkpoint's. allow_links: follow links that lead out
    of a checkpoint's directory. A text ends at the ids that the target's configuration names, and at the end of a turn
    as its chat template writes it. Raises EasySpecError for anything that would not work.
    """
    speculative = speculative or SpeculativeConfig()
    parse_mesh(mesh)  # a mistyped mesh should not wait for the checkpoints
    bundled = target is None
    if target is None:
        if draft is not None:
            raise EasySpecError("--draft needs --target DIR; leave both out for the bundled pair")
        target, draft = demo.TARGET, demo.DRAFT
    opened = open_checkpoint(target, allow_links=allow_links)
    tokenizer = load_tokenizer(opened.directory)
    opened = _with_stop_ids(opened, end_of_turn_ids(tokenizer))
    second, layout, refit = None, Layout.uniform(()), None
    if speculative.method != "vanilla":
        if draft is None:
            raise EasySpecError(
                f"--method {speculative.method} needs --draft DIR (or use --method vanilla)"
            )
        second = open_checkpoint(draft, allow_links=allow_links)
        check_same_ids(tokenizer, load_tokenizer(second.directory))
        layout, refit = choose_layout(speculative, second)
    smallest = min(
        (c for c in (opened, second) if c is not None),
        key=lambda c: c.config.max_position_embeddings,
    )
    positions = smallest.config.max_position_embeddings
    if max_length is not None and not 2 <= max_length <= positions:
        raise EasySpecError(
            f"--max-length {max_length} must be from 2 to the {positions} positions of {smallest.directory}"
        )
    shape = parse_mesh(mesh, group_size=layout.lp_size)
    devices = open_mesh(shape, platform, or_cpu=bundled)
    return Engine(
        target=opened,
        draft=second,
        tokenizer=tokenizer,
        layout=layout,
        refit=refit,
        mesh=devices,
        speculative=speculative,
        max_length=max_length or positions,
        dtype=resolve_dtype(dtype, devices.devices.flat[0].platform, opened.config.dtype),
    )


def _with_stop_ids(checkpoint: Checkpoint, further: Iterable[int]) -> Checkpoint:
    """The checkpoint with further ids that end a text, as far as its embedding has them."""
    known = checkpoint.config.stop_ids
    added = tuple(i for i in further if i not in known and i < checkpoint.config.vocab_size)
    return (
        replace(checkpoint, config=replace(checkpoint.config, stop_ids=(*known, *added)))
        if added
        else checkpoint
    )
