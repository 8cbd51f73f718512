"""examples/c, a producer in another language: compiled as its first lines say, run against the real server, collector and daemon."""

import asyncio
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.configs import write_config
from tests.conftest import Valkey
from tests.contract.peer import Peer
from tests.control import variant
from tests.dataplane import HIDDEN, TARGET, collector_process, stored_rows, tokens_of
from tests.support import eventually
from tests.tiny import make_draft, make_target
from tided.api.client import Client
from tided.draft import checkpoint
from tided.draft.target import describe
from tided.local import LocalStack, services
from tided.model.engines import Capability, RequestStats, TargetInfo
from tided.wire import keys
from tided.wire.control import MeasureProfile, SetCapture, SetSchedule, Swap
from tided.wire.samples import SampleHeader

pytestmark = pytest.mark.real

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "c"
TOY = TargetInfo(TARGET, "toy", 8, HIDDEN, 251, (2, 4, 5))
PROMPT, OUTPUT = 5, 12
WHOLE = PROMPT + OUTPUT - 1
"""Rows of a request that was not aborted: all tokens but the newest."""


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the command line in its own first comment."""
    line = re.search(r"^ \*   (cc .*)$", (FOLDER / "producer.c").read_text(), re.MULTILINE)
    assert line is not None
    folder = Path(shutil.copytree(FOLDER, tmp_path_factory.mktemp("c") / "c"))
    done = subprocess.run(line[1].split(), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "producer"


@dataclass
class Running:
    process: subprocess.Popen[str]

    def stop(self) -> dict[str, Any]:
        """SIGTERM; what it says at its end."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return dict(json.loads(out))


@contextmanager
def running(binary: Path, url: str, engine: str = "e1", target: TargetInfo = TOY) -> Generator[Running]:
    shape = [target.digest, target.layers, target.hidden, target.vocab, *target.aux_layers]
    command = [str(binary), "unix:" + url.removeprefix("unix://"), engine, *map(str, shape)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield Running(process)
    finally:
        process.kill()
        process.communicate()


def whole_requests(headers: list[SampleHeader]) -> dict[str, str]:
    """How each request ended, by its name."""
    return {header.requests[end.request].request: end.finish for header in headers for end in header.ends}


async def test_what_it_taps_is_stored_once_and_the_totals_agree(binary: Path, valkey: Valkey, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    peer = Peer(valkey.client, "e1")
    with running(binary, valkey.url) as producer, collector_process(valkey.url, root):
        await peer.here()
        await peer.capture()
        await eventually(lambda: len(stored_rows(root)) > 40 * WHOLE if root.exists() else None, 120)
        await peer.capture(False)
        told = producer.stop()
        assert told["shed"] == 0
        assert told["skipped"] > 0
        assert told["sent"] == told["tapped"] > 40 * WHOLE
        await eventually(lambda: int(valkey.client.get(keys.credit("e1")) or 0) == 0, 120)  # pyright: ignore
        await eventually(lambda: len(stored_rows(root)) == told["tapped"], 120)
    rows = stored_rows(root)
    assert len(set(rows)) == len(rows)
    by_request: dict[str, list[tuple[int, int]]] = {}
    for request, position, token in rows:
        by_request.setdefault(request, []).append((position, token))
    for request, found in by_request.items():
        assert sorted(found) == list(enumerate(tokens_of(request, len(found))))
        assert len(found) <= WHOLE
        assert int(request.removeprefix("c-")) % 10 != 9, "a private request was stored"
    assert peer.info() is None


async def test_its_chunks_reports_and_commands_are_what_the_page_says(
    binary: Path, valkey: Valkey, tmp_path: Path
) -> None:
    target = make_target(tmp_path / "target")
    first = make_draft(target, tmp_path / "draft")
    second, vocabulary = variant(first, tmp_path / "second", 2), make_draft(target, tmp_path / "other", draft_vocab=32)
    peer = Peer(valkey.client, "e1")
    with running(binary, valkey.url) as producer:
        info = await peer.here()
        assert info.target == TOY
        assert info.kind == "redis"
        assert set(info.capabilities) == {Capability.TAP, Capability.SCHEDULE, Capability.SWAP}
        for gammas in ((3, 2, 1, 4), (0,)):
            assert (await peer.ask(SetSchedule(gammas))).ok
            assert (await peer.here()).gammas == gammas
        assert (await peer.ask(SetSchedule((3,)))).ok
        for wrong in (SetSchedule((5,)), SetSchedule(()), MeasureProfile(), Swap("0" * 64, str(first))):
            reply = await peer.ask(wrong)
            assert (reply.ok, bool(reply.error)) == (False, True)
        for draft in (first, second):
            loaded = checkpoint.load(draft)
            reply = await peer.ask(Swap(loaded.version, str(draft)))
            assert (reply.ok, reply.data["version"]) == (True, loaded.version)
            info = await peer.here()
            assert (info.version, info.vocab_id) == (loaded.version, loaded.vocab_id)
        assert not (await peer.ask(Swap(checkpoint.version_of(vocabulary), str(vocabulary)))).ok
        assert (await peer.here()).version == checkpoint.version_of(second)
        assert not (await peer.ask(SetCapture(True, 1), epoch=1)).ok
        assert not (await peer.ask(SetCapture(True, 1), expires_in_ms=-1000)).ok
        command = peer.send(SetSchedule((3,)))
        (once,) = await eventually(lambda: peer.replies(command))
        peer.send(SetSchedule((0,)), command=command)
        assert await eventually(lambda: peer.replies(command)[1:]) == [once]
        assert (await peer.here()).gammas == (3,)
        await peer.capture()
        await eventually(lambda: peer.tapped([]) == [] and len(whole_requests(peer.headers)) > 120)
        told = producer.stop()
    peer.tapped([])
    assert sum(header.rows for header in peer.headers) == told["sent"]
    assert [header.seq for header in peer.headers] == list(range(len(peer.headers)))
    assert set(whole_requests(peer.headers).values()) == {"length", "abort"}
    last = peer.headers[-1].totals
    assert (last.tapped, last.skipped, last.shed) == (told["tapped"], told["skipped"], 0)
    self_consistent(peer)


def self_consistent(peer: Peer) -> None:
    """Its reports: histograms that add up, and requests whose tokens follow from them."""
    reports = peer.observations()
    assert [report.seq for report in reports] == list(range(1, len(reports) + 1))
    for counts in (counts for report in reports for counts in report.steps):
        assert len(counts.accepted) == counts.gamma + 1
        assert sum(counts.accepted) == counts.batch * counts.steps
    finished: list[RequestStats] = [item for report in reports for item in report.requests]
    assert finished
    assert all(item.prompt_tokens == PROMPT and item.output_tokens <= OUTPUT for item in finished)


async def test_without_credit_it_sheds_and_says_how_much(binary: Path, valkey: Valkey) -> None:
    peer = Peer(valkey.client, "e1")
    with running(binary, valkey.url) as producer:
        await peer.here()
        valkey.client.set(keys.credit("e1"), 1)  # somebody's bytes that nobody takes off
        assert (await peer.ask(SetCapture(True, 1))).ok
        await eventually(lambda: peer.totals.shed > 100, 120)
        assert valkey.client.xlen(keys.samples("e1")) == 0
        await peer.capture(False)
        told = producer.stop()
    peer.tapped([])
    assert told["sent"] + told["shed"] == told["tapped"]
    assert peer.headers[-1].totals.shed == told["shed"] > 100
    assert sum(header.rows for header in peer.headers) == told["sent"]


async def test_a_real_daemon_takes_it_in(binary: Path, short_dir: Path) -> None:
    """tided sees it, switches its capture on by itself, and all of its rows are stored."""
    target = make_target(short_dir / "target")
    path = short_dir / "config.toml"
    config = write_config(
        path,
        {
            "daemon": {"state_dir": str(short_dir / "s"), "cycle_s": 0.2},
            "target": {"path": str(target)},
            "training": {"min_rows": 1_000_000_000},
            "samples": {"shard_age_s": 0.2},
            "self_test": {"enabled": False},  # the toy's states are no model's
        },
    )
    client = Client(config.daemon.socket_path, timeout_s=60)
    async with LocalStack(short_dir / "logs") as stack:
        await stack.start(services(path, config)[0])
        with running(binary, config.redis_url, "toy", describe(target)) as producer:

            async def captured() -> bool:
                engines = (await asyncio.to_thread(client.status)).engines
                return bool(engines) and engines[0].info.capturing and engines[0].samples.stored > 0

            await eventually(captured, 180, 0.2)
            told = producer.stop()
            assert told["tapped"] > 0
            await eventually(lambda: len(stored_rows(config.samples_dir)) == told["sent"], 120, 0.2)
            assert told["sent"] + told["shed"] == told["tapped"]
