"""A checkpoint is believed only when every byte of it makes sense."""

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.tiny import VOCAB, make_draft, make_target
from tided.draft import checkpoint, target
from tided.draft.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from tided.draft.target import TargetShape
from tided.draft.tensors import DTYPES, read_header, to_bf16, to_float32, write_file
from tided.model.errors import Refused, Unavailable


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    return make_draft(make_target(root / "target"), root / "draft")


@pytest.fixture
def draft(good: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "draft"
    copy.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (copy / name).write_bytes((good / name).read_bytes())
    return copy


def tensors_of(directory: Path) -> dict[str, Any]:
    return dict(checkpoint.load(directory).tensors)


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_version_is_the_content(draft: Path, good: Path) -> None:
    version = checkpoint.verify(draft, TargetShape(48, VOCAB))
    assert version == checkpoint.version_of(draft) == checkpoint.version_of(good)
    assert checkpoint.vocab_id_of(draft) == checkpoint.load(good).vocab_id
    config = json.loads((draft / CONFIG_FILE).read_text())
    (draft / CONFIG_FILE).write_text(json.dumps(config))
    assert checkpoint.verify(draft) != version


def test_other_readers_agree(draft: Path) -> None:
    tensors = tensors_of(draft)
    with safe_open(draft / WEIGHTS_FILE, "pt") as file:
        assert set(file.keys()) == set(tensors) == set(checkpoint.expected_tensors(checkpoint.read_config(draft)))
        for name, mine in tensors.items():
            theirs = file.get_tensor(name)
            if mine.dtype == np.uint16:
                mine, theirs = to_float32(mine), theirs.float()
            np.testing.assert_array_equal(theirs.numpy(), mine)


def test_another_targets_draft(draft: Path) -> None:
    with pytest.raises(Refused, match="another target: hidden 48 and vocabulary 96, this target has 64 and 96"):
        checkpoint.verify(draft, TargetShape(64, VOCAB))
    with pytest.raises(Refused, match="another target"):
        checkpoint.verify(draft, TargetShape(48, 97))


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated(draft: Path, keep: float) -> None:
    raw = (draft / WEIGHTS_FILE).read_bytes()
    (draft / WEIGHTS_FILE).write_bytes(raw[: int(len(raw) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(Refused, match="truncated"):
        checkpoint.verify(draft)


def test_trailing_bytes(draft: Path) -> None:
    with (draft / WEIGHTS_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(Refused, match="too long"):
        checkpoint.verify(draft)


def test_header_cap(draft: Path) -> None:
    (draft / WEIGHTS_FILE).write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(Refused, match="header of 1099511627776 bytes"):
        checkpoint.verify(draft)
    with pytest.raises(Refused, match="header of 1099511627776 bytes"):
        read_header(draft / WEIGHTS_FILE)


def test_oversize_file_is_not_read(draft: Path) -> None:
    with (draft / WEIGHTS_FILE).open("ab") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(Refused, match="larger than"):
        checkpoint.verify(draft)


def test_overlapping_tensors(draft: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        gate, up = header["midlayer.mlp.gate_proj.weight"], header["midlayer.mlp.up_proj.weight"]
        gate["data_offsets"] = up["data_offsets"]

    edit_header(draft / WEIGHTS_FILE, overlap)
    with pytest.raises(Refused, match="overlaps"):
        checkpoint.verify(draft)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "model.embed_tokens.weight"])
def test_embedding_present(draft: Path, name: str) -> None:
    write_file(draft / WEIGHTS_FILE, tensors_of(draft) | {name: np.zeros((1, 48), np.uint16)})
    with pytest.raises(Refused, match="embed_tokens"):
        checkpoint.verify(draft)


def test_missing_foreign_and_misshapen_tensors(draft: Path) -> None:
    tensors = tensors_of(draft)
    write_file(draft / WEIGHTS_FILE, {name: value for name, value in tensors.items() if name != "fc.weight"})
    with pytest.raises(Refused, match=r"'fc.weight' is missing"):
        checkpoint.verify(draft)
    write_file(draft / WEIGHTS_FILE, tensors | {"fc.bias": np.zeros(1, np.uint16)})
    with pytest.raises(Refused, match="does not belong"):
        checkpoint.verify(draft)
    write_file(draft / WEIGHTS_FILE, tensors | {"fc.weight": tensors["fc.weight"].reshape(-1)})
    with pytest.raises(Refused, match=r"'fc.weight' is BF16 \(6912,\), expected BF16 \(48, 144\)"):
        checkpoint.verify(draft)
    write_file(draft / WEIGHTS_FILE, tensors | {"norm.weight": np.ones(48, np.float16)})
    with pytest.raises(Refused, match="is F16"):
        checkpoint.verify(draft)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80, 0xFFFF])
def test_not_finite(draft: Path, bits: int) -> None:
    tensors = tensors_of(draft)
    head = tensors["lm_head.weight"].copy()
    head[3, 5] = bits
    write_file(draft / WEIGHTS_FILE, tensors | {"lm_head.weight": head})
    with pytest.raises(Refused, match=r"'lm_head.weight' holds NaN or infinite"):
        checkpoint.verify(draft)


def test_vocabulary_map(draft: Path) -> None:
    tensors = tensors_of(draft)
    for index, offset in ((0, -1), (0, VOCAB), (1, -1)):
        d2t = tensors["d2t"].copy()
        d2t[index] = offset
        write_file(draft / WEIGHTS_FILE, tensors | {"d2t": d2t})
        with pytest.raises(Refused, match="d2t"):
            checkpoint.verify(draft)
    write_file(draft / WEIGHTS_FILE, tensors | {"t2d": ~tensors["t2d"]})
    with pytest.raises(Refused, match="disagree"):
        checkpoint.verify(draft)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["LlamaForCausalLM"], "architectures"),
        ("num_hidden_layers", 2, "num_hidden_layers"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("norm_before_residual", True, "norm_before_residual"),
        ("draft_vocab_size", None, "draft_vocab_size"),
        ("draft_vocab_size", VOCAB + 1, "exceeds"),
        ("hidden_size", 2**40, "hidden_size"),
        ("hidden_size", True, "hidden_size"),
        ("head_dim", 7, "even"),
        ("rms_norm_eps", 0, "rms_norm_eps"),
        ("rope_theta", float("nan"), "rope_theta"),
    ],
)
def test_config(draft: Path, key: str, value: Any, message: str) -> None:
    config = json.loads((draft / CONFIG_FILE).read_text())
    (draft / CONFIG_FILE).write_text(json.dumps(config | {key: value}))
    with pytest.raises(Refused, match=message):
        checkpoint.verify(draft)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file"):
        checkpoint.verify(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("[1]")
    with pytest.raises(Refused, match="not a JSON table"):
        checkpoint.read_config(tmp_path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_bits_in_the_header(good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever a flipped bit makes of the header, there is one `Refused`, or a checkpoint with another version."""
    directory = tmp_path_factory.getbasetemp() / "flipped"
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_FILE).write_bytes((good / CONFIG_FILE).read_bytes())
    raw = bytearray((good / WEIGHTS_FILE).read_bytes())
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, header_bytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (directory / WEIGHTS_FILE).write_bytes(raw)
    with contextlib.suppress(Refused):
        assert checkpoint.verify(directory) != checkpoint.version_of(good)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_garbage(good: Path, tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "garbage"
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_FILE).write_bytes((good / CONFIG_FILE).read_bytes())
    (directory / WEIGHTS_FILE).write_bytes(len(garbage).to_bytes(8, "little") + garbage)
    with pytest.raises(Refused):
        checkpoint.verify(directory)


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120),
        min_size=1,
    )
)
def test_rounding_to_bf16(values: list[float]) -> None:
    import torch

    array = np.array(values, np.float32)
    theirs = torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bf16(array), theirs)
    np.testing.assert_array_equal(to_bf16(to_float32(theirs)), theirs)


def test_every_dtype_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    arrays = {name: np.zeros((2, 3), dtype) for name, dtype in DTYPES.items()}
    write_file(path, arrays, {"b": "2", "a": "1"})
    header = read_header(path)
    assert {name: entry.dtype for name, entry in header.entries.items()} == {name: name for name in DTYPES}
    assert header.metadata == {"a": "1", "b": "2"}


def test_full_disk(draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays, no partial one is left, and the error can be retried."""
    version = checkpoint.verify(draft)
    loaded = checkpoint.load(draft)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match="No space left on device"):
        checkpoint.write(draft, loaded.config, loaded.tensors)
    assert checkpoint.load(draft).tensors.keys() == loaded.tensors.keys()
    assert {path.name for path in draft.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    assert version == checkpoint.version_of(draft)


def test_target_shape_of_a_real_directory(tmp_path: Path) -> None:
    directory = make_target(tmp_path / "target")
    info = target.describe(directory)
    assert (info.layers, info.hidden, info.vocab, info.aux_layers) == (8, 48, VOCAB, (2, 4, 5))
    assert target.describe(directory) == info
    other = make_target(tmp_path / "other", seed=1)
    assert target.describe(other).digest != info.digest
