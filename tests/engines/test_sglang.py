"""SGLang keeps the backend contract: real SGLang scheduler, worker and HTTP; stand-in CPU kernels (their speed means nothing)."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.contract.peer import PATIENCE_S, Peer
from tests.contract.reference import Reference
from tests.contract.suite import BackendContract, RestartContract, assert_greedy, assert_whole, make_prompts
from tests.control import variant
from tests.engines.server import configure
from tests.engines.sglang_server import SglangServer
from tests.support import eventually
from tests.tiny import make_draft, make_target
from tided.draft import checkpoint
from tided.wire.control import SetSchedule, Swap

pytest_plugins = ("tests.contract.fixtures",)
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def subject(contract_redis: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    work = tmp_path_factory.mktemp("sglang")
    target = make_target(work / "target")
    config = configure("sglang", contract_redis.url, target, work / "s")
    running = SglangServer(config, make_draft(target, work / "draft"), work / "sglang.log")
    running.start()
    try:
        yield running
        running.stop()
    finally:
        running.kill()


class TestSglang(BackendContract):
    """One server for all of it."""


class TestOnlySglang:
    async def test_a_swap_in_the_middle_of_requests_leaves_the_target_as_it_was(
        self, subject: SglangServer, peer: Peer, reference: Reference, tmp_path: Path
    ) -> None:
        """By SGLang's own checksums: the draft's changes, the target's does not."""
        assert (await peer.ask(SetSchedule((subject.config.engine.gamma_max,)))).ok
        other = variant(subject.draft_dir, tmp_path / "other", 9)
        before = {role: await self._checksum(subject, role) for role in ("target", "draft")}
        await peer.capture()
        prompts = make_prompts(reference, 6, 13, "mid-request")
        asked = [asyncio.create_task(subject.complete(prompt, 200)) for prompt in prompts]
        await eventually(lambda: any(peer.tapped(prompt) for prompt in prompts), PATIENCE_S)
        reply = await peer.ask(Swap(checkpoint.version_of(other), str(other)))
        assert reply.ok, reply.error
        for prompt, output in zip(prompts, await asyncio.gather(*asked), strict=True):
            assert len(output) == 200
            assert_greedy(reference, prompt, output, subject)
        assert await self._checksum(subject, "target") == before["target"]
        assert await self._checksum(subject, "draft") != before["draft"]
        assert (await peer.ask(Swap(checkpoint.version_of(subject.draft_dir), str(subject.draft_dir)))).ok
        assert await self._checksum(subject, "draft") == before["draft"]

    async def _checksum(self, subject: SglangServer, role: str) -> str:
        answer = await subject.post("/weights_checker", {"action": "checksum", "selector": role})
        assert answer["success"]
        checksum = answer["per_engine_checksum"]
        assert checksum
        return str(checksum)

    async def test_a_prompt_in_chunks_has_every_row(
        self, subject: SglangServer, peer: Peer, reference: Reference
    ) -> None:
        await peer.capture()
        (prompt,) = make_prompts(reference, 1, 3 * subject.prefill_chunk - 7, "chunks")
        output = await subject.complete(prompt, 8)
        (request,) = await peer.ended(prompt)
        assert min(request.ids) == 0
        assert_whole(subject, request, prompt, output)

    async def test_no_hook_has_failed(self, subject: SglangServer, peer: Peer) -> None:
        """After all the others; and whoever looks at /server_info sees that the hooks are in force."""
        (state,) = (await subject.get("/server_info")).json()["internal_states"]
        assert state["tided"]["engine"] == subject.engine
        assert state["tided"]["version"] == (await peer.here()).version
        assert state["tided"]["faults"] == {}


class TestSglangRestart(RestartContract):
    """After the others: it kills the server."""
