"""The sample chunk: what the tap sends and the collector reads. docs/protocol.md describes it for other languages.

One stream entry has two fields: `h`, a msgpack map (below), and `p`, the raw little-endian tensor bytes, shape
[rows, states, hidden]. A *row* is one token's states at one position. Rows of several requests share a chunk; a *segment* says
which rows belong to which request and where its first position is. Positions of one request grow; a jump is a gap.
"""

from dataclasses import dataclass

from tided.model.codec import from_plain, to_plain
from tided.model.engines import TapTotals
from tided.model.errors import Refused
from tided.model.ids import check_digest, check_name
from tided.wire.checksum import crc32
from tided.wire.envelope import seal, unseal

SCHEMA = 1
CHUNK_BYTES = 1_036_800
"""Payload size to aim at: just under 1 MB (Redis takes 0.7% more memory for it, where exactly 1 MiB costs +26%)."""
MAX_HEADER_BYTES = 262_144
MAX_PAYLOAD_BYTES = 16_777_216
_INT32 = 2**31
_EXACT = 2**53  # what Lua and JSON count exactly
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class RequestRef:
    """A request that a chunk mentions. Repeated in every chunk, so that none depends on another that may be shed."""

    request: str
    prompt_tokens: int
    group: bytes  # tided.model.ids.prompt_group of the whole prompt


@dataclass(frozen=True, slots=True)
class Segment:
    """`rows` consecutive rows of requests[request], the first at `position`."""

    request: int
    position: int
    rows: int


@dataclass(frozen=True, slots=True)
class End:
    """requests[request] is over. `tail` holds token ids, at the positions after the last row, that have no states."""

    request: int
    finish: str  # "stop", "length" or "abort"
    tail: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SampleHeader:
    engine: str
    incarnation: str
    seq: int  # 0, 1, 2, ... within the incarnation; a resent chunk keeps its number
    target: str
    dtype: str
    rows: int
    states: int  # 3 aux states, and the last hidden state (after the final norm) as the 4th if has_last
    hidden: int
    has_last: bool
    ids: bytes  # token id of each row, int32 little-endian
    requests: tuple[RequestRef, ...]
    segments: tuple[Segment, ...]
    ends: tuple[End, ...]
    totals: TapTotals  # the producer's, when this chunk was handed over
    payload_bytes: int
    crc32: int  # of the payload
    at_ms: int  # producer's wall clock, for people


def encode_header(header: SampleHeader) -> bytes:
    """The `h` field. The schema version is its first key."""
    return seal(SCHEMA, to_plain(header))


def decode_header(data: bytes, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> SampleHeader:
    """Parse and check an `h` field. Raises `Refused` for anything that is not exactly schema 1 and consistent in itself.

    Nothing here allocates by what the header claims: sizes are compared, and capped, first.
    """
    plain = unseal(data, "sample header", SCHEMA, MAX_HEADER_BYTES)
    header = from_plain(SampleHeader, plain, "sample header")
    _check(header, max_payload_bytes)
    return header


def check_payload(header: SampleHeader, payload: bytes | memoryview) -> None:
    """Raise `Refused` unless `payload` is the one that `header` announces."""
    view = memoryview(payload)
    if view.nbytes != header.payload_bytes:
        raise Refused(f"sample payload has {view.nbytes} bytes, its header announces {header.payload_bytes}")
    if crc32(view) != header.crc32:
        raise Refused("sample payload does not match its checksum")


def _check(header: SampleHeader, max_payload_bytes: int) -> None:
    check_name(header.engine, "sample header: engine")
    check_name(header.incarnation, "sample header: incarnation")
    check_digest(header.target, "sample header: target")
    item = ITEM_BYTES.get(header.dtype)
    if item is None:
        raise Refused(f"sample header: dtype {header.dtype!r} is none of {', '.join(ITEM_BYTES)}")
    if min(header.rows, header.payload_bytes) < 0 or not 1 <= header.states <= 16 or header.hidden < 1:
        raise Refused("sample header: a size is negative or absurd")
    if header.payload_bytes > max_payload_bytes:
        raise Refused(f"sample payload of {header.payload_bytes} bytes is over the limit of {max_payload_bytes}")
    if header.rows * header.states * header.hidden * item != header.payload_bytes:
        raise Refused("sample header: rows x states x hidden x itemsize is not the payload's size")
    if len(header.ids) != 4 * header.rows or sum(segment.rows for segment in header.segments) != header.rows:
        raise Refused("sample header: ids or segments do not cover the rows")
    known = len(header.requests)
    if any(not 0 <= s.request < known or s.rows < 1 or s.position < 0 for s in header.segments):
        raise Refused("sample header: a segment names no request, no row or no position")
    if any(not 0 <= end.request < known for end in header.ends):
        raise Refused("sample header: an end names no request")
    if any(
        len(ref.group) != 16 or not 0 <= ref.prompt_tokens < _INT32 or len(ref.request) > 256 for ref in header.requests
    ):
        raise Refused("sample header: a request has no proper group, prompt length or id")
    if any(segment.position + segment.rows >= _INT32 for segment in header.segments):
        raise Refused("sample header: a position is beyond int32")
    if any(not 0 <= token < _INT32 for end in header.ends for token in end.tail):
        raise Refused("sample header: a tail holds no token ids")
    totals = header.totals
    counts = (header.seq, totals.tapped, totals.sent, totals.shed, totals.ring, totals.skipped)
    if any(not 0 <= count < _EXACT for count in counts):
        raise Refused("sample header: a count is negative or absurd")
