"""What a server itself counted of speculation, from its Prometheus page: the same for an engine with tided in it and one without."""

from dataclasses import dataclass

import httpx

_VLLM = (
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
)


@dataclass(frozen=True)
class Drafted:
    """Request-steps that drafted, tokens drafted in them, and of these accepted."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def since(self, before: "Drafted") -> "Drafted":
        return Drafted(self.steps - before.steps, self.drafted - before.drafted, self.accepted - before.accepted)

    @property
    def length(self) -> float | None:
        """Acceptance length, bonus token included; None when nothing was drafted."""
        return 1 + self.accepted / self.steps if self.steps else None


async def drafted(http: httpx.AsyncClient) -> Drafted:
    """vLLM's or SGLang's counters since its start; zeros from a server that does not speculate.

    SGLang (--enable-metrics) counts verifications and generated tokens, of which each request's first came from its prompt; what it
    drafts it does not count. Its steps with nothing to draft are verifications too.
    """
    text = (await http.get("/metrics")).text
    verified = round(_sum(text, "sglang:spec_verify_calls_total"))
    if verified:
        generated = round(_sum(text, "sglang:generation_tokens_total") - _sum(text, "sglang:num_requests_total"))
        return Drafted(verified, 0, generated - verified)
    return Drafted(*(round(_sum(text, name)) for name in _VLLM))


def _sum(text: str, name: str) -> float:
    """Over all labels of one metric."""
    rows = (line for line in text.splitlines() if line.startswith((name + "{", name + " ")))
    return sum(float(line.rpartition(" ")[2]) for line in rows)
