"""A real vLLM with tided in it: the backend contract, and what only vLLM has. One server for the module, started anew twice."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.conftest import Valkey
from tests.contract.peer import PATIENCE_S, Peer
from tests.contract.reference import Reference
from tests.contract.suite import BackendContract, RestartContract, assert_greedy, assert_whole, make_prompts
from tests.engines.server import configure
from tests.engines.vllm_server import VllmServer, make_models
from tests.support import eventually
from tided.model.engines import StepCounts
from tided.wire.control import SetSchedule

pytest_plugins = ("tests.contract.fixtures",)
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def subject(contract_redis: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    work = tmp_path_factory.mktemp("vllm")
    target, draft = make_models(work)
    server = VllmServer(configure("vllm", contract_redis.url, target, work / "s"), draft, work / "vllm.log")
    server.start()
    yield server
    if server.running:
        server.stop()


class TestVllm(BackendContract):
    pass


class TestOnlyVllm:
    async def test_it_serves_the_draft_that_it_was_started_with(self, subject: VllmServer, peer: Peer) -> None:
        from tided.draft import checkpoint

        assert (await peer.here()).version == checkpoint.version_of(subject.draft_dir)

    async def test_the_profile_was_measured_at_start(self, peer: Peer) -> None:
        profile = (await peer.here()).profile
        assert profile is not None
        assert profile.batches == (1, 2, 4)
        assert profile.idle_drafts == 0.0
        assert set(profile.tokens) == {batch * width for batch in (1, 2, 4) for width in (1, 2, 3, 4)}

    async def test_acceptance_equals_vllms_own(self, subject: VllmServer, peer: Peer, reference: Reference) -> None:
        """Every drafted and accepted token since the start, against the Prometheus counters."""
        assert (await peer.ask(SetSchedule((3, 2, 1, 3)))).ok
        for size in (1, 2, 3, 4):
            await subject.greedy_many(make_prompts(reference, size, 15, f"acceptance {size}"), 25)

        async def equal() -> bool:
            ours = await asyncio.to_thread(_counts, peer)
            drafted = sum(item.gamma * sum(item.accepted) for item in ours)
            accepted = sum(k * n for item in ours for k, n in enumerate(item.accepted))
            drafts = sum(sum(item.accepted) for item in ours if item.gamma)
            names = ("num_draft_tokens", "num_accepted_tokens", "num_drafts")
            theirs = [await subject.metric(f"vllm:spec_decode_{name}_total") for name in names]
            assert drafts > 0
            assert [drafted, accepted, drafts] == theirs
            return True

        await eventually(equal, PATIENCE_S)

    async def test_a_cached_prompt_has_no_rows_and_says_so(
        self, subject: VllmServer, peer: Peer, reference: Reference
    ) -> None:
        """Longer than a prefill chunk, so that it is computed in pieces at first."""
        await peer.capture()
        (prompt,) = make_prompts(reference, 1, 2 * subject.prefill_chunk + 20, "cached")
        outputs = [await subject.complete(prompt, 9) for _ in range(2)]
        whole, cached = await peer.ended(prompt, 2)
        assert min(whole.ids) == 0
        assert 0 < min(cached.ids) < len(prompt)
        for request, output in zip((whole, cached), outputs, strict=True):
            assert_whole(subject, request, prompt, output)

    async def test_a_schedule_changes_in_the_middle_of_a_request(
        self, subject: VllmServer, peer: Peer, reference: Reference
    ) -> None:
        """3, then 0 for so long that the draft's forward is left out, then 3 again: the answer and its rows stay whole."""
        await peer.capture()
        for prompt in make_prompts(reference, 20, 14, "in the middle"):
            seen = len(peer.observations())
            assert (await peer.ask(SetSchedule((3,)))).ok
            asked = asyncio.create_task(subject.complete(prompt, 230))
            for gamma in (0, 3):
                was = peer.totals.tapped
                await eventually(lambda n=was, a=asked: a.done() or peer.totals.tapped >= n + 25, PATIENCE_S)
                assert (await peer.ask(SetSchedule((gamma,)))).ok
            output = await asked
            assert_greedy(reference, prompt, output, subject)
            (request,) = await peer.ended(prompt)
            assert_whole(subject, request, prompt, output)
            gammas = {counts.gamma for report in peer.observations()[seen:] for counts in report.steps}
            if {0, 3} <= gammas:
                return
        raise AssertionError("every request ended before its schedule had changed")

    async def test_a_request_opts_out_in_its_body(self, subject: VllmServer, peer: Peer, reference: Reference) -> None:
        await peer.capture()
        private, public = make_prompts(reference, 2, 33, "in its body")
        await subject.complete(private, 5, more={"vllm_xargs": {"tide_no_capture": 1}})
        await subject.complete(public, 5)
        await peer.ended(public)
        assert peer.tapped(private) == []

    async def test_a_stop_token_of_the_request_ends_its_rows(
        self, subject: VllmServer, peer: Peer, reference: Reference
    ) -> None:
        assert (await peer.ask(SetSchedule((3,)))).ok
        await peer.capture()
        (prompt,) = make_prompts(reference, 1, 25, "stop token")
        answer = reference.greedy(prompt, 20)
        at = max(i for i, token in enumerate(answer) if token not in answer[:i])
        await subject.complete(prompt, 40, more={"stop_token_ids": [answer[at]]})
        (request,) = await peer.ended(prompt)
        assert request.finish == "stop"
        assert_whole(subject, request, prompt, answer[: at + 1])


class TestVllmRestart(RestartContract):
    pass


class TestVllmEnd:
    async def test_sigterm_sends_what_was_tapped_and_takes_the_heartbeat_away(
        self, subject: VllmServer, peer: Peer, reference: Reference
    ) -> None:
        await peer.capture()
        (prompt,) = make_prompts(reference, 1, 40, "end")
        output = await subject.complete(prompt, 7)
        await asyncio.to_thread(subject.stop)
        (request,) = await peer.ended(prompt)
        assert_whole(subject, request, prompt, output)
        totals = peer.headers[-1].totals
        assert totals.shed == 0
        assert totals.tapped == sum(
            header.rows for header in peer.headers if header.incarnation == peer.headers[-1].incarnation
        )
        assert peer.info() is None


def _counts(peer: Peer) -> list[StepCounts]:
    reports = peer.observations()
    return [counts for report in reports if report.incarnation == reports[-1].incarnation for counts in report.steps]
