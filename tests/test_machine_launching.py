"""When a worker is launched: every rule, and a scheduler of random moods under which the promises hold."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tided.machine.job import backoff_ms
from tided.machine.launching import (
    Cancel,
    Forget,
    LaunchAction,
    Launches,
    Rules,
    Seen,
    Submit,
    Tell,
    launch_id,
    own,
    refused,
    step,
    unfit,
    waits,
    worker_name,
)
from tided.machine.placement import Capacity, Offer, Waiting
from tided.model.jobs import JobKind, Needs, WorkerInfo
from tided.model.launch import Launch, LaunchState

RULES = Rules("ray", 2, 10_000, Offer(tuple(JobKind), Capacity("cuda", 2, 80)))
NOW = 1_000_000
PLAIN, NOTHING = Needs(), Launches()
PENDING, RUNNING = Launch(LaunchState.PENDING), Launch(LaunchState.RUNNING)


def job(name: str = "a", due_ms: int = NOW, needs: Needs = PLAIN, kind: JobKind = JobKind.TRAIN) -> Waiting:
    return Waiting(name, kind, needs, 0, due_ms)


def worker(name: str = "host", busy: str = "", **fields: object) -> WorkerInfo:
    return replace(WorkerInfo(name, f"{name}-1", "h", tuple(JobKind), "cuda:0", 1, job=busy, devices=2), **fields)  # pyright: ignore


def seen(
    waiting: Sequence[Waiting] = (),
    launches: Mapping[str, Launch] | None = None,
    *workers: WorkerInfo,
    now_ms: int = NOW,
) -> Seen:
    return Seen(now_ms, tuple(waiting), workers, launches or {})


def acts(at: Seen, before: Launches = NOTHING, rules: Rules = RULES) -> tuple[LaunchAction, ...]:
    return step(before, at, rules)[1]


def test_a_job_that_nobody_could_take_gets_a_worker_at_once() -> None:
    assert acts(seen([job()])) == (Submit("ray-1.1", "ray-1"),)
    for other in (worker(cordoned=True), worker(draining=True), worker(kinds=(JobKind.SCORE,)), worker(device="cpu")):
        assert acts(seen([job(needs=Needs("cuda"))], {}, other)) == (Submit("ray-1.1", "ray-1"),)


def test_one_that_is_not_due_or_needs_more_gets_none() -> None:
    assert acts(seen([job(due_ms=NOW + 1)])) == ()
    big = seen([job(needs=Needs("cuda", 4))])
    assert acts(big) == ()
    assert unfit(big, RULES) == big.waiting
    assert unfit(seen(big.waiting, {}, worker(devices=4)), RULES) == ()
    assert not waits(big, RULES)


def test_one_that_a_registered_worker_could_take_waits_first() -> None:
    waiting = job(due_ms=NOW - RULES.after_ms + 1)
    assert acts(seen([waiting], {}, worker(busy="other"))) == ()
    assert acts(seen([waiting], {}, worker(busy="other"), now_ms=NOW + 1)) == (Submit("ray-1.1", "ray-1"),)


def test_a_launched_worker_is_nobody_to_wait_for() -> None:
    busy = seen([job()], {"ray-1.1": RUNNING}, worker("ray-1", busy="other"))
    assert acts(busy) == (Submit("ray-2.1", "ray-2"),)
    assert waits(busy, RULES)


def test_what_is_asked_for_already_is_counted() -> None:
    for launches, workers in (
        ({"ray-1.1": PENDING}, ()),
        ({"ray-1.1": PENDING}, (worker("ray-1", busy="of its last life"),)),
        ({"ray-1.1": RUNNING}, ()),  # it starts
        ({"ray-1.1": RUNNING}, (worker("ray-1"),)),  # it asks for a job
    ):
        assert acts(seen([job()], launches, *workers)) == ()
    assert acts(seen([job("a"), job("b")], {"ray-2.7": PENDING})) == (Submit("ray-1.1", "ray-1"),)


def test_no_more_live_than_there_are_slots() -> None:
    many = [job(name) for name in "abcd"]
    assert acts(seen(many)) == (Submit("ray-1.1", "ray-1"), Submit("ray-2.1", "ray-2"))
    assert acts(seen(many, {"ray-1.1": PENDING, "ray-2.1": PENDING})) == ()
    # Also right after there were more.
    assert acts(seen(many, {"ray-3.1": RUNNING, "ray-4.9": RUNNING}, worker("ray-3", "x"), worker("ray-4", "y"))) == ()


def test_what_nothing_waits_for_is_withdrawn_unless_it_has_begun() -> None:
    assert acts(seen([], {"ray-1.3": PENDING, "ray-2.1": RUNNING})) == (Cancel("ray-1.3"),)
    assert acts(seen([job()], {"ray-1.3": PENDING, "ray-2.1": PENDING})) == (Cancel("ray-2.1"),)
    # A job that is due and that another may take keeps it: it was asked for when there was no other.
    assert acts(seen([job()], {"ray-1.3": PENDING}, worker())) == ()


def test_what_is_withdrawn_is_cancelled_once_and_counts_no_more() -> None:
    """Ray leaves it pending until it would begin."""
    state, actions = step(Launches(), seen([], {"ray-1.3": PENDING}), RULES)
    assert actions == (Cancel("ray-1.3"),)
    state, actions = step(state, seen([], {"ray-1.3": PENDING}), RULES)
    assert actions == ()
    state, actions = step(state, seen([job()], {"ray-1.3": PENDING}), RULES)
    assert actions == (Submit("ray-2.1", "ray-2"),)
    state, _ = step(state, seen([job()], {"ray-1.3": Launch(LaunchState.STOPPED), "ray-2.1": PENDING}), RULES)
    assert state == Launches(judged=frozenset({"ray-1.3"}))


def test_a_cordoned_slot_is_left_out() -> None:
    cordoned = replace(seen([job()]), cordoned=frozenset({"ray-1"}))
    assert acts(cordoned) == (Submit("ray-2.1", "ray-2"),)
    idle = replace(seen([job()], {"ray-1.1": RUNNING}, worker("ray-1", cordoned=True)), cordoned=frozenset({"ray-1"}))
    assert acts(idle) == (Submit("ray-2.1", "ray-2"),)


def test_the_number_goes_on_and_what_is_older_is_forgotten() -> None:
    ended = {f"ray-1.{number}": Launch(LaunchState.SUCCEEDED, "", number) for number in (1, 9, 10)}
    assert acts(seen([job()], ended)) == (Submit("ray-1.11", "ray-1"), Forget("ray-1.1"), Forget("ray-1.9"))


def test_what_others_have_there_is_left_alone() -> None:
    others = {"ray-1": PENDING, "ray-1.0": PENDING, "my-ray-1.1": PENDING, "ray-1.1.1": PENDING, "raysubmit_x": PENDING}
    assert own("ray", others) == {}
    assert acts(seen([], others)) == ()


def test_a_failure_is_told_once_and_followed_by_a_pause_that_grows() -> None:
    state, launches = Launches(), dict[str, Launch]()
    at_ms = NOW
    for failures in (1, 2, 3):
        state, actions = step(state, seen([job()], launches, now_ms=at_ms), RULES)
        assert actions == (Submit(f"ray-1.{failures}", "ray-1"),)
        launches = {f"ray-1.{failures}": Launch(LaunchState.FAILED, "no such command", failures)}
        state, actions = step(state, seen([job()], launches, now_ms=at_ms), RULES)
        assert actions == (Tell(f"ray-1.{failures}", "no such command"),)
        assert (state.failures, state.reason) == (failures, "no such command")
        state, actions = step(state, seen([job()], launches, now_ms=at_ms + backoff_ms(failures) - 1), RULES)
        assert actions == ()
        at_ms += backoff_ms(failures)
    launches = {"ray-1.4": Launch(LaunchState.SUCCEEDED, "", 4)}
    state, actions = step(state, seen([job()], launches, now_ms=at_ms), RULES)
    assert (state.failures, actions) == (0, (Submit("ray-1.5", "ray-1"),))


def test_ends_are_judged_in_their_order() -> None:
    failed, succeeded = Launch(LaunchState.FAILED, "x", 5), Launch(LaunchState.SUCCEEDED, "", 7)
    assert step(Launches(), seen([], {"ray-1.1": succeeded, "ray-2.1": failed}), RULES)[0].failures == 0
    assert (
        step(Launches(), seen([], {"ray-1.1": replace(failed, ended_ms=9), "ray-2.1": succeeded}), RULES)[0].failures
        == 1
    )


def test_a_refusal_counts_as_a_failure() -> None:
    state = refused(Launches(), NOW, "not enough of it")
    assert acts(seen([job()]), state) == ()
    assert acts(seen([job()], now_ms=NOW + backoff_ms(1)), state) == (Submit("ray-1.1", "ray-1"),)


# --- any course of events ---


class World:
    """A scheduler and workers of random moods, and the leader's view of them."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}
        self.jobs: dict[str, Waiting] = {}
        self.held: dict[str, str] = {}
        self.submitted: list[str] = []
        self.doomed: set[str] = set()
        self.stubborn = False
        self.now_ms = NOW

    def seen(self) -> Seen:
        workers = tuple(worker(name, busy=held) for name, held in self.held.items())
        return Seen(self.now_ms, tuple(self.jobs.values()), workers, dict(self.launches))

    def do(self, actions: Sequence[LaunchAction]) -> None:
        for action in actions:
            match action:
                case Submit(key, _) if key not in self.launches:
                    self.launches[key] = PENDING
                    self.submitted.append(key)
                case Cancel(key) if self.stubborn and self.launches[key] is PENDING:
                    self.doomed.add(key)
                case Cancel(key):
                    self.end(key, LaunchState.STOPPED)
                case Forget(key):
                    assert not self.launches.pop(key).state.live
                case _:
                    pass

    def end(self, key: str, state: LaunchState) -> None:
        if self.launches[key].state.live:
            self.held.pop(key.rpartition(".")[0], None)
            self.launches[key] = Launch(state, "why", self.now_ms)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["job", "gone", "run", "claim", "succeed", "fail", "time", "two leaders"]), st.integers(0, 5)
    ),
    max_size=60,
)


@given(events=EVENTS, stubborn=st.booleans())
def test_whatever_happens_launches_are_bounded_unique_and_follow_the_need(
    events: list[tuple[str, int]], stubborn: bool
) -> None:
    world, state = World(), Launches()
    world.stubborn = stubborn
    for kind, number in events:
        live = sorted(key for key, launch in world.launches.items() if launch.state.live)
        chosen = live[number % len(live)] if live else ""
        slot = chosen.rpartition(".")[0]
        if kind == "job":
            world.jobs[f"job-{number}"] = job(f"job-{number}", world.now_ms)
        elif kind == "gone":
            world.jobs.pop(f"job-{number}", None)
        elif kind == "time":
            world.now_ms += 10 ** (number + 1)
        elif chosen in world.doomed and kind == "run":
            world.end(chosen, LaunchState.STOPPED)
        elif chosen and kind == "run":
            world.launches[chosen] = RUNNING
        elif chosen and kind == "claim" and world.launches[chosen] is RUNNING and world.jobs and slot not in world.held:
            world.held[slot] = world.jobs.pop(min(world.jobs)).id
        elif chosen and kind in ("succeed", "fail"):
            world.end(chosen, LaunchState.SUCCEEDED if kind == "succeed" else LaunchState.FAILED)
        at = world.seen()
        state, actions = step(state, at, RULES)
        world.do(actions)
        if kind == "two leaders":  # an old one acts on what it saw, a new one knows nothing of the past
            world.do(actions)
            state, again = step(Launches(), world.seen(), RULES)
            world.do(again)
        now_live = [key for key, launch in world.launches.items() if launch.state.live]
        assert len(now_live) <= RULES.most
        assert len({key.rpartition(".")[0] for key in now_live}) == len(now_live)
        assert len(world.submitted) == len(set(world.submitted))
        assert len(world.launches) <= 2 * RULES.most
        pending = sum(world.launches[key] is PENDING and key not in world.doomed for key in now_live)
        assert pending <= len(world.jobs)
    # When the scheduler is kind from now on, whatever waits is done.
    for _ in range(20):
        world.now_ms += 400_000
        state, actions = step(state, world.seen(), RULES)
        world.do(actions)
        for key in [key for key, launch in world.launches.items() if launch.state.live]:
            if world.jobs and key not in world.doomed:
                world.jobs.pop(min(world.jobs))
            world.end(key, LaunchState.SUCCEEDED)
    assert not world.jobs
    assert [key for key, launch in world.launches.items() if launch.state.live] == []


def test_ids_and_names() -> None:
    assert own("ray", {launch_id("ray", 12, 3): PENDING}) == {12: {3: PENDING}}
    assert worker_name("ray", 12) == "ray-12"
