"""docs/protocol.md is enough to write a client from: its bytes are what the code writes and reads, its lists are complete."""

import hashlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import get_args

import pytest

from tests.tiny import make_draft, make_target
from tided.draft import checkpoint
from tided.draft.target import describe
from tided.engine import agent
from tided.engine.tap import MAX_REQUEST_ID
from tided.model.codec import from_plain, to_plain
from tided.model.engines import (
    Capability,
    EngineInfo,
    LatencyProfile,
    Observation,
    RequestStats,
    StepCounts,
    TapTotals,
    TargetInfo,
)
from tided.model.ids import prompt_group
from tided.wire import control, fetch
from tided.wire.control import (
    Command,
    Deliver,
    MeasureProfile,
    Reply,
    SetCapture,
    SetSchedule,
    Swap,
    decode,
    decode_command,
    encode,
)
from tided.wire.samples import (
    CHUNK_BYTES,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    End,
    RequestRef,
    SampleHeader,
    Segment,
    check_payload,
    decode_header,
    encode_header,
)

PAGE = Path("docs/protocol.md").read_text(encoding="utf-8")

AT_MS = 1_800_000_000_000
TARGET, VERSION, VOCAB_ID = "ab" * 32, "cd" * 32, "ef" * 32
TOTALS = TapTotals(10, 7, 0, 3, 0)
PAYLOAD = bytes(range(36))
HEADER = SampleHeader(
    engine="local",
    incarnation="inc-1",
    seq=7,
    target=TARGET,
    dtype="bfloat16",
    rows=3,
    states=3,
    hidden=2,
    has_last=False,
    ids=struct.pack("<3i", 11, 12, 13),
    requests=(RequestRef("req-1", 2, prompt_group(struct.pack("<2i", 11, 12))),),
    segments=(Segment(0, 0, 3),),
    ends=(End(0, "stop", (14,)),),
    totals=TOTALS,
    payload_bytes=36,
    crc32=zlib.crc32(PAYLOAD),
    at_ms=AT_MS,
)
INFO = EngineInfo(
    engine="local",
    incarnation="inc-1",
    kind="redis",
    url="",
    target=TargetInfo(TARGET, "tiny", 8, 2, 100, (2, 4, 5)),
    version=VERSION,
    vocab_id=VOCAB_ID,
    gamma_max=4,
    max_batch=8,
    capabilities=(Capability.TAP, Capability.SCHEDULE, Capability.SWAP),
    gammas=(3, 0),
    capturing=True,
    epoch=AT_MS,
    profile=LatencyProfile((1, 8), (0.02, 0.03), (1,), (0.002,)),
    pid=4711,
    build="mine 1.0",
)
OBSERVATION = Observation(
    engine="local",
    incarnation="inc-1",
    seq=1,
    at_ms=AT_MS,
    version=VERSION,
    running=2,
    waiting=0,
    steps=(StepCounts(2, 3, 10, 0.25, (9, 6, 3, 2)),),
    requests=(RequestStats(2, 25, 10, 30, 14, VERSION, 0.75, 1),),
    tap=TOTALS,
)
BODIES = {
    "command": ("cmd-1", SetSchedule((3, 3, 0))),
    "capture": ("cmd-2", SetCapture(True, 134_217_728)),
    "swap": ("cmd-3", Swap(VERSION, "/srv/tided/drafts/1")),
    "profile": ("cmd-4", MeasureProfile()),
    "deliver": ("cmd-6", Deliver(VERSION, 19_000_000)),
}
COMMANDS = {name: Command(id_, AT_MS, AT_MS + 30_000, body) for name, (id_, body) in BODIES.items()}
REPLIES = {
    "reply": Reply("cmd-3", AT_MS, True, "", {"version": VERSION, "seconds": 0.015625}),
    "refusal": Reply("cmd-5", AT_MS, False, "the epoch is over", {}),
}


def transaction() -> bytes:
    """The chunk of the example on its way to Redis, as bytes on the socket."""
    header = encode_header(HEADER)
    size = str(len(header) + len(PAYLOAD)).encode()
    credit, samples = b"tided:{local}:credit", b"tided:{local}:samples"
    calls = [
        [b"MULTI"],
        [b"XADD", samples, b"*", b"h", header, b"p", PAYLOAD],
        [b"INCRBY", credit, size],
        [b"EXEC"],
    ]
    return b"".join(
        b"*%d\r\n" % len(call) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in call) for call in calls
    )


FETCH = fetch.FetchRequest("cmd-6", VERSION, fetch.WINDOW_BYTES, fetch.WINDOW_BYTES)
PART = (fetch.WINDOW_BYTES, bytes(range(16)))
EXAMPLES = {
    "header": encode_header(HEADER),
    "payload": PAYLOAD,
    "transaction": transaction(),
    "info": encode(INFO),
    "observation": encode(OBSERVATION),
    "fetch": encode(FETCH),
    "part": fetch.part(*PART),
    **{name: control.encode_command(command) for name, command in COMMANDS.items()},
    **{name: encode(reply) for name, reply in REPLIES.items()},
}
BLOCKS = dict(re.findall(r"^```hex (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def test_every_example_is_checked() -> None:
    assert set(BLOCKS) == set(EXAMPLES)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_pages_bytes_are_what_the_code_writes(name: str) -> None:
    assert bytes.fromhex(BLOCKS[name]) == EXAMPLES[name]


def test_the_pages_bytes_are_what_the_code_reads() -> None:
    page = {name: bytes.fromhex(block) for name, block in BLOCKS.items()}
    assert decode_header(page["header"]) == HEADER
    check_payload(HEADER, page["payload"])
    assert decode(EngineInfo, page["info"]) == INFO
    assert decode(Observation, page["observation"]) == OBSERVATION
    assert {name: decode_command(page[name]) for name in COMMANDS} == COMMANDS
    assert {name: decode(Reply, page[name]) for name in REPLIES} == REPLIES
    assert decode(fetch.FetchRequest, page["fetch"]) == FETCH
    assert fetch.split(page["part"]) == PART


def test_an_engine_that_tells_no_temperature_is_understood() -> None:
    told = to_plain(OBSERVATION)
    del told["requests"][0]["temperature"]
    (request,) = from_plain(Observation, told).requests
    assert request.temperature is None


def test_the_figures_of_the_examples_are_told() -> None:
    assert f"CRC-32 is {HEADER.crc32}" in PAGE
    assert HEADER.requests[0].group.hex() in PAGE


def test_every_kind_and_capability_is_told() -> None:
    assert {type(command.body) for command in COMMANDS.values()} == set(get_args(control.Body))
    for capability in Capability:
        assert f"| `{capability.value}` |" in PAGE


@pytest.mark.parametrize(
    "figure",
    [
        f"{MAX_HEADER_BYTES:,}",
        f"{MAX_PAYLOAD_BYTES:,}",
        f"{CHUNK_BYTES:,}",
        f"{control.MAX_MESSAGE_BYTES:,}",
        f"{MAX_REQUEST_ID} characters",
        f"TTL {agent.HEARTBEAT_TTL_S} s",
        f"MAXLEN ~{agent.OBSERVATIONS_KEPT:,}",
        f"MAXLEN ~{agent.REPLIES_KEPT:,}",
        f"at most {fetch.WINDOW_BYTES:,} bytes",
        f"at most {fetch.PART_BYTES:,} bytes",
        f"list of parts of a draft | leader adds, engine takes | TTL {fetch.TTL_S} s",
    ],
)
def test_the_limits_are_the_codes(figure: str) -> None:
    assert figure in PAGE


def test_digests_are_computed_as_the_page_says(tmp_path: Path) -> None:
    """Written from the page alone: with struct, json and hashlib."""
    target = make_target(tmp_path / "target")
    draft = make_draft(target, tmp_path / "draft")
    config, weights = (draft / "config.json").read_bytes(), (draft / "model.safetensors").read_bytes()
    loaded = checkpoint.load(draft)
    assert hashlib.sha256(struct.pack("<Q", len(config)) + config + weights).hexdigest() == loaded.version
    (length,) = struct.unpack("<Q", weights[:8])
    first, last = json.loads(weights[8 : 8 + length])["d2t"]["data_offsets"]
    d2t = weights[8 + length + first : 8 + length + last]
    vocab = json.loads(config)["vocab_size"]
    assert hashlib.sha256(struct.pack("<Q", vocab) + d2t).hexdigest() == loaded.vocab_id

    digest = hashlib.sha256((target / "config.json").read_bytes())
    file = (target / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", file[:8])
    digest.update(file[8 : 8 + length])
    for block in range(16):
        at = max(0, len(file) - 65_536) * block // 15
        digest.update(file[at : at + 65_536])
    assert digest.hexdigest() == describe(target).digest
