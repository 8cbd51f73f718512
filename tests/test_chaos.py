"""`make chaos`: its plan follows from the seed, its audit finds what is wrong, and a short run of it holds."""

from dataclasses import replace
from pathlib import Path

import pytest

from chaos import audit
from chaos.audit import Records
from chaos.load import Failure, Load
from chaos.plan import ENGINES, EVERYBODY, SERVICES, TRAINER, VALKEY, Fault, Kind, plan
from chaos.run import Chaos
from chaos.stack import LEASE_S, Kept, Life, Stack
from tided.local import Service
from tided.model.drafts import Draft, DraftOrigin
from tided.model.events import Event
from tided.model.jobs import Job, JobKind, JobResult, JobSpec, JobState
from tided.wire.control import Command, Reply, SetSchedule, Swap


def test_the_same_seed_gives_the_same_faults_within_their_time() -> None:
    faults = plan(7, 600.0, LEASE_S)
    assert faults == plan(7, 600.0, LEASE_S) != plan(8, 600.0, LEASE_S)
    assert all(fault.at_s > 0 and fault.at_s + fault.seconds <= 600.0 for fault in faults)
    many = [fault for seed in range(20) for fault in plan(seed, 600.0, LEASE_S)]
    assert {fault.kind for fault in many} == set(Kind)
    assert {fault.victim for fault in many} == {*SERVICES, VALKEY, TRAINER, EVERYBODY}
    assert any(fault.seconds > LEASE_S for fault in many if fault.kind is Kind.STOP)


def job(state: JobState, version: str) -> Job:
    result = JobResult(version=version) if state is JobState.SUCCEEDED else None
    return Job("job-1", JobSpec(JobKind.TRAIN, "one", "t", "/t"), state, 5, 1, 3, 1, 1, 1, result=result)


DRAFT = Draft("ab" * 32, "tiny", 1, "", DraftOrigin.TRAINED, "t", "v", 64, 1, 1, job="job-1")
RECORDS = Records(
    (), (), (job(JobState.SUCCEEDED, DRAFT.version),), (DRAFT,), {}, {}, {5: ("tided-a",), 6: ("tided-b",)}, 10, ()
)


def test_a_draft_that_no_job_committed_is_found() -> None:
    assert audit.one_effect(RECORDS).ok
    for wrong in (
        replace(RECORDS, jobs=(job(JobState.FAILED, ""),)),
        replace(RECORDS, jobs=(job(JobState.SUCCEEDED, "cd" * 32),)),
        replace(RECORDS, drafts=(DRAFT, replace(DRAFT, version="ef" * 32, number=2))),
    ):
        assert not audit.one_effect(wrong).ok


def test_an_engine_that_obeyed_a_superseded_leader_is_found() -> None:
    sent = tuple((f"{n}-0", Command(f"c{n}", epoch, 1, SetSchedule((1,)))) for n, epoch in enumerate((5, 6, 5)))
    refused = {"one": {f"c{n}": Reply(f"c{n}", 6, n < 2, "", {}) for n in range(3)}}
    records = replace(RECORDS, commands={"one": sent}, replies=refused)
    assert audit.obeyed(records).ok
    assert not audit.obeyed(replace(records, replies={"one": {"c2": Reply("c2", 6, True, "", {})}})).ok


def test_a_version_that_went_out_after_its_quarantine_is_found() -> None:
    told = (Event("draft-quarantined", 1, DRAFT.version, "worse", id="1000-0"),)
    swap = Command("c", 5, 1, Swap(DRAFT.version, "/d"))
    assert audit.quarantine(replace(RECORDS, events=told, commands={"one": (("999-0", swap),)})).ok
    assert not audit.quarantine(replace(RECORDS, events=told, commands={"one": (("1001-0", swap),)})).ok


@pytest.mark.parametrize(
    ("start_s", "end_s", "explained"), [(5, 9, False), (5, 10, True), (14, 15, True), (21, 22, False)]
)
def test_a_failure_counts_unless_its_engine_was_down(start_s: float, end_s: float, explained: bool) -> None:
    kept = Kept(Service("one", "m"), [Life(0.0, 1.0, 10.0, -9, True), Life(11.0, 20.0)])
    assert kept.down(start_s, end_s) is explained
    stack = Stack.__new__(Stack)
    stack.kept = {"one": kept}
    load = Load(failures=[Failure("one", start_s, end_s, "gone")])
    assert audit.unharmed(stack, load).ok is explained


def test_two_that_led_under_one_epoch_are_found() -> None:
    watch = audit.Watch("unix:///none", Path("/none"), Path("/none"))
    assert audit.one_leader(RECORDS, watch).ok
    assert not audit.one_leader(replace(RECORDS, led={5: ("tided-a", "tided-b")}), watch).ok
    watch.back.append("the stored epoch went from 6 to 5")
    assert not audit.one_leader(RECORDS, watch).ok


@pytest.mark.real
async def test_a_short_run_holds_every_invariant(tmp_path: Path) -> None:
    long_s = 1.5 * LEASE_S
    faults = [
        Fault(1.0, Kind.STOP, "tided-a", long_s),
        Fault(2.0, Kind.FAILPOINT, "collector", detail="collector.committed"),
        Fault(4.0, Kind.SWALLOW, "worker-a", long_s),
        Fault(10.0, Kind.KILL, VALKEY),
        Fault(12.0, Kind.MUTE, EVERYBODY, 2.0),
        Fault(15.0, Kind.KILL, "tided-b"),
        Fault(16.0, Kind.TRAIN, ENGINES[0]),
    ]
    said: list[str] = []
    outcome = await Chaos(tmp_path / "run", 1, 20.0, said.append, faults).run()
    assert outcome.ok, "\n".join([*said, *(str(finding) for finding in outcome.findings if not finding.ok)])
    assert [fault["outcome"] for fault in outcome.faults if fault["kind"] in (Kind.KILL, Kind.STOP)] == ["done"] * 3
    assert outcome.answered > 0
