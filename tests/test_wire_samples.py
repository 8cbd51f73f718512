"""The sample header: what is encoded decodes to itself; whatever else arrives is refused or consistent (promise 14)."""

import struct
import zlib
from dataclasses import replace
from typing import cast

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tided.model.engines import TapTotals
from tided.model.errors import Refused
from tided.wire.checksum import crc32
from tided.wire.samples import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    End,
    RequestRef,
    SampleHeader,
    Segment,
    check_payload,
    decode_header,
    encode_header,
)

naturals = st.integers(0, 2**31 - 1)


@st.composite
def headers(draw: st.DrawFn) -> SampleHeader:
    refs = draw(
        st.lists(st.builds(RequestRef, st.text(max_size=40), naturals, st.binary(min_size=16, max_size=16)), max_size=4)
    )
    index = st.integers(0, max(len(refs) - 1, 0))
    segments = (
        draw(st.lists(st.builds(Segment, index, st.integers(0, 10**6), st.integers(1, 50)), max_size=6)) if refs else []
    )
    ends = (
        draw(st.lists(st.builds(End, index, st.text(max_size=8), st.tuples(naturals, naturals)), max_size=3))
        if refs
        else []
    )
    rows = sum(segment.rows for segment in segments)
    states, hidden = draw(st.integers(1, 4)), draw(st.integers(1, 64))
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    ids = struct.pack(f"<{rows}i", *range(rows))
    size = rows * states * hidden * ITEM_BYTES[dtype]
    return SampleHeader(
        engine="e1",
        incarnation="i-1",
        seq=draw(st.integers(0, 2**53 - 1)),
        target="0" * 64,
        dtype=dtype,
        rows=rows,
        states=states,
        hidden=hidden,
        has_last=draw(st.booleans()),
        ids=ids,
        requests=tuple(refs),
        segments=tuple(segments),
        ends=tuple(ends),
        totals=TapTotals(*draw(st.tuples(*[naturals] * 5))),
        payload_bytes=size,
        crc32=zlib.crc32(bytes(size)),
        at_ms=draw(naturals),
    )


SAMPLE = SampleHeader(
    engine="e1",
    incarnation="i-1",
    seq=3,
    target="0" * 64,
    dtype="bfloat16",
    rows=2,
    states=3,
    hidden=4,
    has_last=False,
    ids=struct.pack("<2i", 5, 6),
    requests=(RequestRef("r", 7, bytes(16)),),
    segments=(Segment(0, 9, 2),),
    ends=(End(0, "stop", (1,)),),
    totals=TapTotals(2, 0, 0, 2, 0),
    payload_bytes=48,
    crc32=zlib.crc32(bytes(48)),
    at_ms=1,
)


@given(headers())
@settings(deadline=None)
def test_what_is_encoded_decodes_to_itself(header: SampleHeader) -> None:
    assert decode_header(encode_header(header)) == header
    check_payload(header, bytes(header.payload_bytes))


@given(st.binary(max_size=10_000))
def test_the_checksum_is_that_of_zlib_whatever_computes_it(data: bytes) -> None:
    assert crc32(memoryview(data)) == zlib.crc32(data)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_mutated_header_is_refused_or_consistent(data: st.DataObject) -> None:
    raw = bytearray(encode_header(SAMPLE))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(len(raw) - 2, len(raw)))]
    try:
        header = decode_header(bytes(raw))
    except Refused:
        return
    assert header.payload_bytes == header.rows * header.states * header.hidden * ITEM_BYTES[header.dtype]
    assert len(header.ids) == 4 * header.rows
    assert sum(segment.rows for segment in header.segments) == header.rows
    assert all(segment.request < len(header.requests) for segment in header.segments)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(Refused):
        decode_header(noise)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused_not_guessed(version: object) -> None:
    plain = msgpack.unpackb(encode_header(SAMPLE))
    plain["v"] = version
    with pytest.raises(Refused, match="schema version"):
        decode_header(cast("bytes", msgpack.packb(plain)))


def test_a_field_of_the_future_is_refused() -> None:
    plain = msgpack.unpackb(encode_header(SAMPLE))
    plain["compression"] = "zstd"
    with pytest.raises(Refused, match="unknown field 'compression'"):
        decode_header(cast("bytes", msgpack.packb(plain)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": "../e1"}, "engine"),
        ({"target": "xyz"}, "digest"),
        ({"dtype": "float64"}, "dtype"),
        ({"rows": -2}, "size"),
        ({"rows": 2**40}, "payload's size"),
        ({"states": 0}, "size"),
        ({"payload_bytes": 2**30}, "limit"),
        ({"payload_bytes": 46}, "payload's size"),
        ({"ids": b"1234"}, "cover"),
        ({"segments": (Segment(0, 9, 1),)}, "cover"),
        ({"segments": (Segment(1, 9, 2),)}, "segment"),
        ({"segments": (Segment(0, -1, 2),)}, "segment"),
        ({"segments": (Segment(0, 2**31 - 1, 2),)}, "int32"),
        ({"ends": (End(4, "stop", ()),)}, "end"),
        ({"ends": (End(0, "stop", (2**31,)),)}, "tail"),
        ({"requests": (RequestRef("r" * 257, 7, bytes(16)),)}, "request"),
        ({"requests": (RequestRef("r", 7, b"short"),)}, "request"),
        ({"requests": (RequestRef("r", 2**31, bytes(16)),)}, "request"),
        ({"seq": 2**53}, "count"),
        ({"totals": TapTotals(-1)}, "count"),
    ],
)
def test_an_inconsistent_header_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(Refused, match=words):
        decode_header(encode_header(replace(SAMPLE, **change)))  # pyright: ignore[reportArgumentType]


def test_an_oversize_header_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(Refused, match="limit"):
        decode_header(bytes(MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize("payload", [bytes(47), bytes(49), b"\1" + bytes(47)])
def test_another_payload_than_announced_is_refused(payload: bytes) -> None:
    with pytest.raises(Refused, match="payload"):
        check_payload(SAMPLE, payload)
