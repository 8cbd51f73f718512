"""tided.client: its examples run, nothing of it waits or raises, its async flavour calls back in the loop, digests need no numpy."""

import asyncio
import doctest
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tided.client
from tests.conftest import Valkey
from tests.contract.peer import Peer
from tests.proxy import proxied
from tests.support import eventually
from tests.tiny import make_draft, make_target
from tided.client import (
    AsyncProducer,
    DraftIdentity,
    LatencyProfile,
    Producer,
    Refused,
    Stack,
    Swapped,
    TargetInfo,
    Unavailable,
    identify,
)
from tided.draft import checkpoint
from tided.model.engines import Capability, EngineInfo
from tided.wire.control import MeasureProfile, SetCapture, SetSchedule, Swap

pytestmark = pytest.mark.real

TARGET = TargetInfo("ab" * 32, "tiny", 8, 4, 100, (2, 4, 5))
PROFILE = LatencyProfile((1, 8), (0.02, 0.03), (1,), (0.002,))


def stack(**more: Any) -> Stack:
    return Stack(engine="mine", target=TARGET, dtype="float32", max_batch=8, report_interval_s=0.05, **more)


def one_request(producer: Producer, name: str = "r", rows: int = 3) -> None:
    states = np.full((rows, 3, 4), 7, dtype=np.float32)
    producer.begin(name, [1, 2], temperature=0.7, cached_tokens=1)
    producer.record(name, 0, [1, 2], states[:2])
    for position in range(2, rows):
        gamma = producer.gamma(1)
        producer.step(gamma, {name: 0}, 0.01)
        producer.record_step([(name, position, 1)], [3], states[position : position + 1])
    producer.end(name, "length", output_tokens=rows - 1, tail=[9])


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    target = make_target(tmp_path_factory.mktemp("target"))
    half = make_draft(target, tmp_path_factory.mktemp("half"))
    return half, make_draft(target, tmp_path_factory.mktemp("third"), draft_vocab=32)


def test_the_examples_run(valkey: Valkey) -> None:
    outcome = doctest.testmod(tided.client, extraglobs={"REDIS_URL": valkey.url, "Path": Path})
    assert outcome.attempted >= 10
    assert outcome.failed == 0


async def test_what_a_stack_tells_arrives(valkey: Valkey) -> None:
    peer = Peer(valkey.client, "mine")
    with Producer(valkey.url, stack(gamma_max=2)) as producer:
        await peer.here()
        await peer.capture()
        assert producer.capturing
        assert (await peer.ask(SetSchedule((2, 1)))).ok
        assert [producer.gamma(batch) for batch in (0, 1, 2, 9)] == [2, 2, 1, 1]
        producer.queued(4)
        one_request(producer, rows=6)
        (request,) = await peer.ended([1, 2])
        await eventually(lambda: [item for report in peer.observations() for item in report.requests])
    assert request.tokens() == [1, 2, 3, 3, 3, 3, 9]
    assert {float(row.max()) for row in request.rows.values()} == {7.0}
    reports = peer.observations()
    (told,) = [item for report in reports for item in report.requests]
    assert (told.prompt_tokens, told.output_tokens, told.spec_steps, told.drafted, told.accepted) == (2, 5, 4, 8, 0)
    assert told.temperature == 0.7
    assert told.cached_tokens == 1
    steps = [counts for report in reports for counts in report.steps]
    assert {(counts.batch, counts.gamma) for counts in steps} == {(1, 2)}
    assert sum(counts.accepted[0] for counts in steps) == 4
    assert reports[-1].waiting == 4
    assert producer.errors == 0
    assert producer.totals.sent == 6
    assert peer.info() is None


async def test_without_redis_serving_goes_on_and_sheds(valkey: Valkey, tmp_path: Path) -> None:
    with proxied(tmp_path, valkey.url) as proxy:
        producer = Producer(proxy.url, stack(ring_slots=1))
        producer.start()
        peer = Peer(valkey.client, "mine")
        await peer.here()
        await peer.capture()
        proxy.mode = "refuse"
        proxy.cut()
        rows = 3 * producer.stack.ring_slots * 1_036_800 // 48
        producer.begin("big", [1])
        step = np.zeros((1000, 3, 4), dtype=np.float32)
        for position in range(0, rows, 1000):
            producer.record("big", position, [1] * 1000, step)
        assert producer.totals.shed > 0
        await eventually(lambda: producer.errors > 0)
        proxy.mode = "forward"
        await eventually(lambda: producer.totals.ring == 0)
        assert producer.close()
        totals = producer.totals
        assert totals.tapped == totals.sent + totals.shed


def test_wrong_calls_are_counted_and_never_raise(tmp_path: Path) -> None:
    producer = Producer(f"unix://{tmp_path / 'none.sock'}", stack(gamma_max=2))
    producer.step(2, {"r": 3}, 0.1)
    producer.step(2, {}, 0.1)
    producer.end("unknown", "stop", output_tokens=1)
    producer.record("unknown", 0, [1], b"")
    assert producer.errors == 2
    assert producer.totals.tapped == 0


@pytest.mark.parametrize("wrong", [{"gammas": (3,)}, {"gammas": ()}, {"engine": "Not A Name"}, {"dtype": "int8"}])
def test_a_stack_that_tided_would_not_take_is_refused_at_once(wrong: dict[str, Any]) -> None:
    described: dict[str, Any] = {"engine": "mine", "target": TARGET, "max_batch": 1, "gamma_max": 2, **wrong}
    with pytest.raises(Refused):
        Producer("redis://127.0.0.1:1", Stack(**described))


def swap(path: Path, draft: DraftIdentity) -> Swapped:
    return Swapped(draft, 0.01)


async def test_capabilities_follow_from_what_was_given(valkey: Valkey, tmp_path: Path) -> None:
    plain = Producer(valkey.url, stack())
    full = Producer(
        valkey.url,
        stack(gamma_max=1, last_hidden=True, swaps_vocabulary=True),
        on_swap=swap,
        on_profile=lambda: PROFILE,
        drafts_dir=tmp_path,
    )
    assert plain.capabilities == (Capability.TAP,)
    assert set(full.capabilities) == set(Capability)
    peer = Peer(valkey.client, "mine")
    with plain:
        await peer.here()
        for body in (SetSchedule((0,)), Swap("0" * 64, "/nowhere"), MeasureProfile()):
            assert not (await peer.ask(body)).ok


async def test_a_swap_is_checked_before_the_stack_is_asked(valkey: Valkey, drafts: tuple[Path, Path]) -> None:
    asked: list[Path] = []

    def swapping(path: Path, draft: DraftIdentity) -> Swapped:
        asked.append(path)
        return Swapped(draft, 0.01)

    half, third = drafts
    peer = Peer(valkey.client, "mine")
    with Producer(valkey.url, stack(draft=identify(half)), on_swap=swapping) as producer:
        await peer.here()
        assert not (await peer.ask(Swap("0" * 64, str(half)))).ok
        refused = await peer.ask(Swap(checkpoint.version_of(third), str(third)))
        assert "vocabulary" in refused.error
        assert asked == []
        reply = await peer.ask(Swap(checkpoint.version_of(half), str(half)))
        assert (reply.ok, reply.data) == (True, {"version": producer.version, "seconds": 0.01})
        assert asked == [half]


async def test_async_handlers_run_in_the_loop_between_its_tasks(valkey: Valkey, drafts: tuple[Path, Path]) -> None:
    threads: list[threading.Thread] = []
    fail = asyncio.Event()

    async def swapping(path: Path, draft: DraftIdentity) -> Swapped:
        threads.append(threading.current_thread())
        await asyncio.sleep(0)
        if fail.is_set():
            raise Refused("not now")
        return Swapped(draft, 0.5)

    async def measuring() -> LatencyProfile:
        raise Unavailable("serving")

    half, _ = drafts
    peer = Peer(valkey.client, "mine")
    body = Swap(checkpoint.version_of(half), str(half))
    async with AsyncProducer(valkey.url, stack(), on_swap=swapping, on_profile=measuring) as producer:
        await peer.here()
        await peer.capture()
        one_request(producer)
        assert (await peer.ask(body)).data["seconds"] == 0.5
        assert (await peer.here()).version == body.version
        fail.set()
        assert (await peer.ask(body)).error == "not now"
        assert (await peer.ask(MeasureProfile())).error == "serving"
    assert threads == [threading.main_thread()] * 2
    assert producer.totals.sent == 3
    assert peer.info() is None


async def test_closing_takes_a_cancellation_only_when_done(valkey: Valkey, tmp_path: Path) -> None:
    with proxied(tmp_path, valkey.url) as proxy:
        producer = AsyncProducer(proxy.url, stack())
        async with producer:
            peer = Peer(valkey.client, "mine")
            await peer.here()
            await peer.capture()
            proxy.mode = "refuse"
            proxy.cut()
            one_request(producer)
            started_s = time.monotonic()
            closing = asyncio.create_task(producer.aclose(0.3))
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            assert time.monotonic() - started_s >= 0.3
            await eventually(lambda: producer.totals.shed == 3)
            proxy.mode = "forward"


def test_identities_are_those_of_the_checked_checkpoint(drafts: tuple[Path, Path]) -> None:
    for draft in drafts:
        loaded = checkpoint.load(draft)
        assert identify(draft) == DraftIdentity(loaded.version, loaded.vocab_id)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"vocab_size": true}'),
        ("config.json", bytes(1 << 17)),
        ("model.safetensors", b""),
        ("model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", (37).to_bytes(8, "little") + b'{"d2t": {"data_offsets": [0, 99999]}}'),
        ("model.safetensors", None),
    ],
)
def test_what_is_no_checkpoint_has_no_identity(tmp_path: Path, file: str, content: bytes | None) -> None:
    (tmp_path / "config.json").write_bytes(b'{"vocab_size": 10}')
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(Refused):
        identify(tmp_path)


async def test_a_restart_needs_no_word(valkey: Valkey) -> None:
    """Capture is off for the next life until tided says otherwise."""
    peer = Peer(valkey.client, "mine")
    with Producer(valkey.url, stack()) as first:
        await peer.here()
        assert (await peer.ask(SetCapture(True, 1 << 20))).ok
        one_request(first)
    with Producer(valkey.url, stack()) as second:
        info: EngineInfo = await peer.here(not_incarnation=first.incarnation)
        assert info.incarnation == second.incarnation
        assert not info.capturing
        one_request(second)
        assert second.totals.tapped == 0
