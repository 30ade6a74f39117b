"""Choices that depend on the platform and that only measuring there can make."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class PlatformSettings:
    """Compiler options and kernels of a platform.

    Attributes:
        compiler_options: Options of XLA for the steps of decoding.
        fused_attention: Run the attentions of a group in fuzzy passes by fused kernels, where
            these support the shapes.
        fused_mlp: Compute the first half of each feed-forward part by one kernel, likewise.
        fused_groups: Multiply few tokens by quantized matrices with groups, or in stacks, by a
            kernel, likewise, so that neither sums of groups nor floats of a stack are written.
        pairs_tokens: Multiply a single token by quantized matrices as one of two, for a compiler
            that would copy each matrix for one.
        fills_tokens: Multiply 5 to 15 tokens in float32 as 8 or 16, for a compiler whose products
            of these numbers are the faster ones.
        split_keys_from: Cache entries from which an attention splits its keys among programs; None
            for never.
        sorts_by_expert: Send the tokens of a long pass only through the experts that they use,
            which takes less arithmetic and many more kernels.
        reads_parts: Let the length of the texts decide how large a part of a large cache is read,
            by a branch in each layer. The host of a GPU would have to wait for each.
        shortens_passes: Verify a draft model's nodes alone where lookups add none for any text, by
            a branch. The host of a GPU would have to wait for it, to save little: most of a pass
            over a few tokens is the reading of the weights.
    """

    compiler_options: Mapping[str, bool | int | str] = field(default_factory=dict, hash=False)
    fused_attention: bool = False
    fused_mlp: bool = False
    fused_groups: bool = False
    pairs_tokens: bool = False
    fills_tokens: bool = False
    split_keys_from: int | None = None
    sorts_by_expert: bool = False
    reads_parts: bool = False
    shortens_passes: bool = False


SETTINGS: dict[str, PlatformSettings] = {
    "cpu": PlatformSettings(
        fills_tokens=True, sorts_by_expert=True, reads_parts=True, shortens_passes=True
    ),
    "gpu": PlatformSettings(fused_groups=True),
    "tpu": PlatformSettings(pairs_tokens=True, reads_parts=True),
}
"""Settings of each platform.

All kernels agree with the plain path in Pallas' interpreter and compile for an H100, but their
speed was not measured on a GPU. Only `fused_groups` is on: by the text compiled for an H100, only
with it do products by matrices with groups write no sums of groups to memory. `pairs_tokens` is on
for TPUs by the text compiled for a v5e: libtpu 0.0.52 copies every quantized matrix before it
multiplies it by one token, and none for two.
"""


def settings_of(platform: str) -> PlatformSettings:
    """Return the settings of a platform, with everything off for one that is not in the table.

    Args:
        platform: As JAX names that of a device: "cpu", "gpu", "tpu".

    Examples:
        >>> settings_of("gpu").fused_attention
        False
    """
    return SETTINGS.get(platform, PlatformSettings())


def settings_for(device: Any) -> PlatformSettings:
    """Return the settings of a device's platform, without kernels where Triton knows no such GPU.

    Triton compiles for NVIDIA's GPUs from Ampere on.

    Args:
        device: A jax.Device, or anything with a platform.

    Examples:
        >>> from types import SimpleNamespace
        >>> of = lambda version: SimpleNamespace(platform="gpu", compute_capability=version)
        >>> settings_for(of("7.5")).fused_groups, settings_for(of("9.0")).fused_groups
        (False, True)
    """
    own = settings_of(device.platform)
    # AMD's are named otherwise ("gfx942"), and devices that are not there have no such field.
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    if not major.isdecimal() or int(major) >= 8:
        return own
    return replace(
        own, fused_attention=False, fused_mlp=False, fused_groups=False, split_keys_from=None
    )
