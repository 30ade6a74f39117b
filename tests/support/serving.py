"""A scheduler of the bundled pair for tests of the engine and of the server."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from easyspec_jax import SpeculativeConfig, demo, open_model
from easyspec_jax.engine.serving import Scheduler

LENGTH = 250
"""Longest text: caches of 256 entries, so that servers in tests share what is compiled."""
ROWS, DEPTH, CACHE = 2, 3, 64 << 20


@contextmanager
def running_scheduler() -> Iterator[Scheduler]:
    """Run a scheduler that is ready, with plain decoding next to the pair."""
    # With the coupled verifier one seed is one text, with a draft and without.
    speculative = SpeculativeConfig(num_speculative_tokens=3, verifier="coupled")
    engine = open_model(
        platform="cpu", speculative=speculative, max_length=LENGTH, prefix_cache=CACHE
    )
    engine.tokenizer.chat_template = demo.CHAT_TEMPLATE
    scheduler = Scheduler(engine, rows=ROWS, depth=DEPTH, seconds=60, compare=True)
    scheduler.start()
    wait_until(lambda: scheduler.state != "loading", 280)
    assert scheduler.state == "ready", scheduler.failure
    yield scheduler
    scheduler.close(0)
    assert scheduler.join(30)


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
