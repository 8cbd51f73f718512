"""`tidectl doctor`: what it looks over, in words; its exit code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.api_server import running
from tests.conftest import Valkey
from tests.control import Control, leading, settings, store_draft
from tests.ctl_run import tidectl_at
from tests.engine_double import describe_double, running_double
from tests.support import eventually
from tided.model.jobs import JobKind, WorkerInfo
from tided.model.verification import Check, CheckOutcome, Finding
from tided.wire import keys

pytest_plugins = ("tests.tiny_fixtures", "tests.s3_fixtures")
pytestmark = pytest.mark.real


async def looked_over(control: Control) -> dict[str, dict[str, Check]]:
    found: tuple[Finding, ...] = await control.plane.doctor(None)
    return {item.subject: {check.name: check for check in item.checks} for item in found}


async def test_every_part_is_looked_over(valkey: Valkey, tmp_path: Path, target: Path, first: Path) -> None:
    async with (
        leading(valkey, settings(tmp_path, target)) as control,
        running_double(valkey, describe_double(target, first)) as engine,
    ):
        await eventually(control.context.engines.list)
        store_draft(control, first, target)
        await engine.report(alpha=0.5, requests=1)
        await control.cycle()
        parts = await looked_over(control)
        assert set(parts) == {"redis", "tided", "workers", "engine double"}
        redis = parts["redis"]
        assert redis["server"].outcome is CheckOutcome.OK
        assert redis["eviction"].measured == "maxmemory-policy noeviction"
        # The test's own server has no append-only file, and its worker none at all.
        assert redis["append-only file"].outcome is CheckOutcome.FAILED
        assert "appendonly yes" in redis["append-only file"].advice
        assert parts["workers"]["reference jobs"].outcome is CheckOutcome.FAILED
        assert parts["tided"]["leader"].outcome is CheckOutcome.OK
        assert "GiB free" in parts["tided"]["disk"].measured
        double = parts["engine double"]
        assert double["target"].outcome is CheckOutcome.OK
        assert double["draft vocabulary"].outcome is CheckOutcome.OK, double["draft vocabulary"]
        assert double["backlog"].outcome is CheckOutcome.OK
        assert double["self-test"].measured == "self_test.enabled is false"

        worker = WorkerInfo("w", "w-1", "host", (JobKind.TRAIN, JobKind.REFERENCE), "cpu", 1)
        await control.context.workers.register(worker)
        assert (await looked_over(control))["workers"]["reference jobs"].measured == "taken by w"


async def test_what_is_wrong_is_named(valkey: Valkey, tmp_path: Path, target: Path, first: Path) -> None:
    other = replace(describe_double(target, first), vocab_id="0" * 64)
    async with leading(valkey, settings(tmp_path, target)) as control, running_double(valkey, other):
        await eventually(control.context.engines.list)
        store_draft(control, first, target)
        valkey.client.set(keys.credit("double"), control.context.config.capture.credit_bytes)
        valkey.client.hset(keys.ledger("double"), "dead", 2)
        valkey.client.set(keys.info("elder"), b"\x81\xa1v\x63", ex=60)
        valkey.client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            await control.cycle()
            parts = await looked_over(control)
        finally:
            valkey.client.config_set("maxmemory-policy", "noeviction")
        assert parts["redis"]["eviction"].outcome is CheckOutcome.FAILED
        assert parts["engine elder"]["heartbeat"].outcome is CheckOutcome.FAILED
        double = parts["engine double"]
        failed = {name for name, check in double.items() if check.outcome is CheckOutcome.FAILED}
        assert {"draft vocabulary", "backlog", "samples"} <= failed
        assert "another vocabulary" in double["draft vocabulary"].measured


@pytest.mark.parametrize(
    ("harm", "measured"),
    [
        ("", "0 objects, 0 MiB in s3://"),
        ("bucket", "The specified bucket does not exist"),
        ("credentials", "Access Key Id you provided does not exist"),
    ],
)
async def test_a_storage_is_proved(
    valkey: Valkey, tmp_path: Path, target: Path, s3_url: str, harm: str, measured: str
) -> None:
    url = "s3://no-such-bucket/tided" if harm == "bucket" else s3_url
    options = {"key": "nobody", "secret": "no"} if harm == "credentials" else {}
    async with leading(valkey, settings(tmp_path, target, storage={"url": url, "options": options})) as control:
        check = (await looked_over(control))["tided"]["storage"]
    assert check.outcome is (CheckOutcome.FAILED if harm else CheckOutcome.OK)
    assert measured in check.measured
    assert bool(harm) == bool(check.advice)


async def test_the_exit_code_says_whether_a_check_failed() -> None:
    async with running() as api:
        fine = await tidectl_at(api.socket, "doctor")
        assert (fine.code, fine.err) == (0, "")
        assert "2 ok, 0 failed, 0 could not be made" in fine.out
        api.plane.checks_now = [Check("layer ids", CheckOutcome.FAILED, "layer 3, not 2", "tap before layer 2")]
        bad = await tidectl_at(api.socket, "doctor", "local")
        assert (bad.code, bad.err) == (1, "")
        assert "FAILED" in bad.out
        assert "layer 3, not 2" in bad.out
        assert "-> tap before layer 2" in bad.out
        as_json = await tidectl_at(api.socket, "doctor", "--json")
        assert as_json.code == 1
        assert json.loads(as_json.out)[1]["checks"][0]["outcome"] == "failed"
        unknown = await tidectl_at(api.socket, "doctor", "nobody")
        assert (unknown.code, unknown.out) == (1, "")
        assert "nobody" in unknown.err
