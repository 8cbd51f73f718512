"""The benches of the trainer against others: a draft with norms that ours lack, the timed training, and claims from made-up figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, rms_norm

from bench import cold, peers, recompute
from bench.peers import DEFAULTS, SETTINGS, TIME, TOKENS
from bench.peers_draft import NORMS, read
from bench.report import Claim
from tests.shards import greedy_samples, prompts, write_shard
from tests.tiny import VOCAB, make_draft, make_target
from tided.draft import checkpoint
from tided.draft.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from tided.draft.eagle3 import Eagle3
from tided.draft.formats import export_speculators
from tided.draft.tensors import read_header, read_tensor_entry, to_bf16, write_file
from tided.model.codec import to_plain
from tided.model.drafts import Evaluation
from tided.training.data import read_shard
from tided.training.losses import Frozen

HIDDEN, EPS = 48, 1e-6


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("model") / "target")


@pytest.fixture(scope="module")
def draft_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft(target_dir, tmp_path_factory.mktemp("draft") / "draft", draft_vocab=64)


def theirs(draft_dir: Path, target_dir: Path, out: Path, input_norm: torch.Tensor | None) -> Path:
    """As `speculators` writes it; with `input_norm`, with the norms that it sets by default."""
    export_speculators(draft_dir, target_dir, out)
    if input_norm is not None:
        plain = json.loads((out / CONFIG_FILE).read_text())
        (out / CONFIG_FILE).write_text(json.dumps(plain | dict.fromkeys(NORMS, True)))
        entries = read_header(out / WEIGHTS_FILE).entries
        tensors = {name: np.array(read_tensor_entry(out / WEIGHTS_FILE, entry)) for name, entry in entries.items()}
        write_file(out / WEIGHTS_FILE, tensors | {"input_norm.weight": to_bf16(input_norm.numpy())})
    return out


def test_a_draft_with_their_norms_computes_with_them(draft_dir: Path, target_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.rand(3 * HIDDEN).bfloat16().float()
    draft = read(theirs(draft_dir, target_dir, tmp_path / "theirs", weight), target_dir, tmp_path / "read")
    aux, h, out = torch.randn(5, 3 * HIDDEN), torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    layer = draft.midlayer
    with torch.no_grad():
        torch.testing.assert_close(draft.fuse(aux), linear(rms_norm(aux, (3 * HIDDEN,), weight, EPS), draft.fc.weight))
        residual = rms_norm(h, (HIDDEN,), layer.hidden_norm.weight, EPS) + layer.self_attn.o_proj(out)
        pre = residual + layer.mlp(rms_norm(residual, (HIDDEN,), layer.post_attention_layernorm.weight, EPS))
        normed = rms_norm(pre, (HIDDEN,), draft.norm.weight, EPS)
        torch.testing.assert_close(draft.finish(h, out), normed)
        torch.testing.assert_close(draft.logits(normed), linear(normed, draft.lm_head.weight))


def test_a_draft_without_them_is_as_it_was(draft_dir: Path, target_dir: Path, tmp_path: Path) -> None:
    draft = read(theirs(draft_dir, target_dir, tmp_path / "theirs", None), target_dir, tmp_path / "read")
    plain = Eagle3.load(draft_dir)
    aux, h, out = torch.randn(5, 3 * HIDDEN), torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    with torch.no_grad():
        assert torch.equal(draft.fuse(aux), plain.fuse(aux))
        assert torch.equal(draft.finish(h, out), plain.finish(h, out))
        assert torch.equal(draft.logits(h), plain.logits(h))


def test_norms_and_weights_must_agree(draft_dir: Path, target_dir: Path, tmp_path: Path) -> None:
    source = theirs(draft_dir, target_dir, tmp_path / "theirs", None)
    plain = json.loads((source / CONFIG_FILE).read_text())
    (source / CONFIG_FILE).write_text(json.dumps(plain | {"norm_before_fc": True}))
    with pytest.raises(ValueError, match="disagree"):
        read(source, target_dir, tmp_path / "read")


def test_a_timed_training_counts_each_pass(draft_dir: Path, target_dir: Path, tmp_path: Path) -> None:
    runs = read_shard(
        write_shard(tmp_path / "a.safetensors", greedy_samples(target_dir, prompts(8, VOCAB), 10)), HIDDEN
    )
    first = checkpoint.load(draft_dir)
    frozen = Frozen.read(target_dir, first, "cpu")
    given = {"passes": 2, "validation_share": 0.0, "batch_tokens": 16}
    (marked, early), (end, draft) = cold.train(first, runs, frozen, given, 3, marks=[0.0])
    asked = sum(len(run.queries(0)) for run in runs)
    assert end.tokens == 2 * asked
    assert marked.steps == 1
    assert marked.seconds < end.seconds
    assert not torch.equal(early.fc.weight, draft.fc.weight)


def test_recomputed_states_are_those_that_a_tap_gives(target_dir: Path, tmp_path: Path) -> None:
    runs = read_shard(
        write_shard(tmp_path / "a.safetensors", greedy_samples(target_dir, prompts(18, VOCAB), 4)), HIDDEN
    )
    states = list(recompute.Target(target_dir, torch.float32).states(runs))
    assert sorted(i for i, _ in states) == list(range(len(runs)))
    assert recompute.distance(states, runs) < 1e-3
    other = [(i, array[::-1]) for i, array in states]
    assert recompute.distance(other, runs) > 0.1


def ended(length: float, tokens: int, seconds: float) -> dict[str, Any]:
    lengths = tuple(length + 0.01 * i for i in range(-5, 6))
    scored = Evaluation("v", 3, tuple(f"{i:02x}" for i in range(11)), lengths, (50,) * 11, (0.5, 0.5, 0.5))
    return {"tokens": tokens, "steps": tokens // 100, "seconds": seconds, "evaluation": to_plain(scored)}


def test_claims_over_the_other_trainer() -> None:
    part = {
        DEFAULTS: [ended(1.2, 1000, 5.0), ended(1.5, 2000, 10.0)],
        SETTINGS: [ended(1.4, 1000, 4.0), ended(1.9, 2000, 8.0)],
        TOKENS: [ended(1.8, 1900, 3.0)],
        TIME: [ended(2.0, 3000, 4.0), ended(2.2, 6000, 8.0)],
    }
    claims = {claim.id: claim for claim in peers.claims_of([part] * 3)}
    assert claims["rate.over.defaults"].value == pytest.approx(3.75)
    assert claims["rate.over.settings"].value == pytest.approx(3.0)
    assert claims["rate.over.settings"].met
    assert claims["tokens.over.defaults"].value == pytest.approx(0.3)
    assert claims["tokens.over.defaults.low"].met
    assert claims["tokens.over.settings"].value == pytest.approx(-0.1)
    assert claims["tokens.over.settings.low"].met is False
    assert claims["time.over.settings.low"].met
    assert claims["reached.time.0"].value == pytest.approx(2.0)
    assert "2,000 tokens, 8 s" in claims["reached.settings.1"].what


def test_claims_over_recomputed_states() -> None:
    def claims(forward_s: float) -> dict[str, Claim]:
        found = recompute.claims_of([forward_s] * 3, [20.0] * 3, [5000] * 3, 9000, [300.0, 200.0], 0.01)
        return {claim.id: claim for claim in found}

    assert claims(14.0)["offline"].value == pytest.approx(1.7)
    assert claims(14.0)["online"].value == pytest.approx(3.1)
    assert claims(14.0)["online"].met
    assert claims(13.0)["offline"].met is False
    assert claims(13.0)["online"].met is False
