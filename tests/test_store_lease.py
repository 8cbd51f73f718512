"""The leader's lease: against a real Valkey, and on a virtual clock with every delay, stop and clock jump that matters."""

import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Valkey
from tests.support import eventually
from tided.model.engines import TapTotals
from tided.model.errors import Superseded, Unavailable
from tided.model.policy import PolicySetting, SpeculationMode
from tided.store import lease as lease_module
from tided.store.client import connect, redis_time_ms
from tided.store.lease import LeaderLease
from tided.store.state import StateStore
from tided.wire import keys


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Any]:
    async with connect(valkey.url) as client:
        yield client


@pytest.mark.real
async def test_one_leads_at_a_time_and_epochs_grow(redis: Any, valkey: Valkey) -> None:
    one, two = LeaderLease(redis, "one", 300), LeaderLease(redis, "two", 300)
    first = await one.acquire()
    assert first is not None
    assert await two.acquire() is None
    assert (one.epoch, two.epoch, two.remaining_s()) == (first, None, 0.0)
    assert 0 < one.remaining_s() <= 270  # a tenth of the lease is kept back
    await one.release()
    assert one.epoch is None
    second = await two.acquire()
    assert second is not None
    assert second > first
    assert not await one.renew()
    assert await two.renew()
    await one.release()
    assert valkey.client.exists(keys.lease())


@pytest.mark.real
async def test_the_epoch_survives_the_loss_of_all_data(redis: Any, valkey: Valkey) -> None:
    lease = LeaderLease(redis, "one", 300)
    first = await lease.acquire()
    assert first is not None
    valkey.client.flushall()
    assert not await lease.renew()
    again = await lease.acquire(highest_engine_epoch=first + 1_000_000_000)
    assert again == first + 1_000_000_001
    valkey.client.flushall()
    assert await lease.acquire() >= await redis_time_ms(redis) - 60_000  # type: ignore[operator]


@pytest.mark.real
async def test_a_lost_acknowledgement_of_acquire_does_not_lock_the_holder_out(redis: Any) -> None:
    lease = LeaderLease(redis, "one", 300)
    first = await lease.acquire()
    second = await lease.acquire()
    assert first is not None
    assert second is not None
    assert second > first


@pytest.mark.real
async def test_another_takes_over_when_the_holder_falls_silent(redis: Any) -> None:
    one, two = LeaderLease(redis, "one", 0.2), LeaderLease(redis, "two", 300)
    await one.acquire()
    epoch = await eventually(two.acquire)
    assert one.epoch is None
    assert not await one.renew()
    assert two.epoch == epoch


@pytest.mark.real
async def test_state_is_written_under_the_newest_epoch_only(redis: Any, valkey: Valkey) -> None:
    store = StateStore(redis)
    valkey.client.set(keys.epoch(), 10)
    await store.put("totals", "engine-a", TapTotals(tapped=5), epoch=10)
    await store.put_policy(PolicySetting(SpeculationMode.FIXED, 3), epoch=11)
    for call in (
        store.put("totals", "engine-a", TapTotals(tapped=6), epoch=9),
        store.delete("totals", "engine-a", epoch=9),
        store.put_policy(PolicySetting(), epoch=9),
    ):
        with pytest.raises(Superseded, match="stop leading"):
            await call
    assert await store.get(TapTotals, "totals", "engine-a") == TapTotals(tapped=5)
    assert await store.policy() == PolicySetting(SpeculationMode.FIXED, 3)
    await store.delete("totals", "engine-a", epoch=10)
    assert await store.get(TapTotals, "totals", "engine-a") is None


@pytest.mark.real
async def test_without_a_setting_the_policy_is_automatic(redis: Any) -> None:
    assert await StateStore(redis).policy() == PolicySetting(SpeculationMode.AUTO)


async def test_an_unreachable_server_is_unavailable_and_the_lease_counts_down(tmp_path: Any) -> None:
    async with connect(f"unix://{tmp_path}/none.sock") as client:
        lease = LeaderLease(client, "one", 30)
        with pytest.raises(Unavailable):
            await lease.acquire()
        assert lease.epoch is None


# --- virtual time ---


class World:
    """True time, a server that expires by it, and holders with clocks that may be stopped, but never run backwards."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.owner: str | None = None
        self.expires_s = 0.0
        self.epoch = 0
        self.delays_s: list[float] = []
        self.lost_reply = False

    def _travel(self) -> None:
        self.now_s += self.delays_s.pop(0) if self.delays_s else 0.0

    def _reply(self) -> None:
        self._travel()
        if self.lost_reply:
            raise Unavailable("the reply was lost")

    async def acquire(self, redis: Any, holder: str, ttl_ms: int, highest: int) -> int | None:
        self._travel()
        taken = None
        if self.owner in (None, holder) or self.now_s >= self.expires_s:
            self.owner, self.expires_s, self.epoch = holder, self.now_s + ttl_ms / 1000, self.epoch + 1
            taken = self.epoch
        self._reply()
        return taken

    async def renew(self, redis: Any, holder: str, ttl_ms: int, epoch: int) -> bool:
        self._travel()
        kept = self.owner == holder and self.now_s < self.expires_s and self.epoch == epoch
        if kept:
            self.expires_s = self.now_s + ttl_ms / 1000
        self._reply()
        return kept


Steps = st.lists(
    st.tuples(
        st.integers(0, 1),  # which holder
        st.booleans(),  # renew or acquire
        st.lists(
            st.sampled_from([0.0, 0.01, 0.5, 3.0, 9.0, 60.0]), min_size=2, max_size=2
        ),  # request's and reply's way
        st.booleans(),  # the reply is lost
        st.sampled_from([0.0, 0.1, 1.0, 4.0, 8.9, 9.1, 30.0]),  # time until the next step: idle, SIGSTOP or suspended
    ),
    max_size=40,
)


@given(steps=Steps)
async def test_whoever_believes_that_he_leads_does(steps: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world = World()
        patch.setattr(lease_module.scripts, "acquire_lease", world.acquire)
        patch.setattr(lease_module.scripts, "renew_lease", world.renew)
        # A wall clock that jumps about must not matter: nothing here may read it.
        patch.setattr(time, "time", lambda: 1 / 0)
        redis: Any = None
        holders = [LeaderLease(redis, name, 10.0, clock=lambda: world.now_s) for name in ("a", "b")]
        await _play(world, holders, steps)


@given(steps=Steps, jumps_s=st.lists(st.sampled_from([-1e9, -3600.0, -1.0, 0.5, 3600.0, 1e9]), min_size=1))
async def test_a_wall_clock_that_jumps_ends_no_lease_and_makes_none_longer(steps: Any, jumps_s: list[float]) -> None:
    """With the clock that a lease has by itself, on a host whose wall clock jumps at every look."""
    with pytest.MonkeyPatch.context() as patch:
        world, jumps = World(), itertools.cycle(jumps_s)
        patch.setattr(lease_module.scripts, "acquire_lease", world.acquire)
        patch.setattr(lease_module.scripts, "renew_lease", world.renew)

        def clock_gettime(clock: int) -> float:
            return world.now_s if clock == time.CLOCK_BOOTTIME else world.now_s + next(jumps)

        patch.setattr(time, "clock_gettime", clock_gettime)
        patch.setattr(time, "time", lambda: world.now_s + next(jumps))
        redis: Any = None
        await _play(world, [LeaderLease(redis, name, 10.0) for name in ("a", "b")], steps)


async def _play(world: World, holders: list[LeaderLease], steps: Any) -> None:
    for which, renew, delays_s, lost, pause_s in steps:
        world.delays_s, world.lost_reply = list(delays_s), lost
        with contextlib.suppress(Unavailable):
            await (holders[which].renew() if renew else holders[which].acquire())
        _check(world, holders)
        world.now_s += pause_s
        _check(world, holders)


def _check(world: World, holders: list[LeaderLease]) -> None:
    believers = [holder for holder in holders if holder.epoch is not None]
    assert len(believers) <= 1
    for holder in believers:
        assert holder.epoch == world.epoch
        assert world.owner is not None
        assert world.owner.startswith("ab"[holders.index(holder)])
        assert world.now_s + holder.remaining_s() < world.expires_s
