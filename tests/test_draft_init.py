"""Version 0: what it copies from the target, and that it is reproducible."""

from pathlib import Path

import numpy as np
import pytest

from tests.tiny import VOCAB, make_target
from tided.draft import checkpoint, init, target
from tided.draft.tensors import to_bf16, to_float32
from tided.model.errors import Refused


def test_version_zero(tmp_path: Path) -> None:
    directory = make_target(tmp_path / "target")
    version = init.init_draft(directory, tmp_path / "a", 40)
    assert version == init.init_draft(directory, tmp_path / "b", 40)
    tensors = checkpoint.load(tmp_path / "a", target.read_config(directory).shape).tensors
    fc = to_float32(tensors["fc.weight"])
    np.testing.assert_array_equal(fc, np.concatenate([np.zeros((48, 96)), np.eye(48)], 1))
    q = tensors["midlayer.self_attn.q_proj.weight"]
    last = to_bf16(target.read_tensor(directory, "model.layers.7.self_attn.q_proj.weight"))
    np.testing.assert_array_equal(q[:, 48:], last)
    assert not q[:, :48].any()
    head = to_bf16(target.read_tensor(directory, "model.embed_tokens.weight"))  # the tiny target is tied
    np.testing.assert_array_equal(tensors["lm_head.weight"], head[checkpoint.target_ids(tensors["d2t"])])


def test_vocabulary_is_special_tokens_and_lowest_ids(tmp_path: Path) -> None:
    directory = make_target(tmp_path / "target")
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace('"eos_token_id": 2', f'"eos_token_id": [2, {VOCAB - 1}]'))
    assert init.default_vocabulary(directory, 10).tolist() == [*range(9), VOCAB - 1]
    assert init.default_vocabulary(directory, VOCAB).tolist() == list(range(VOCAB))


def test_larger_than_the_vocabulary_is_the_vocabulary(tmp_path: Path) -> None:
    init.init_draft(make_target(tmp_path / "target"), tmp_path / "draft", 8192)
    assert checkpoint.read_config(tmp_path / "draft").draft_vocab == VOCAB


def test_too_shallow(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="6 layers is too shallow"):
        init.init_draft(make_target(tmp_path / "target", layers=6), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"config.json: no such file"):
        init.init_draft(tmp_path / "nothing", tmp_path / "draft")
