"""The documentation holds what it says: commands exist, files check, examples decode, links resolve, tables are complete."""

import re
import shlex
import tomllib
import zlib
from dataclasses import fields
from pathlib import Path

import pytest
import redis
import redis.asyncio
from redis.exceptions import NoPermissionError

from tests.conftest import Valkey
from tests.ctl_run import tidectl
from tests.test_ctl_commands import command_names
from tided import daemon
from tided.api.access import Access
from tided.api.routes import ENDPOINTS
from tided.config import Config, load
from tided.model.codec import to_plain
from tided.model.engines import EngineInfo, LatencyProfile, Observation, RequestStats, StepCounts, TapTotals, TargetInfo
from tided.model.ids import prompt_group
from tided.model.jobs import JobKind, WorkerInfo
from tided.replay.generate import KINDS
from tided.store.jobs import JobStore
from tided.store.workers import WorkerStore
from tided.training.options import TrainOptions
from tided.wire import keys
from tided.wire.control import Command, Reply, SetSchedule, decode_command
from tided.wire.samples import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    End,
    RequestRef,
    SampleHeader,
    Segment,
    check_payload,
    decode_header,
)

PAGES = [Path("README.md"), Path("CHANGELOG.md"), *sorted(Path("docs").rglob("*.md"))]
PROTOCOL = Path("docs/protocol.md").read_text(encoding="utf-8")
OPERATIONS = Path("docs/operations.md").read_text(encoding="utf-8")
NEEDS_A_HOST = {"sudo", "curl", "journalctl"}  # shown for people; what they name is checked elsewhere
TARGETS = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


COMMANDS = sorted(
    {
        line[2:]
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"), "console")
        for line in block.splitlines()
    }
)


def test_console_blocks_hold_commands_only() -> None:
    lines = [
        line
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"), "console")
        for line in block.splitlines()
    ]
    assert len(lines) > 20
    assert [line for line in lines if not line.startswith("$ ")] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        assert set(arguments) <= TARGETS
    elif program == "tidectl":
        shown_arguments = arguments
        if arguments[0] == "--config":
            assert Path(arguments[1]).exists()
            shown_arguments = arguments[2:]
        name = next(name for name in command_names() if shown_arguments[: len(name.split())] == name.split())
        options = [word for word in shown_arguments if word.startswith("--")]
        shown = tidectl(*name.split(), "--help")
        assert shown.code == 0
        assert all(option in shown.out for option in options)
        if name in ("config check", "plan") or (name == "replay" and shown_arguments[1] in KINDS):
            assert tidectl(*arguments).code == 0
    elif program == "tided":
        daemon.main(arguments)
    else:
        assert program in NEEDS_A_HOST


def test_every_tidectl_command_is_documented() -> None:
    text = OPERATIONS + Path("README.md").read_text(encoding="utf-8")
    assert [name for name in command_names() if f"tidectl {name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    broken = [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]
    assert broken == []


def test_the_trainers_options_are_all_there_with_their_defaults() -> None:
    page = Path("docs/training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", page, re.MULTILINE))
    assert {name: value.strip("`") for name, value in rows.items()} == {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in to_plain(TrainOptions()).items()
    }


def test_every_decision_is_listed() -> None:
    pages = {path.name for path in Path("docs/adr").glob("*.md")} - {"README.md"}
    index = Path("docs/adr/README.md").read_text(encoding="utf-8")
    assert {name for name in pages if f"({name})" not in index} == set()
    assert len(pages) >= 9


def example(kind: str) -> bytes:
    (block,) = blocks(PROTOCOL, f"hex {kind}")
    return bytes.fromhex(block)


def test_the_sample_of_the_protocol_decodes() -> None:
    header, payload = decode_header(example("header")), example("payload")
    check_payload(header, payload)
    assert zlib.crc32(payload) == 628185172
    assert (header.engine, header.seq, header.rows, header.states, header.hidden) == ("local", 7, 3, 3, 2)
    assert header.ids == b"".join(token.to_bytes(4, "little") for token in (11, 12, 13))
    assert header.requests == (RequestRef("req-1", 2, prompt_group(header.ids[:8])),)
    assert header.segments == (Segment(0, 0, 3),)
    assert header.ends == (End(0, "stop", (14,)),)


def test_the_command_of_the_protocol_decodes() -> None:
    command = decode_command(example("command"))
    assert command == Command("cmd-1", 1_800_000_000_000, 1_800_000_030_000, SetSchedule((3, 3, 0)))


@pytest.mark.parametrize(
    "record",
    [
        SampleHeader,
        RequestRef,
        Segment,
        End,
        TapTotals,
        EngineInfo,
        TargetInfo,
        LatencyProfile,
        Observation,
        StepCounts,
        RequestStats,
        Command,
        Reply,
    ],
)
def test_the_protocol_names_every_field(record: type) -> None:
    words = set(re.findall(r"\w+", PROTOCOL))
    assert {field.name for field in fields(record)} - words == set()


def test_the_protocol_names_every_key_and_limit() -> None:
    for pattern in keys.PERMANENT:
        name = pattern.removesuffix(":*").rpartition(":")[2]
        assert re.search(rf"`[^`]*:{name}\b", PROTOCOL), pattern
    assert f"{MAX_HEADER_BYTES:,}" in PROTOCOL
    assert f"{MAX_PAYLOAD_BYTES:,}" in PROTOCOL


def test_the_route_table_is_complete() -> None:
    marks = {Access.READ: "read", Access.OPERATE: "operate"}
    rows = re.findall(r"`(GET|POST) (/\S+)` \| (read|operate)", OPERATIONS)
    assert set(rows) == {(endpoint.method, endpoint.path, marks[endpoint.access]) for endpoint in ENDPOINTS}


def test_the_events_table_is_complete() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path("tided").rglob("*.py"))
    kinds = set(re.findall(r"[aA]nnounce\(\s*\"([a-z-]+)\"", sources))
    assert len(kinds) > 8
    assert {kind for kind in kinds if f"`{kind}`" not in OPERATIONS} == set()


def test_the_configuration_in_the_guide_is_valid(tmp_path: Path) -> None:
    texts = blocks(OPERATIONS, "toml")
    file = tmp_path / "config.toml"
    configs: list[Config] = []
    for text in texts:
        file.write_text(text)
        configs.append(load(file))
    assert ["chat", "code"] in [[target.lineage for target in config.target] for config in configs]
    config = configs[0]
    assert config.daemon.socket_path == Path("/run/tided/tided.sock")
    assert config.daemon.start_collector is False


def test_the_default_file_holds_the_defaults() -> None:
    assert load(Path("config.toml")) == Config()
    text = Path("config.toml").read_text(encoding="utf-8")
    assert set(tomllib.loads(text)) == set(Config.model_fields)


def as_user(valkey: Valkey, user: str) -> redis.Redis:
    return redis.Redis(unix_socket_path=valkey.url.removeprefix("unix://"), username=user, password="CHANGE-ME")


@pytest.fixture
def users(valkey: Valkey):
    (text,) = blocks(OPERATIONS, "acl")
    names: list[str] = []
    for line in text.splitlines():
        _, name, *rules = line.split()
        valkey.client.execute_command("ACL", "SETUSER", name, "reset", *rules)
        names.append(name)
    yield valkey
    valkey.client.execute_command("ACL", "DELUSER", *names)


def test_the_engine_user_can_do_its_work_and_no_more(users: Valkey) -> None:
    with as_user(users, "tide-engine-local") as client:
        pipeline = client.pipeline(transaction=True)
        pipeline.xadd(keys.samples("local"), {"h": b"x", "p": b"y"})
        pipeline.incrby(keys.credit("local"), 2)
        pipeline.execute()
        client.set(keys.info("local"), b"x", ex=10)
        client.xrevrange(keys.commands("local"), count=1)
        client.xread({keys.commands("local"): "0"}, count=1)
        client.time()
        pipeline = client.pipeline(transaction=True)
        pipeline.rpush(keys.fetches("local"), b"x")
        pipeline.expire(keys.fetches("local"), 60)
        pipeline.execute()
        client.blpop([keys.parts("local", "cmd-1")], timeout=0.01)
        client.delete(keys.info("local"), keys.fetches("local"))
        for forbidden in (
            lambda: client.get(keys.policy()),
            lambda: client.xadd(keys.samples("other"), {"h": b"x"}),
            lambda: client.xtrim(keys.samples("local"), 0),
            client.flushall,
            lambda: client.eval("return 1", 0),
            lambda: client.keys("*"),
        ):
            with pytest.raises(NoPermissionError):
                forbidden()


async def test_the_worker_user_can_do_its_work_and_no_more(users: Valkey) -> None:
    path = users.url.removeprefix("unix://")
    client = redis.asyncio.Redis(unix_socket_path=path, username="tide-worker", password="CHANGE-ME")
    info = WorkerInfo("w", "w-1", "host", (JobKind.TRAIN,), "cpu", 1)
    await WorkerStore(client).register(info)
    assert await JobStore(client).claim("w", [JobKind.TRAIN]) is None
    await WorkerStore(client).remove(info)
    for forbidden in (("SET", keys.policy(), "x"), ("DEL", keys.lease()), ("GET", keys.info("local")), ("FLUSHALL",)):
        with pytest.raises(NoPermissionError):
            await client.execute_command(*forbidden)
    await client.aclose()
