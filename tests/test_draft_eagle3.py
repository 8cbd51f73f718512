"""The draft's arithmetic against Hugging Face's Llama layer, and the hot swap."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import VOCAB, make_draft, make_target
from tided.draft import checkpoint
from tided.draft.eagle3 import Eagle3, array_of, tensor_of
from tided.model.errors import Refused


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eagle3")
    make_draft(make_target(root / "target"), root / "draft")
    make_draft(make_target(root / "other-target", seed=1), root / "other")
    make_draft(root / "target", root / "smaller", draft_vocab=8)
    return root


@torch.inference_mode()
def test_version_zero_is_the_targets_last_layer(root: Path) -> None:
    """With q, k and v on the hidden half and fc passing the high layer, the draft computes the target's last layer and head."""
    model = AutoModelForCausalLM.from_pretrained(root / "target", dtype=torch.bfloat16).float().eval()
    draft = Eagle3.load(root / "draft")
    count, hidden = 11, 48
    high = torch.randn(1, count, hidden)
    positions = torch.arange(count).unsqueeze(0)
    aux = torch.cat([torch.randn(1, count, 2 * hidden), high], -1)
    h = draft.fuse(aux)
    torch.testing.assert_close(h, high)
    q, k, v = draft.project(torch.randn(1, count, hidden), h, positions)
    assert q.shape == (1, count, 6, 8)
    assert k.shape == v.shape == (1, count, 2, 8)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    pre = draft.finish(h, out.transpose(1, 2).flatten(2))
    theirs = model.model.layers[-1](
        high,
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(high, positions),
        attention_mask=torch.full((count, count), float("-inf")).triu(1)[None, None],
    )
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    torch.testing.assert_close(pre, theirs, rtol=1e-4, atol=1e-4)
    ids = torch.arange(draft.config.draft_vocab) + draft.d2t
    torch.testing.assert_close(
        draft.logits(pre), model.lm_head(model.model.norm(theirs))[..., ids], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_in_place(root: Path, dtype: torch.dtype) -> None:
    draft = Eagle3.load(root / "draft", dtype)
    storage = {name: tensor.data_ptr() for name, tensor in draft.state_dict(keep_vars=True).items()}
    assert {tensor.dtype for tensor in draft.parameters()} == {dtype}
    first = draft.version
    draft.assign(checkpoint.load(root / "other"))
    assert draft.version == checkpoint.version_of(root / "other") != first
    assert {name: tensor.data_ptr() for name, tensor in draft.state_dict(keep_vars=True).items()} == storage
    other = Eagle3.load(root / "other", dtype)
    for mine, theirs in zip(draft.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_swap_of_another_shape_changes_nothing(root: Path) -> None:
    draft = Eagle3.load(root / "draft")
    before = [tensor.clone() for tensor in draft.state_dict().values()]
    smaller = checkpoint.load(root / "smaller")
    with pytest.raises(Refused, match="configuration differs"):
        draft.assign(smaller)
    assert all(torch.equal(a, b) for a, b in zip(before, draft.state_dict().values(), strict=True))
    assert draft.version == checkpoint.version_of(root / "draft")


def test_state_survives_a_checkpoint(root: Path, tmp_path: Path) -> None:
    draft = Eagle3.load(root / "draft", torch.float32)
    assert checkpoint.write(tmp_path / "copy", draft.config, draft.state_tensors()) == draft.version
    assert int((torch.arange(draft.config.draft_vocab) + draft.d2t).max()) < VOCAB


def test_bf16_arrays() -> None:
    tensor = torch.randn(3, 5).bfloat16()
    assert torch.equal(tensor_of(array_of(tensor)), tensor)
