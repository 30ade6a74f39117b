"""One of the processes of tests/parallel/test_hosts.py.

It decodes in several ways, and prints a line of JSON for each.
"""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.checkpoint import directory
from easyspec_jax.checkpoint.safetensors import SafetensorsSource
from easyspec_jax.checkpoint.tensors import Slices
from easyspec_jax.parallel.hosts import joined
from easyspec_jax.parallel.rendezvous import Peer

PROMPT = "Hello, I said hello"


def decode(model: str, way: dict[str, Any]) -> list[int]:
    """Return the token ids that a model as its own draft makes on four devices in one way.

    The second of two prompts begins with the first; how many of its tokens were cached comes last.
    """
    engine = open_model(
        model,
        model,
        mesh="layer=2,tensor=2",
        speculative=SpeculativeConfig(**way),
        dtype="float32",
        prefix_cache=1 << 20,
    )
    first, second = engine.generate(
        [PROMPT, f"{PROMPT}, all of you"],
        SamplingParams(temperature=1.0, seed=3, max_new_tokens=8),
    )
    return [*first.token_ids, *second.token_ids, second.stats.cached_tokens]


class CountingSource(SafetensorsSource):
    """A source that notes how many bytes each read returns."""

    sizes: ClassVar[list[int]] = []

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        out = super().read(name, window)
        self.sizes.append(out.nbytes)  # by several threads
        return out


if __name__ == "__main__":
    model, ways, cache, counts, coordinator, count, number = sys.argv[1:]
    jax.config.update("jax_compilation_cache_dir", cache)
    directory.SafetensorsSource = CountingSource
    with joined("worker", Peer(coordinator, int(count), int(number)), [model, ways]):
        for way in json.loads(ways):
            print(json.dumps(decode(model, way)), flush=True)
        Path(counts, number).write_text(str(sum(CountingSource.sizes)))
