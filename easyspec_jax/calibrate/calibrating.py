"""Round a model to int4 layer by layer, on the inputs that texts give it.

Texts go through the model as far as it is rounded. A layer is rounded site by site (see sites.py):
the sums over a site's inputs choose its integers, and then the texts go on to the next site through
the rounded matrices. So each matrix is rounded for the inputs that it will have.

One layer's weights are in memory at a time, and the hidden states lie on disk.
"""

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.calibrate.gptq import gptq
from easyspec_jax.calibrate.rounded_files import RoundedFiles, write_rounded
from easyspec_jax.calibrate.sites import SITES, Site, onward, square_sums
from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.quantized import Dequantized, Quantized, scale_name
from easyspec_jax.checkpoint.rounding import dequantize
from easyspec_jax.checkpoint.tensors import Held, Overlay, TensorSource
from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import flush
from easyspec_jax.model.batches import Batches, embedded
from easyspec_jax.model.device import run
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import Layer
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape, open_mesh
from easyspec_jax.progress import Bar, no_bar

TEXTS_A_BATCH = 8
"""Texts that go through a site together."""

_BATCHES = "streams"  # the name in calibrations that have begun before and may go on


def calibrate(
    source: TensorSource,
    config: ModelConfig,
    texts: Int[np.ndarray, "texts tokens"],
    group: int,
    directory: Path,
    bar: Bar = no_bar,
) -> TensorSource:
    """Round the matrices of a dense model's layers to int4.

    Results are kept in the directory. If a call is interrupted, the next one with the same
    arguments continues after the last whole layer.

    Args:
        source: The model's tensors.
        config: The model's.
        texts: Token ids, such as those that the model will read.
        group: The most columns that share a scale; see Quantized.
        directory: Where to keep it. It is created if it is missing.
        bar: Shows progress.

    Returns:
        The rounded matrices and their scales, by canonical name. Those that the source has as int4
        already are not among them.

    Raises:
        EasySpecError: A matrix or its inputs are not finite.
    """
    directory.mkdir(exist_ok=True)
    layers = range(config.num_hidden_layers)
    rounding = _Rounding(source, config, group, directory)
    done = next((layer for layer in layers if not rounding.path(layer).is_dir()), len(layers))
    with bar("Rounding", len(layers)) as advance:
        advance(done)
        if done == 0:
            rounding.begin(texts)
        for layer in layers[done:]:
            rounding.round_layer(layer)
            advance(1)
    return rounding.found()


@dataclass(frozen=True)
class _Rounding:
    """A model that is being rounded.

    Directory `layer-N` holds the rounded matrices of layer N and the hidden states after it. It
    gets this name once it is whole, and then the hidden states before it go.
    """

    source: TensorSource
    config: ModelConfig
    group: int
    directory: Path

    @cached_property
    def plain(self) -> TensorSource:
        """The model as it is, in floats."""
        return Dequantized(self.source)

    @cached_property
    def nearest(self) -> TensorSource:
        """The model as it would be rounded without calibration."""
        return Quantized(self.source, "int4", self.group)

    @cached_property
    def loader(self) -> Loader:
        mesh = open_mesh(MeshShape(1, 1))
        return Loader(
            source=self.plain,
            config=self.config,
            mesh=mesh,
            axes=ALL_AXES,
            dtype=np.dtype(np.float32),
            vocab_rows=padded_vocab_size(mesh, self.config),
            num_ids=self.config.vocab_size,
        )

    def path(self, layer: int) -> Path:
        return self.directory / f"layer-{layer}"

    def begin(self, texts: Int[np.ndarray, "texts tokens"]) -> None:
        """Write what the first layer is fed, from the embedding as it will be rounded."""
        batches = self._new_batches(self.path(-1))
        h = embedded(Dequantized(self.nearest), self.config, texts)
        for number in range(ceil_div(len(h), TEXTS_A_BATCH)):
            batches[number] = [h[number * TEXTS_A_BATCH :][:TEXTS_A_BATCH]]

    def round_layer(self, layer: int) -> None:
        """Round a layer's matrices, and take the hidden states past it."""
        batches = Batches(self.path(layer - 1) / _BATCHES)
        partial = self.directory / "partial"
        onto = self._new_batches(partial)
        module, held = self.loader.layer(layer), dict[str, np.ndarray]()
        for site in SITES:
            held |= self._round_site(layer, site, module, batches, partial)
            known = Overlay(self.plain, Held(held))
            module = replace(self.loader, source=known).layer(layer)
            for number, arrays in enumerate(batches):
                specs = (P(),) * site.arrays_onward
                onto[number] = run(self.loader, onward, module, arrays, specs, site)
            batches = onto
        flush(partial)
        partial.rename(self.path(layer))
        shutil.rmtree(self.path(layer - 1) / _BATCHES)

    def _round_site(
        self, layer: int, site: Site, module: Layer, batches: Batches, directory: Path
    ) -> dict[str, np.ndarray]:
        """Round the matrices of a site into files, and return what they stand for as floats."""
        every = (f"model.layers.{layer}.{part}.weight" for part in site.parts)
        names = list(filter(self._is_rounded, every))
        if not names:
            return {}
        hessian, held = self._hessian(site, module, batches), {}
        for name in names:
            weight = self.plain.read(name).astype(np.float32)
            # Rounded, a NaN would be an ordinary number.
            if not (np.isfinite(weight).all() and np.isfinite(hessian).all()):
                raise EasySpecError(
                    f"{name} or its inputs have values that are not finite; it cannot be rounded"
                )
            groups = self.nearest.shapes()[scale_name(name)][1]
            values, scale = gptq(weight, hessian, weight.shape[1] // groups)
            write_rounded(directory, name, values, scale)
            held[name] = dequantize(values, scale)
        return held

    def _hessian(self, site: Site, module: Layer, batches: Batches) -> np.ndarray:
        """Return Σ x xᵀ over a site's inputs in all batches, in float64."""
        hessian = np.zeros(())
        for arrays in batches:
            sums = run(self.loader, square_sums, module, arrays, P(), site)
            hessian = hessian + np.asarray(sums, np.float64)
        return hessian

    def _is_rounded(self, name: str) -> bool:
        return self.nearest.dtypes()[name] != self.source.dtypes()[name]

    def _new_batches(self, parent: Path) -> Batches:
        shutil.rmtree(parent, ignore_errors=True)
        (parent / _BATCHES).mkdir(parents=True)
        return Batches(parent / _BATCHES)

    def found(self) -> RoundedFiles:
        """Return everything that was rounded."""
        directories, sizes = {}, {}
        for layer in range(self.config.num_hidden_layers):
            for path in self.path(layer).glob("*.weight*"):
                directories[path.name] = path.parent
                sizes[path.name] = self.nearest.shapes()[path.name]
        return RoundedFiles(directories, sizes)
