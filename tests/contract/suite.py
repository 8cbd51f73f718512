"""The backend contract: what tided relies on, asked of a real engine through Redis and its own requests alone.

The tests of a class share one engine, in any order. Each makes its own prompts, so that no prefix of one is known from another.
"""

import asyncio
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.contract.peer import EPOCH, PATIENCE_S, Peer, Tapped
from tests.contract.reference import Reference
from tests.contract.subject import Subject
from tests.control import variant
from tests.support import eventually
from tided.draft import checkpoint
from tided.model.codec import from_plain
from tided.model.engines import Capability, EngineInfo, LatencyProfile, RequestStats
from tided.wire.control import Body, MeasureProfile, SetSchedule, Swap

SPECIAL = 3
"""Token ids below are special in tests/tiny.py."""
TIE = 2e-3
"""Logits as close as this may be chosen either way."""
CONTROL_RATIO = 10.0
"""A neighbouring layer is at least so many times further from the tapped one than the right layer."""


def make_prompts(reference: Reference, count: int, length: int, seed: str) -> list[list[int]]:
    """Random prompts that no other seed gives."""
    draw = random.Random(seed)
    return [[draw.randrange(SPECIAL, reference.info.vocab) for _ in range(length)] for _ in range(count)]


def relative(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative L2 error of each row: [rows, states]."""
    return np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)


def assert_greedy(reference: Reference, prompt: Sequence[int], output: Sequence[int], subject: Subject) -> None:
    """Every token is the reference's choice but for ties, which a coarser dtype has more of."""
    gap = reference.worst_choice(prompt, output)
    assert gap <= max(TIE, 10 * subject.tolerance), f"a token lies {gap} logits behind the reference's choice"


def assert_whole(subject: Subject, request: Tapped, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Rows and tail are the request's tokens, without a gap but for a cached head of the prompt, and without a token too many."""
    first = min(request.ids)
    assert first == 0 or (subject.prefix_cache and first < len(prompt)), f"the first row is at {first}"
    assert request.prompt_tokens == len(prompt)
    assert request.tokens() == [*prompt, *output][first:]
    assert len(request.tail) == 1, "all tokens but the newest have states"


class BackendContract:
    """Everything that one living engine can show."""

    # --- probe ---

    async def test_the_heartbeat_is_complete(self, subject: Subject, peer: Peer, reference: Reference) -> None:
        info = await peer.here()
        loaded = checkpoint.load(subject.draft_dir)
        assert (info.engine, info.kind) == (subject.engine, subject.kind)
        assert info.target == reference.info
        assert info.vocab_id == loaded.vocab_id
        assert len(info.version) == 64
        assert info.max_batch >= 1
        assert info.gammas
        assert all(0 <= gamma <= info.gamma_max for gamma in info.gammas)
        assert info.pid > 0
        assert peer.client.ttl(f"tided:{{{subject.engine}}}:info") > 0

    async def test_it_declares_what_it_can_and_no_more(self, subject: Subject, peer: Peer) -> None:
        assert frozenset((await peer.here()).capabilities) == subject.capabilities

    # --- reports ---

    async def test_reports_count_requests_and_steps(self, subject: Subject, peer: Peer, reference: Reference) -> None:
        (prompt,) = make_prompts(reference, 1, 23, "reports")
        seen = len(peer.observations())
        output = await subject.complete(prompt, 19)
        assert_greedy(reference, prompt, output, subject)

        def check() -> bool:
            reports = peer.observations()[seen:]
            finished = [item for report in reports for item in report.requests if item.prompt_tokens == len(prompt)]
            return [item.output_tokens for item in finished] == [len(output)]

        await eventually(check, PATIENCE_S)
        for report in peer.observations():
            for counts in report.steps:
                assert len(counts.accepted) == counts.gamma + 1
                assert sum(counts.accepted) == counts.steps * counts.batch
        numbers = [
            report.seq for report in peer.observations() if report.incarnation == peer.observations()[-1].incarnation
        ]
        assert numbers == sorted(set(numbers))

    # --- tap ---

    async def test_the_tap_equals_the_reference(self, subject: Subject, peer: Peer, reference: Reference) -> None:
        await peer.capture()
        info = await peer.here()
        prompts = make_prompts(reference, 5, 31, "tap")
        outputs = [await subject.complete(prompts[0], 24)]
        outputs += await asyncio.gather(*[subject.complete(prompt, 24) for prompt in prompts[1:]])
        has_last = Capability.LAST_HIDDEN in subject.capabilities
        for prompt, output in zip(prompts, outputs, strict=True):
            assert_greedy(reference, prompt, output, subject)
            (request,) = await peer.ended(prompt)
            assert_whole(subject, request, prompt, output)
            self._assert_states(request, [*prompt, *output], info, reference, has_last, subject.tolerance)
        assert {header.has_last for header in peer.headers} == {has_last}

    def _assert_states(
        self, request: Tapped, tokens: list[int], info: EngineInfo, reference: Reference, last: bool, tolerance: float
    ) -> None:
        positions = sorted(request.rows)
        got = np.stack([request.rows[position] for position in positions])
        layers = info.target.aux_layers
        want = reference.states(tokens, layers, last=last)[positions]
        assert got.shape == want.shape
        error = relative(got, want)
        assert float(error.max()) <= tolerance
        shifted = reference.states(tokens, [layer + 1 for layer in layers], last=False)[positions]
        wrong = relative(got[:, : len(layers)], shifted)
        assert float(np.median(wrong)) >= CONTROL_RATIO * float(np.median(error)), "a wrong layer would pass unseen"

    async def test_positions_have_no_gap_or_say_so(self, subject: Subject, peer: Peer, reference: Reference) -> None:
        """The same prompt again, and one that begins like it: what a cache served has no rows, and the positions say it."""
        await peer.capture()
        (prompt,) = make_prompts(reference, 1, 60, "again")
        longer = [*prompt, *make_prompts(reference, 1, 9, "longer")[0]]
        outputs = [await subject.complete(tokens, 12) for tokens in (prompt, prompt, longer)]
        assert_greedy(reference, prompt, outputs[1], subject)
        first, second = await peer.ended(prompt, 2)
        (third,) = await peer.ended(longer)
        for request, tokens, output in zip((first, second, third), (prompt, prompt, longer), outputs, strict=True):
            assert_whole(subject, request, tokens, output)
        info = await peer.here()
        has_last = Capability.LAST_HIDDEN in subject.capabilities
        self._assert_states(third, [*longer, *outputs[2]], info, reference, has_last, subject.tolerance)

    async def test_a_request_that_is_given_up_ends_as_aborted(
        self, subject: Subject, peer: Peer, reference: Reference
    ) -> None:
        """So many that the last cannot be over when the first are seen; then every client hangs up."""
        await peer.capture()
        length = 16
        prompts = make_prompts(reference, 24, length, "abort")
        clients = [asyncio.create_task(subject.complete(prompt, subject.context - length - 8)) for prompt in prompts]
        await eventually(lambda: any(peer.tapped(prompt) for prompt in prompts), PATIENCE_S)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

        def check() -> list[tuple[list[int], Tapped]] | None:
            found = [(prompt, request) for prompt in prompts for request in peer.tapped(prompt)]
            over = all(request.finish for _, request in found)
            return found if over and any(request.finish == "abort" for _, request in found) else None

        for prompt, request in await eventually(check, PATIENCE_S):
            assert request.finish in ("abort", "length")
            assert request.prompt_tokens == length
            if request.ids:
                first = min(request.ids)
                assert sorted(request.ids) == list(range(first, first + len(request.ids)))
                output = request.tokens()[max(length - first, 0) :]
                if output:
                    assert_greedy(reference, prompt, output, subject)
        assert_greedy(reference, prompts[0], await subject.complete(prompts[0], 6), subject)

    async def test_nothing_is_tapped_beyond_a_stop_token(
        self, subject: Subject, peer: Peer, reference: Reference
    ) -> None:
        await peer.capture()
        prompt, want = self._stopping(reference)
        output = await subject.complete(prompt, 40, ignore_eos=False)
        assert output in (want, want[:-1])  # engines differ in whether they give the stop token
        (request,) = await peer.ended(prompt)
        assert request.finish == "stop"
        assert_whole(subject, request, prompt, want)

    def _stopping(self, reference: Reference) -> tuple[list[int], list[int]]:
        """A prompt whose greedy answer stops by itself within a few tokens, and that answer with its stop token."""
        assert reference.eos
        for prompt in make_prompts(reference, 400, 12, "stop"):
            answer = reference.greedy(prompt, 40)
            at = next((i for i, token in enumerate(answer) if token in reference.eos), 0)
            if at >= 3:
                return prompt, answer[: at + 1]
        raise AssertionError("this target never stops by itself; choose another for the contract")

    async def test_a_request_that_opts_out_is_not_tapped(
        self, subject: Subject, peer: Peer, reference: Reference
    ) -> None:
        await peer.capture()
        private, public = make_prompts(reference, 2, 27, "private")
        before = peer.totals.skipped
        outputs = await asyncio.gather(subject.complete(private, 14, private=True), subject.complete(public, 14))
        await peer.ended(public)
        await eventually(lambda: peer.totals.skipped - before == len(private) + len(outputs[0]) - 1, PATIENCE_S)
        assert peer.tapped(private) == []

    async def test_capture_can_be_switched_off(self, subject: Subject, peer: Peer, reference: Reference) -> None:
        await peer.capture(False)
        assert (await peer.here()).capturing is False
        off, on = make_prompts(reference, 2, 21, "off")
        await subject.complete(off, 8)
        await peer.capture(True)
        assert (await peer.here()).capturing is True
        await subject.complete(on, 8)
        await peer.ended(on)
        assert peer.tapped(off) == []

    # --- schedule ---

    async def test_a_schedule_is_acknowledged_once_it_is_in_force(
        self, subject: Subject, peer: Peer, reference: Reference
    ) -> None:
        if Capability.SCHEDULE not in subject.capabilities:
            await self._assert_refused(peer, SetSchedule((0,)))
            return
        most = (await peer.here()).gamma_max
        for round_, gammas in enumerate([(most,), (0,), (most, 0)]):
            reply = await peer.ask(SetSchedule(gammas))
            assert reply.ok, reply.error
            info = await peer.here()
            shown = [info.gammas[min(batch, len(info.gammas)) - 1] for batch in (1, 2)]
            assert shown == [gammas[0], gammas[-1]]
            length = 70 + round_
            (prompt,) = make_prompts(reference, 1, length, f"schedule {round_}")
            output = await subject.complete(prompt, 16)
            assert_greedy(reference, prompt, output, subject)
            stats = await eventually(lambda n=length: self._finished(peer, n), PATIENCE_S)
            assert (stats.spec_steps > 0) == (gammas[0] > 0)
            # The last steps of a request may draft fewer: there is no room for more tokens.
            assert max(gammas[0] - 1, 0) * stats.spec_steps <= stats.drafted <= gammas[0] * stats.spec_steps
            assert stats.accepted <= stats.drafted
            assert (1, gammas[0]) in {(counts.batch, counts.gamma) for r in peer.observations() for counts in r.steps}
        await self._assert_refused(peer, SetSchedule((most + 1,)))
        await self._assert_refused(peer, SetSchedule(()))

    async def test_a_report_tells_the_temperature(self, subject: Subject, peer: Peer, reference: Reference) -> None:
        for round_, temperature in enumerate(subject.temperatures):
            length = 80 + round_
            (prompt,) = make_prompts(reference, 1, length, f"temperature {round_}")
            await subject.complete(prompt, 8, temperature=temperature)
            stats = await eventually(lambda n=length: self._finished(peer, n), PATIENCE_S)
            assert stats.temperature == temperature

    def _finished(self, peer: Peer, prompt_tokens: int) -> RequestStats | None:
        """What was reported of the newest request of so many prompt tokens."""
        reported = [item for report in peer.observations() for item in report.requests]
        return next((item for item in reversed(reported) if item.prompt_tokens == prompt_tokens), None)

    async def _assert_refused(self, peer: Peer, body: Body) -> None:
        """The reply says no, and the heartbeat says what it said before."""
        before = await peer.here()
        reply = await peer.ask(body)
        assert not reply.ok
        assert reply.error
        after = await peer.here()
        assert (after.version, after.vocab_id, after.gammas) == (before.version, before.vocab_id, before.gammas)

    # --- commands ---

    async def test_stale_and_doubled_commands_change_nothing(self, subject: Subject, peer: Peer) -> None:
        body = SetSchedule((await peer.here()).gammas)
        refused = await peer.ask(body, epoch=1)
        assert not refused.ok
        assert refused.epoch > 1
        expired = await peer.ask(body, expires_in_ms=-1)
        assert not expired.ok
        command = peer.send(body)
        first = (await eventually(lambda: peer.replies(command), PATIENCE_S))[0]
        peer.send(body, command=command)
        again = await eventually(lambda: peer.replies(command)[1:], PATIENCE_S)
        assert again == [first]

    # --- swap ---

    async def test_a_swap_is_read_back(
        self, subject: Subject, peer: Peer, reference: Reference, tmp_path: Path
    ) -> None:
        other = variant(subject.draft_dir, tmp_path / "other", 3)
        version = checkpoint.version_of(other)
        if Capability.SWAP not in subject.capabilities:
            await self._assert_refused(peer, Swap(version, str(other)))
            return
        (prompt,) = make_prompts(reference, 1, 18, "swap")
        before = await subject.complete(prompt, 20)
        await self._swap(peer, other)
        after = await subject.complete(prompt, 20)
        assert_greedy(reference, prompt, before, subject)
        assert_greedy(reference, prompt, after, subject)
        await self._swap(peer, subject.draft_dir)

    async def _swap(self, peer: Peer, draft: Path) -> None:
        """Swap, and check the reply and the heartbeat that was written before it."""
        loaded = checkpoint.load(draft)
        reply = await peer.ask(Swap(loaded.version, str(draft)))
        assert reply.ok, reply.error
        assert reply.data["version"] == loaded.version
        assert reply.data["seconds"] >= 0
        info = await peer.here()
        assert (info.version, info.vocab_id) == (loaded.version, loaded.vocab_id)

    async def test_a_draft_that_is_sent_over_redis_is_served_where_declared(
        self, subject: Subject, peer: Peer, reference: Reference, tmp_path: Path
    ) -> None:
        if Capability.FETCH not in subject.capabilities:
            pytest.skip("it does not declare fetch")
        sent = variant(subject.draft_dir, tmp_path / "sent", 11)
        version = checkpoint.version_of(sent)
        reply = await peer.deliver(sent)
        assert reply.ok, reply.error
        assert reply.data["version"] == (await peer.here()).version == version
        shutil.rmtree(sent)
        (prompt,) = make_prompts(reference, 1, 19, "sent over Redis")
        assert_greedy(reference, prompt, await subject.complete(prompt, 12), subject)
        await self._swap(peer, subject.draft_dir)

    async def test_swaps_under_load_disturb_no_request(
        self, subject: Subject, peer: Peer, reference: Reference, tmp_path: Path
    ) -> None:
        if Capability.SWAP not in subject.capabilities:
            pytest.skip("it does not declare swap")
        if Capability.SCHEDULE in subject.capabilities:
            assert (await peer.ask(SetSchedule(((await peer.here()).gamma_max,)))).ok
        drafts = [variant(subject.draft_dir, tmp_path / "one", 1), subject.draft_dir]
        done: list[tuple[list[int], list[int]]] = []
        stop = asyncio.Event()

        async def client(number: int) -> None:
            for prompt in make_prompts(reference, 10_000, 11 + number, f"load {number}"):
                done.append((prompt, await subject.complete(prompt, 30)))
                if stop.is_set():
                    return

        clients = [asyncio.create_task(client(number)) for number in range(3)]
        try:
            for turn in range(6):
                await self._swap(peer, drafts[turn % 2])
                served = len(done)
                await eventually(lambda n=served: len(done) > n or any(task.done() for task in clients), PATIENCE_S)
        finally:
            stop.set()
            await asyncio.gather(*clients)
        assert len(done) >= 6
        for prompt, output in done:
            assert len(output) == 30
            assert_greedy(reference, prompt, output, subject)

    async def test_a_swap_that_fails_leaves_the_draft_that_serves(
        self, subject: Subject, peer: Peer, reference: Reference, tmp_path: Path
    ) -> None:
        if Capability.SWAP not in subject.capabilities:
            pytest.skip("it does not declare swap")
        good = variant(subject.draft_dir, tmp_path / "good", 5)
        version = checkpoint.version_of(good)
        cut = Path(shutil.copytree(good, tmp_path / "cut"))
        weights = cut / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-64])
        for wrong in (
            Swap(version, str(tmp_path / "nowhere")),
            Swap("0" * 64, str(good)),
            Swap(version, str(subject.draft_dir)),
            Swap(checkpoint.version_of(cut), str(cut)),
        ):
            await self._assert_refused(peer, wrong)
        (prompt,) = make_prompts(reference, 1, 17, "after a failed swap")
        assert_greedy(reference, prompt, await subject.complete(prompt, 12), subject)

    async def test_another_vocabulary_is_swapped_only_where_declared(
        self, subject: Subject, peer: Peer, tmp_path: Path
    ) -> None:
        if Capability.SWAP not in subject.capabilities:
            pytest.skip("it does not declare swap")
        other = _other_vocabulary(subject.draft_dir, tmp_path / "vocabulary")
        if Capability.SWAP_VOCABULARY in subject.capabilities:
            await self._swap(peer, other)
            await self._swap(peer, subject.draft_dir)
        else:
            await self._assert_refused(peer, Swap(checkpoint.version_of(other), str(other)))

    # --- profile ---

    async def test_a_profile_is_measured_where_declared(self, subject: Subject, peer: Peer) -> None:
        if Capability.PROFILE not in subject.capabilities:
            await self._assert_refused(peer, MeasureProfile())
            return
        reply = await peer.ask(MeasureProfile())
        assert reply.ok, reply.error
        profile = from_plain(LatencyProfile, reply.data.get("profile", reply.data))
        assert list(profile.tokens) == sorted(set(profile.tokens))
        assert list(profile.batches) == sorted(set(profile.batches))
        assert len(profile.tokens) == len(profile.target_s) >= 1
        assert len(profile.batches) == len(profile.draft_s) >= 1
        assert min(profile.target_s + profile.draft_s) > 0


class RestartContract:
    """Death and return: boots the engine twice."""

    async def test_it_dies_and_returns_as_a_new_incarnation(
        self, subject: Subject, peer: Peer, reference: Reference
    ) -> None:
        await peer.capture()
        before = await peer.here()
        old, new = make_prompts(reference, 2, 19, "restart")
        output = await subject.complete(old, 10)
        (request,) = await peer.ended(old)
        assert_whole(subject, request, old, output)
        subject.kill()
        # What was said to the one that died is not meant for the next.
        missed = peer.send(SetSchedule((0,)))
        await asyncio.to_thread(subject.start)
        after = await peer.here(not_incarnation=before.incarnation)
        assert (after.engine, after.kind, after.target) == (before.engine, before.kind, before.target)
        assert after.capturing is False
        # That of the newest command, though it is not obeyed: a leader before that one is refused.
        assert after.epoch == EPOCH
        await subject.complete(new, 4)
        assert peer.tapped(new) == []
        await peer.capture()
        output = await subject.complete(new, 10)
        (request,) = await peer.ended(new)
        assert_whole(subject, request, new, output)
        assert peer.replies(missed) == []
        assert {header.incarnation for header in peer.headers} == {before.incarnation, after.incarnation}
        assert min(header.seq for header in peer.headers if header.incarnation == after.incarnation) == 0


def _other_vocabulary(draft: Path, to: Path) -> Path:
    """The same draft for another choice of target tokens."""
    loaded = checkpoint.load(draft)
    ids = checkpoint.target_ids(loaded.tensors["d2t"])
    assert len(ids) < loaded.config.vocab, "a draft whose vocabulary is the target's has no other"
    left_out = min(set(range(loaded.config.vocab)) - set(ids.tolist()))
    ids[-1] = left_out
    ids.sort()
    known = np.zeros(loaded.config.vocab, dtype=loaded.tensors["t2d"].dtype)
    known[ids] = True
    tensors = loaded.tensors | {"d2t": ids - np.arange(len(ids), dtype=np.int64), "t2d": known}
    checkpoint.write(to, loaded.config, tensors)
    return to
