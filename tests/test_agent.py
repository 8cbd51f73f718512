"""The agent on a real server: heartbeat, commands under an epoch, replies, observations; nothing reaches the engine when Redis dies."""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.conftest import Valkey
from tests.dataplane import TARGET, settings
from tests.proxy import proxied
from tests.support import eventually
from tided.engine.agent import Counters, EngineAgent
from tided.engine.tap import Tap
from tided.model.engines import EngineInfo, Observation, RequestStats, StepCounts, TargetInfo
from tided.model.errors import Refused
from tided.wire import keys
from tided.wire.control import (
    Body,
    Command,
    MeasureProfile,
    Reply,
    SetCapture,
    SetSchedule,
    Swap,
    decode,
    encode_command,
)


class FakeEngine:
    """Counts what it is asked. `hold` makes apply wait; `fault` makes it fail."""

    def __init__(self) -> None:
        self.applied: list[Body] = []
        self.version = ""
        self.fault: Exception | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.observed = 0
        self._steps: tuple[StepCounts, ...] = ()
        self._lock = threading.Lock()

    def count(self, *steps: StepCounts) -> None:
        """What the next observation gives."""
        with self._lock:
            self._steps = steps

    def info(self) -> EngineInfo:
        return EngineInfo(
            engine="e1",
            incarnation="i-1",
            kind="fake",
            url="",
            target=TargetInfo(TARGET, "tiny", 4, 8, 100, (0, 1, 2)),
            version=self.version,
            vocab_id="",
            gamma_max=4,
            max_batch=8,
            capabilities=(),
            gammas=(0,),
            capturing=False,
            epoch=0,
        )

    def apply(self, body: Body) -> dict[str, Any]:
        self.hold.wait(120.0)
        if self.fault is not None:
            raise self.fault
        self.applied.append(body)
        if isinstance(body, Swap):
            self.version = body.version
        return {"version": self.version}

    def observe(self) -> Counters:
        with self._lock:
            self.observed += 1
            steps, self._steps = self._steps, ()
        requests = (RequestStats(5, 9, 3, 12, 6, "v"),) if steps else ()
        return Counters(steps, requests, running=1, waiting=0, version=self.version)


class Talk:
    """The other end: sends commands and reads what the agent writes."""

    def __init__(self, valkey: Valkey) -> None:
        self.client = valkey.client
        self.count = 0

    def send(self, body: Body, epoch: int = 1, *, expires_in_ms: int = 600_000, command: str = "") -> str:
        self.count += 1
        name = command or f"c{self.count}"
        now_ms = self.client.time()[0] * 1000
        data = encode_command(Command(name, epoch, now_ms + expires_in_ms, body))
        self.client.xadd(keys.commands("e1"), {"m": data})
        self.client.expire(keys.commands("e1"), 600)
        return name

    def replies(self) -> list[Reply]:
        return [decode(Reply, fields[b"m"]) for _, fields in cast("list[Any]", self.client.xrange(keys.replies("e1")))]

    async def reply(self, command: str) -> Reply:
        return (await eventually(lambda: [reply for reply in self.replies() if reply.command == command]))[0]

    def info(self) -> EngineInfo | None:
        data = cast("bytes | None", self.client.get(keys.info("e1")))
        return decode(EngineInfo, data) if data else None

    def observations(self) -> list[Observation]:
        found = cast("list[Any]", self.client.xrange(keys.observations("e1")))
        return [decode(Observation, fields[b"m"]) for _, fields in found]


@contextmanager
def running(url: str, engine: FakeEngine, tap: Tap | None = None) -> Generator[EngineAgent]:
    agent = EngineAgent(url, "e1", "i-1", engine, tap or Tap(settings()), report_interval_s=0.05)
    agent.start()
    try:
        yield agent
    finally:
        agent.close(60.0)


@pytest.fixture
async def talk(valkey: Valkey) -> Talk:
    return Talk(valkey)


async def test_the_heartbeat_is_there_and_ends_with_the_agent(valkey: Valkey, talk: Talk) -> None:
    with running(valkey.url, FakeEngine()):
        info = await eventually(talk.info)
        assert info.target.digest == TARGET
        assert 0 < valkey.client.ttl(keys.info("e1")) <= 10
    assert talk.info() is None


async def test_what_was_counted_last_is_reported_as_the_agent_ends(valkey: Valkey, talk: Talk) -> None:
    engine = FakeEngine()
    agent = EngineAgent(valkey.url, "e1", "i-1", engine, Tap(settings()), report_interval_s=60.0)
    agent.start()
    await eventually(talk.observations)
    counted = StepCounts(1, 2, 3, 0.5, (1, 1, 1))
    engine.count(counted)
    agent.close(60.0)
    assert [report.steps for report in talk.observations()] == [(), (counted,)]


async def test_a_command_is_applied_and_the_heartbeat_agrees_before_the_reply(valkey: Valkey, talk: Talk) -> None:
    engine = FakeEngine()
    with running(valkey.url, engine):
        await eventually(talk.info)
        for number in range(20):
            name = talk.send(Swap(f"v{number}", "/drafts/v"), epoch=7)
            reply = await talk.reply(name)
            info = talk.info()
            assert reply == Reply(name, 7, True, "", {"version": f"v{number}"})
            assert info is not None
            assert (info.version, info.epoch) == (f"v{number}", 7)


async def test_capture_goes_to_the_tap(valkey: Valkey, talk: Talk) -> None:
    tap, engine = Tap(settings()), FakeEngine()
    with running(valkey.url, engine, tap):
        await eventually(talk.info)
        assert (await talk.reply(talk.send(SetCapture(True, 12345)))).ok
        assert (tap.capturing, tap.credit_bytes) == (True, 12345)
        info = talk.info()
        assert info is not None
        assert info.capturing
        assert engine.applied == []


async def test_an_older_epoch_is_refused_and_changes_nothing(valkey: Valkey, talk: Talk) -> None:
    engine = FakeEngine()
    with running(valkey.url, engine) as agent:
        await eventually(talk.info)
        assert (await talk.reply(talk.send(SetSchedule((1,)), epoch=9))).ok
        stale = await talk.reply(talk.send(SetSchedule((4,)), epoch=8))
        assert not stale.ok
        assert stale.epoch == 9
        assert "epoch 8" in stale.error
        assert (await talk.reply(talk.send(SetSchedule((2,)), epoch=9))).ok
        assert engine.applied == [SetSchedule((1,)), SetSchedule((2,))]
        assert agent.epoch == 9


async def test_a_leader_that_was_superseded_before_a_restart_is_refused_after_it(valkey: Valkey, talk: Talk) -> None:
    valkey.client.xadd(keys.commands("e1"), {"m": b"no command"})
    talk.send(SetSchedule((1,)), epoch=9)
    engine = FakeEngine()
    with running(valkey.url, engine) as agent:
        info = await eventually(talk.info)
        assert info.epoch == agent.epoch == 9
        assert not (await talk.reply(talk.send(SetSchedule((4,)), epoch=8))).ok
        assert engine.applied == []


async def test_a_command_is_applied_at_most_once_and_answered_each_time(valkey: Valkey, talk: Talk) -> None:
    engine = FakeEngine()
    with running(valkey.url, engine):
        await eventually(talk.info)
        for _ in range(3):
            talk.send(SetSchedule((1,)), command="same")
        await eventually(lambda: len(talk.replies()) == 3)
        assert engine.applied == [SetSchedule((1,))]
        assert len({str(reply) for reply in talk.replies()}) == 1


async def test_an_expired_command_is_refused(valkey: Valkey, talk: Talk) -> None:
    engine = FakeEngine()
    with running(valkey.url, engine):
        await eventually(talk.info)
        reply = await talk.reply(talk.send(SetSchedule((1,)), expires_in_ms=-5000))
        assert not reply.ok
        assert "expired" in reply.error
        assert engine.applied == []


async def test_commands_from_before_the_start_are_not_applied(valkey: Valkey, talk: Talk) -> None:
    talk.send(SetSchedule((1,)))
    engine = FakeEngine()
    with running(valkey.url, engine):
        await eventually(talk.info)
        assert (await talk.reply(talk.send(SetSchedule((2,))))).ok
        assert engine.applied == [SetSchedule((2,))]


@pytest.mark.parametrize(
    ("fault", "words"), [(Refused("draft of another target"), "another target"), (KeyError("x"), "KeyError")]
)
async def test_a_failed_command_is_answered_and_the_next_one_works(
    valkey: Valkey, talk: Talk, fault: Exception, words: str
) -> None:
    engine = FakeEngine()
    with running(valkey.url, engine):
        await eventually(talk.info)
        engine.fault = fault
        reply = await talk.reply(talk.send(MeasureProfile()))
        assert not reply.ok
        assert words in reply.error
        engine.fault = None
        assert (await talk.reply(talk.send(MeasureProfile()))).ok


async def test_what_is_no_command_is_passed_over(valkey: Valkey, talk: Talk) -> None:
    with running(valkey.url, FakeEngine()) as agent:
        await eventually(talk.info)
        for noise in (b"", b"\xc1", b"\x81\xa1v\x02"):
            valkey.client.xadd(keys.commands("e1"), {"m": noise})
        valkey.client.xadd(keys.commands("e1"), {"other": b"1"})
        assert (await talk.reply(talk.send(MeasureProfile()))).ok
        assert agent.errors == 4


async def test_a_slow_command_does_not_silence_the_heartbeat(valkey: Valkey, talk: Talk) -> None:
    engine = FakeEngine()
    with running(valkey.url, engine):
        await eventually(talk.info)
        engine.hold.clear()
        name = talk.send(MeasureProfile())
        valkey.client.delete(keys.info("e1"))
        await eventually(talk.info)
        assert talk.replies() == []
        engine.hold.set()
        assert (await talk.reply(name)).ok


async def test_observations_carry_what_was_counted_since_the_last(
    valkey: Valkey, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tided.engine.agent.QUIET_REPORT_S", 3600.0)
    engine = FakeEngine()
    with running(valkey.url, engine):
        await eventually(lambda: len(talk.observations()) == 1)
        looked = engine.observed
        await eventually(lambda: engine.observed > looked + 3)
        assert len(talk.observations()) == 1  # nothing happened
        engine.count(StepCounts(1, 2, 3, 0.5, (1, 1, 1)))
        second = (await eventually(lambda: talk.observations()[1:]))[0]
        assert (second.seq, second.steps, len(second.requests)) == (2, (StepCounts(1, 2, 3, 0.5, (1, 1, 1)),), 1)


async def test_redis_may_die_and_come_back(valkey: Valkey, talk: Talk, tmp_path: Path) -> None:
    engine = FakeEngine()
    with proxied(tmp_path, valkey.url) as proxy, running(proxy.url, engine) as agent:
        await eventually(talk.info)
        proxy.mode = "refuse"
        proxy.cut()
        await eventually(lambda: agent.errors > 2)
        valkey.client.flushall()
        name = talk.send(MeasureProfile(), epoch=3)
        proxy.mode = "forward"
        assert (await talk.reply(name)).ok
        assert await eventually(talk.info)


async def test_without_redis_the_agent_starts_and_closes_at_once(tmp_path: Path) -> None:
    with running(f"unix://{tmp_path / 'none.sock'}", FakeEngine()) as agent:
        await eventually(lambda: agent.errors)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 30.0  # its threads ended by themselves, and were not given up
