"""The draft at work: EAGLE-3 passes over slots, with a KV cache of its own and features that wait.

Row i of a slot holds the embedding of token i + 1 and the feature fc(aux_i), and predicts token i + 2. Aux states of every
accepted row are kept, so that drafting may pause: a step with gamma 0 costs the draft nothing, and the next drafting step first
catches up with all rows that are pending. Passes 2..gamma write provisional rows beyond them, which true rows replace later.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from tided.draft.eagle3 import Eagle3
from tided.engine.embedded.sampling import Proposal, SamplingParams, draw
from tided.engine.embedded.target import Placement, SlotCache, Target, attend, place


@dataclass(frozen=True, slots=True)
class Context:
    """What the drafter must know of one running request. `tokens` is one longer than the rows with known states."""

    tokens: list[int]
    params: SamplingParams
    source: torch.Generator | None


class Drafter:
    """Drafts for the slots of a target. Not thread-safe: the step thread owns it."""

    def __init__(self, draft: Eagle3, target: Target) -> None:
        self._target = target
        self.draft = draft
        config = draft.config
        rows = target.cache.context
        self._cache = SlotCache(
            1, target.max_batch, rows, config.kv_heads, config.head_dim, target.dtype, target.device
        )
        self._groups = config.heads // config.kv_heads
        shape = (target.max_batch, rows, 3 * target.hidden)
        self._aux = torch.zeros(shape, dtype=target.dtype, device=target.device)
        self._done = [0] * target.max_batch  # rows of each slot that the draft has seen
        self._vocabulary = _vocabulary(draft)

    def exchange(self, draft: Eagle3) -> Eagle3:
        """Serve another draft of the same configuration from now on; gives the old one.

        Rows that the old weights computed stay in the cache: a request in flight drafts a little worse until it ends, which is
        cheaper than a pause to compute them again.
        """
        old, self.draft = self.draft, draft
        self._vocabulary = _vocabulary(draft)
        return old

    def reset(self, slot: int) -> None:
        """A new request begins in `slot`."""
        self._done[slot] = 0

    def move(self, source: int, destination: int, rows: int) -> None:
        """The request in `source`, of which `rows` rows are known, goes on in `destination`."""
        self._cache.move(source, destination, self._done[source])
        self._aux[destination, :rows] = self._aux[source, :rows]
        self._done[destination] = self._done[source]

    def feed(self, slot: int, position: int, aux: torch.Tensor) -> None:
        """Keep the aux states [rows, 3, hidden] of a slot's accepted rows, from `position` on. No draft arithmetic."""
        self._aux[slot, position : position + aux.shape[0]] = aux.flatten(1)

    @torch.inference_mode()
    def propose(self, requests: list[Context], gamma: int) -> tuple[list[list[int]], list[Proposal | None]]:
        """Draft gamma >= 1 tokens for the requests in slots 0, 1, ....

        Returns the tokens of each request, and for sampled requests the distributions behind them.
        """
        pre = self._catch_up(requests)
        starts = [len(request.tokens) - 1 for request in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        q: list[list[torch.Tensor]] = [[] for _ in requests]
        for step in range(gamma):
            logits = self.draft.logits(pre[:, -1])
            self._choose(requests, logits, tokens, q)
            if step == gamma - 1:
                break
            ids = torch.tensor([[drafted[-1]] for drafted in tokens], device=self._target.device)
            pre = self._forward(ids, pre, 0, [start + step for start in starts])
        proposals = [
            Proposal(drafted, torch.stack(rows), self._vocabulary) if rows else None
            for drafted, rows in zip(tokens, q, strict=True)
        ]
        return tokens, proposals

    def _choose(
        self, requests: list[Context], logits: torch.Tensor, tokens: list[list[int]], q: list[list[torch.Tensor]]
    ) -> None:
        best = self._vocabulary[logits.argmax(dim=-1)].tolist()
        for i, request in enumerate(requests):
            if request.source is None:
                tokens[i].append(best[i])
                continue
            probabilities = torch.softmax(logits[i].float() / request.params.temperature, dim=-1)
            q[i].append(probabilities)
            tokens[i].append(int(self._vocabulary[draw(probabilities, request.source)]))

    def _catch_up(self, requests: list[Context]) -> torch.Tensor:
        """Compute every pending row. Returns `pre` [b, 1, hidden] of each request's newest row."""
        known = [len(request.tokens) - 1 for request in requests]
        wide = self._target.gamma_max + 1
        for slot, request in enumerate(requests):
            # A long wait (a prompt, a pause of drafting) is computed alone, so that the others are not padded to it.
            if known[slot] - self._done[slot] > wide:
                self._rows(request, slot, self._done[slot], known[slot] - 1)
                self._done[slot] = known[slot] - 1
        counts = [rows - done for rows, done in zip(known, self._done, strict=False)]
        n = max(counts)
        starts = self._done[: len(requests)]
        # Shorter ones are padded behind their newest row; the padding is overwritten before anything attends to it.
        ids = torch.tensor(
            [(request.tokens[start + 1 :] + [0] * n)[:n] for request, start in zip(requests, starts, strict=True)],
            device=self._target.device,
        )
        aux = torch.stack([self._aux[slot, start : start + n] for slot, start in enumerate(starts)])
        pre = self._forward(ids, self.draft.fuse(aux), 0, starts)
        self._done[: len(requests)] = known
        newest = torch.tensor(counts, device=self._target.device) - 1
        return pre[torch.arange(len(requests), device=self._target.device), newest][:, None]

    def _rows(self, request: Context, slot: int, start: int, stop: int) -> None:
        ids = torch.tensor([request.tokens[start + 1 : stop + 1]], device=self._target.device)
        self._forward(ids, self.draft.fuse(self._aux[slot : slot + 1, start:stop]), slot, [start])

    def _forward(self, ids: torch.Tensor, features: torch.Tensor, first: int, starts: list[int]) -> torch.Tensor:
        """One pass over ids [b, n] with features [b, n, hidden] at positions starts[i] + j. Returns `pre` [b, n, hidden]."""
        at: Placement = place(self._cache, first, starts, ids.shape[1], self._groups, self._target.dtype)
        emb = functional.embedding(ids, self._target.embed.weight)
        q, k, v = self.draft.project(emb, features, at.positions)
        return self.draft.finish(features, attend(self._cache.data[0], q, torch.cat((k, v), dim=2), at))


def _vocabulary(draft: Eagle3) -> torch.Tensor:
    return torch.arange(draft.config.draft_vocab, device=draft.d2t.device) + draft.d2t
