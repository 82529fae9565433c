"""What Prometheus can ask for: vLLM's names where they mean the same, strop's own where none does."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from strop.decode.stats import Stats

FIRST = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0)
WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The counters of one server."""

    def __init__(self, model: str, drafts: bool) -> None:
        """`model` is the name that clients use; counters of drafts exist where strop `drafts`."""
        self.registry, self.model = CollectorRegistry(), model
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens read.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens written.")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "From arrival.", FIRST)
        self.between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds", "From step to step of a text.", BETWEEN
        )
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self.ended = Counter(
            "vllm:request_success",
            "Sequences that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.rejected = Counter(
            "strop:requests_rejected",
            "Requests turned away, by reason.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self.drafts: tuple[Counter, Counter, Counter] | None = None
        if drafts:
            self.drafts = (
                self._counter("vllm:spec_decode_num_drafts", "Passes over drafted tokens."),
                self._counter("vllm:spec_decode_num_draft_tokens", "Drafted tokens that were verified."),
                self._counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted."),
            )

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        gauge = Gauge(name, about, ["model_name"], registry=self.registry)
        gauge.labels(self.model).set_function(value)

    def end(self, reason: str) -> None:
        """Count a sequence that ended: stop, length, abort or error."""
        self.ended.labels(self.model, reason).inc()

    def reject(self, reason: str) -> None:
        """Count a request that was turned away."""
        self.rejected.labels(self.model, reason).inc()

    def drafted(self, stats: Stats) -> None:
        """Add what drafts brought in one generation."""
        if self.drafts is None:
            return
        rounds, proposed, accepted = self.drafts
        rounds.inc(sum(count for nodes, count in stats.nodes.items() if nodes))
        proposed.inc(sum(nodes * count for nodes, count in stats.nodes.items()))
        accepted.inc(sum(tokens * count for tokens, count in stats.accepted.items()))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, ["model_name"], registry=self.registry).labels(self.model)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(name, about, ["model_name"], buckets=buckets, registry=self.registry)
        return family.labels(self.model)
