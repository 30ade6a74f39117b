"""Prometheus metrics under vLLM's names, so that its dashboards work, and some of our own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from easyspec_jax.decode.stats import TierStats
from easyspec_jax.engine.completion import Completion
from easyspec_jax.engine.serving import Progress, Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Metrics of one server, in a registry of its own."""

    def __init__(self, model: str, levels: int, scheduler: Scheduler) -> None:
        """Make the metrics.

        Args:
            model: The model's name, a label of all of them.
            levels: Levels of a round's draft.
            scheduler: Knows how many requests run and wait.
        """
        self._registry = CollectorRegistry()
        self._model = model
        self._gauge("num_requests_running", "Requests that have a row.", lambda: scheduler.running)
        self._gauge("num_requests_waiting", "Requests in the queue.", lambda: scheduler.waiting)
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._tokens = self._counter("generation_tokens", "Tokens generated.")
        self._ended = Counter(
            "vllm:request_success",
            "Finished requests.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._drafts = self._counter("spec_decode_num_drafts", "Rounds that drafted.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Positions drafted.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Positions accepted.")
        accepted_at = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Positions accepted, by position.",
            ["model_name", "position"],
            registry=self._registry,
        )
        self._accepted_at = [accepted_at.labels(model, str(level)) for level in range(levels)]
        by_tier = ["model_name", "num_speculative_tokens"]
        self._rounds = Counter(
            "easyspec:rounds",
            "Rounds of finished texts, by their levels; 0 for those without a draft model.",
            by_tier,
            registry=self._registry,
        )
        self._accepted_by_tier = Counter(
            "easyspec:accepted_tokens",
            "Positions that these rounds accepted.",
            by_tier,
            registry=self._registry,
        )
        self._looked_up = Counter(
            "easyspec:lookup_accepted_tokens",
            "Positions accepted in finished texts whose token was looked up.",
            ["model_name"],
            registry=self._registry,
        ).labels(model)
        self._first = self._histogram(
            "time_to_first_token_seconds", "Time to the first token, queueing included.", _SECONDS
        )
        self._between = self._histogram(
            "inter_token_latency_seconds",
            "Time of a round over its tokens, once for each token.",
            _SHORT,
        )
        self._total = self._histogram(
            "e2e_request_latency_seconds", "Time to the end of a text.", _SECONDS
        )

    def first(self, seconds: float) -> None:
        """Count a first token.

        Args:
            seconds: Time since the request came.
        """
        self._first.observe(seconds)
        self._tokens.inc()

    def round(self, progress: Progress, seconds: float) -> None:
        """Count a round.

        Args:
            progress: What it brought.
            seconds: Time since the text's report before this one.
        """
        pieces, drafted, accepted, _ = progress.gain
        self._tokens.inc(len(pieces))
        for _ in pieces:
            self._between.observe(seconds / len(pieces))
        if drafted:
            self._drafts.inc()
            self._drafted.inc(drafted)
            self._accepted.inc(accepted)
        for counter in self._accepted_at[:accepted]:
            counter.inc()

    def ended(self, completion: Completion, seconds: float) -> None:
        """Count a finished text.

        Args:
            completion: The text.
            seconds: Time since the request came.
        """
        self._prompt_tokens.inc(len(completion.prompt_ids))
        self._ended.labels(self._model, completion.finish_reason).inc()
        self._total.observe(seconds)
        stats = completion.stats
        levels = len(stats.accepted_per_position)
        for tier in stats.tiers or (TierStats(levels, stats.rounds, accepted=stats.accepted),):
            labels = self._model, str(tier.num_speculative_tokens)
            self._rounds.labels(*labels).inc(tier.rounds)
            self._accepted_by_tier.labels(*labels).inc(tier.accepted)
        self._looked_up.inc(stats.lookup_accepted)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str) -> Counter:
        counter = Counter(f"vllm:{name}", about, ["model_name"], registry=self._registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", about, ["model_name"], buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model)

    def _gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        gauge = Gauge(f"vllm:{name}", about, ["model_name"], registry=self._registry)
        gauge.labels(self._model).set_function(value)
