"""Other trainers' drafts: what they write comes in with equal weights, and what would compute otherwise is refused by name.

The export was loaded by `speculators` 0.9.0, which gave equal weights and logits, and wrote the config that `SPECULATORS` is taken from.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ctl_run import tidectl
from tests.shards import train_spec
from tests.tiny import VOCAB, make_draft, make_target
from tided.draft import checkpoint, target
from tided.draft.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from tided.draft.formats import export_speculators, import_draft
from tided.draft.tensors import Array, to_bf16, to_float32, write_file
from tided.model.errors import Refused
from tided.training.trainer import train

HIDDEN = 48
LAYER = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB,
}
SPECULATORS: dict[str, Any] = {
    "architectures": ["Eagle3DraftModel"],
    "auto_map": {"": "config.Eagle3SpeculatorConfig"},
    "draft_vocab_size": 64,
    "dtype": "bfloat16",
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "embed_requires_grad": False,
    "fc_norm": False,
    "norm_before_fc": False,
    "norm_before_residual": False,
    "norm_output": False,
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 4, "verifier_accept_k": 1}
        ],
        "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "target"},
    },
    "speculators_model_type": "eagle3",
    "speculators_version": "0.9.0",
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "transformer_layer_config": LAYER,
}


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("model") / "target")


@pytest.fixture(scope="module")
def draft(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft(target_dir, tmp_path_factory.mktemp("draft") / "draft", draft_vocab=64)


def embedding(target_dir: Path) -> Array:
    return to_bf16(target.read_tensor(target_dir, "model.embed_tokens.weight"))


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Array]) -> Path:
    directory.mkdir()
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    write_file(directory / WEIGHTS_FILE, tensors)
    return directory


def theirs(draft: Path, target_dir: Path, prefix: str = "layers.0.") -> dict[str, Array]:
    tensors = {name.replace("midlayer.", prefix): np.array(a) for name, a in checkpoint.load(draft).tensors.items()}
    return tensors | {"embed_tokens.weight": embedding(target_dir)}


def test_what_speculators_saves_comes_in(draft: Path, target_dir: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "theirs", SPECULATORS, theirs(draft, target_dir))
    assert import_draft(source, target_dir, tmp_path / "ours") == checkpoint.verify(draft)


def test_an_export_comes_back_as_it_was(draft: Path, target_dir: Path, tmp_path: Path) -> None:
    """And has what speculators 0.9 reads: its keys with its types, and its names."""
    export_speculators(draft, target_dir, tmp_path / "theirs")
    assert import_draft(tmp_path / "theirs", target_dir, tmp_path / "ours") == checkpoint.verify(draft)
    config = json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())
    for mine, known in ((config, SPECULATORS), (config["transformer_layer_config"], LAYER)):
        assert set(mine) <= set(known)
        for key in set(mine) - {"architectures", "speculators_config", "transformer_layer_config"}:
            assert mine[key] == known[key], key
    speculators, known = config["speculators_config"], SPECULATORS["speculators_config"]
    assert set(speculators) == set(known)
    assert speculators["proposal_methods"][0].items() <= known["proposal_methods"][0].items()
    assert set(speculators["verifier"]) == set(known["verifier"])


def test_a_draft_for_sglang_or_vllm_comes_in(draft: Path, target_dir: Path, tmp_path: Path) -> None:
    """As published ones are: half precision, no t2d, no explicit sizes, layer ids as SGLang counts them."""
    config = {key: value for key, value in LAYER.items() if key not in ("head_dim", "rope_parameters")}
    config |= {"architectures": ["LlamaForCausalLMEagle3"], "rope_theta": 10000.0}
    config |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}
    tensors = theirs(draft, target_dir, "midlayer.")
    del tensors["t2d"]
    wide = {name: to_float32(a) if a.dtype == np.uint16 else a for name, a in tensors.items()}
    half = {name: a.astype(np.float16) if a.dtype == np.float32 else a for name, a in wide.items()}
    version = import_draft(write(tmp_path / "wide", config, wide), target_dir, tmp_path / "from-wide")
    assert version == checkpoint.verify(draft)
    import_draft(write(tmp_path / "half", config, half), target_dir, tmp_path / "from-half")
    for name, array in checkpoint.load(tmp_path / "from-half").tensors.items():
        np.testing.assert_allclose(
            to_float32(array), to_float32(checkpoint.load(draft).tensors[name]), rtol=0.01, atol=1e-4
        )


def test_an_imported_draft_is_trained_further(tmp_path: Path) -> None:
    spec = train_spec(tmp_path, passes=1)
    export_speculators(Path(spec.draft_dir), Path(spec.target_dir), tmp_path / "theirs")
    import_draft(tmp_path / "theirs", Path(spec.target_dir), tmp_path / "ours")
    result = train(replace(spec, draft_dir=str(tmp_path / "ours")), tmp_path / "out", lambda _: None)
    export_speculators(Path(result.staged), Path(spec.target_dir), tmp_path / "further")
    assert import_draft(tmp_path / "further", Path(spec.target_dir), tmp_path / "again") == result.version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_before_residual": True}, "norm_before_residual is set"),
        ({"norm_output": True}, "norm_output is set"),
        ({"speculators_model_type": "dflash"}, "only eagle3"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, "reads the states of layers"),
        ({"transformer_layer_config": LAYER | {"num_hidden_layers": 2}}, "num_hidden_layers is '2'"),
        ({"transformer_layer_config": LAYER | {"model_type": "qwen3"}}, "model_type is 'qwen3'"),
        ({"transformer_layer_config": LAYER | {"vocab_size": 97}}, "another target"),
        (
            {"transformer_layer_config": LAYER | {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}},
            "RoPE",
        ),
        ({"transformer_layer_config": LAYER | {"num_attention_heads": "6"}}, "num_attention_heads must be"),
    ],
)
def test_what_computes_otherwise_is_refused(
    draft: Path, target_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "theirs", SPECULATORS | change, theirs(draft, target_dir))
    with pytest.raises(Refused, match=message):
        import_draft(source, target_dir, tmp_path / "ours")


def test_tensors_that_do_not_fit_are_refused(draft: Path, target_dir: Path, tmp_path: Path) -> None:
    tensors = theirs(draft, target_dir)
    own = to_bf16(to_float32(tensors["embed_tokens.weight"]) * np.float32(1.1))
    cases: dict[str, dict[str, Array]] = {
        "an embedding of its own": tensors | {"embed_tokens.weight": own},
        "does not map": tensors | {"d2t": tensors["d2t"] + VOCAB},
        "missing or too many": tensors | {"layers.0.self_attn.q_norm.weight": own[0]},
        "without the tensor 'd2t'": {name: a for name, a in tensors.items() if name != "d2t"},
        "'lm_head.weight' is missing": {name: a for name, a in tensors.items() if name != "lm_head.weight"},
    }
    for number, (message, changed) in enumerate(cases.items()):
        source = write(tmp_path / str(number), SPECULATORS, changed)
        with pytest.raises(Refused, match=message):
            import_draft(source, target_dir, tmp_path / f"out-{number}")


def test_the_commands(draft: Path, target_dir: Path, tmp_path: Path) -> None:
    exported = tidectl("drafts", "export", str(draft), str(target_dir), str(tmp_path / "theirs"))
    assert exported.code == 0, exported.err
    imported = tidectl("drafts", "import", str(tmp_path / "theirs"), str(target_dir), str(tmp_path / "ours"), "--json")
    assert json.loads(imported.out)["version"] == checkpoint.verify(draft)
    again = tidectl("drafts", "import", str(target_dir), str(target_dir), str(tmp_path / "no"))
    assert again.code == 1
    assert "not an EAGLE-3 draft" in again.err
