"""Tapped rows of a real forward, whole and with each fault that an engine may have: the fault is named, and nothing else is."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from tests.tiny import VOCAB, make_target
from tided.draft import reference
from tided.draft.reference import FILE, Reference, sequences
from tided.draft.target import describe, read_tensor
from tided.draft.tensors import to_bf16, to_float32
from tided.model.engines import TargetInfo
from tided.model.jobs import JobKind, JobSpec
from tided.model.verification import Check, CheckOutcome
from tided.services import diagnosis
from tided.services.diagnosis import Probed, Shape, Tapped
from tided.services.embeddings import resemble
from tided.training.reference import make_reference

LAYERS = 8
TOLERANCE = 0.05
ANSWER = 12


@dataclass(frozen=True)
class Scene:
    path: Path
    info: TargetInfo
    reference: Reference
    probes: tuple[Probed, ...]
    last: tuple[NDArray[Any], ...]  # of each probe, the states before the final norm

    @property
    def shape(self) -> Shape:
        return Shape(self.info.aux_layers, True)

    def judged(self, probes: tuple[Probed, ...] | None = None, shape: Shape | None = None) -> dict[str, Check]:
        checks = diagnosis.states(self.reference, probes or self.probes, shape or self.shape, TOLERANCE)
        return {check.name: check for check in checks}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    root = tmp_path_factory.mktemp("diagnosis")
    path = make_target(root / "target", layers=LAYERS)
    info = describe(path)
    fixed = sequences(VOCAB)
    spec = JobSpec(
        JobKind.REFERENCE,
        "e",
        info.digest,
        str(path),
        token_ids=tuple(token for ids in fixed for token in ids),
        options={"lengths": [len(ids) for ids in fixed]},
    )
    make_reference(spec, root, lambda _: None)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    probes, last = list[Probed](), list[NDArray[Any]]()
    for k, ids in enumerate(fixed):
        prompt = (*ids, 5 + k, 9 + k)
        with torch.inference_mode():
            whole = model.generate(
                torch.tensor([prompt]), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, eos_token_id=None
            )
            before: list[torch.Tensor] = []
            handle = model.model.norm.register_forward_pre_hook(lambda _, args, into=before: into.append(args[0]))
            hidden = model.model(whole[:, :-1], output_hidden_states=True).hidden_states
            handle.remove()
        states = torch.stack([hidden[layer][0] for layer in (*info.aux_layers, LAYERS)], 1).numpy()
        tapped = Tapped(
            np.arange(len(states)), to_bf16(states), dict(enumerate(whole[0].tolist())), prompt_tokens=len(prompt)
        )
        probes.append(Probed(prompt, k, tapped, again=replace(tapped, prompt_tokens=len(states))))
        last.append(before[0][0].numpy())
    return Scene(path, info, reference.read(root / FILE), tuple(probes), tuple(last))


def with_bits(scene: Scene, bits: list[NDArray[Any]]) -> tuple[Probed, ...]:
    return tuple(
        replace(probe, tapped=replace(probe.tapped, bits=of_probe))
        for probe, of_probe in zip(scene.probes, bits, strict=True)
    )


def floats(scene: Scene) -> list[NDArray[Any]]:
    return [to_float32(probe.tapped.bits) for probe in scene.probes]


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.outcome is CheckOutcome.FAILED}


def test_what_is_right_passes_every_check(scene: Scene) -> None:
    checks = scene.judged()
    assert [check.outcome for check in checks.values()] == [CheckOutcome.OK] * 5, checks
    assert diagnosis.tokens(scene.probes).outcome is CheckOutcome.OK
    assert diagnosis.finite([probe.tapped for probe in scene.probes]).outcome is CheckOutcome.OK
    assert diagnosis.decoding(scene.probes, TOLERANCE).outcome is CheckOutcome.OK
    emitted = diagnosis.greedy(scene.path, [probe.tapped for probe in scene.probes], scene.shape, sampled=False)
    assert emitted.outcome is CheckOutcome.OK, emitted
    assert diagnosis.declared(scene.info, scene.info).outcome is CheckOutcome.OK


def test_another_layer_is_named(scene: Scene) -> None:
    low, middle, high = scene.info.aux_layers
    checks = scene.judged(shape=Shape((low + 1, middle, high), True))
    assert failed(checks) == {"layer ids"}
    assert f"those before layer {low + 1} are those before layer {low}" in checks["layer ids"].measured


def test_layers_in_another_order_are_named(scene: Scene) -> None:
    checks = scene.judged(with_bits(scene, [probe.tapped.bits[:, [1, 0, 2, 3]] for probe in scene.probes]))
    assert failed(checks) == {"layer ids"}


@pytest.mark.parametrize(("by", "words"), [(1, "one position late"), (-1, "one position early")])
def test_rows_at_another_position_are_named(scene: Scene, by: int, words: str) -> None:
    checks = scene.judged(with_bits(scene, [np.roll(probe.tapped.bits, by, axis=0) for probe in scene.probes]))
    assert failed(checks) == {"token alignment"}
    assert words in checks["token alignment"].measured


def test_a_last_state_before_the_norm_is_named(scene: Scene) -> None:
    bits = [probe.tapped.bits.copy() for probe in scene.probes]
    for of_probe, raw in zip(bits, scene.last, strict=True):
        of_probe[:, 3] = to_bf16(raw)
    checks = scene.judged(with_bits(scene, bits))
    assert failed(checks) == {"norms"}
    assert checks["norms"].measured == "the last state is the one before the final norm"


def test_normed_aux_states_are_named(scene: Scene) -> None:
    values = floats(scene)
    for of_probe in values:
        aux = of_probe[:, :3]
        of_probe[:, :3] = aux / np.sqrt(np.square(aux).mean(-1, keepdims=True))
    checks = scene.judged(with_bits(scene, [to_bf16(of_probe) for of_probe in values]))
    assert failed(checks) == {"norms"}
    assert "normed" in checks["norms"].measured


def test_float16_bytes_under_a_bfloat16_header_are_named(scene: Scene) -> None:
    bits = [of_probe.astype(np.float16).view(np.uint16) for of_probe in floats(scene)]
    checks = scene.judged(with_bits(scene, bits))
    assert failed(checks) == {"dtype"}
    assert "float16" in checks["dtype"].measured


def test_a_scale_is_named(scene: Scene) -> None:
    checks = scene.judged(with_bits(scene, [to_bf16(of_probe * 0.25) for of_probe in floats(scene)]))
    assert failed(checks) == {"dtype"}
    assert "0.25 times" in checks["dtype"].measured


def test_rows_of_another_request_are_named(scene: Scene) -> None:
    first, second, third = scene.probes
    size = len(first.tapped.positions)
    swapped = second.tapped.bits.copy()
    swapped[: len(scene.reference.sequences[0])] = first.tapped.bits[: len(scene.reference.sequences[0])]
    other = first.tapped.bits.copy()
    other[:] = second.tapped.bits[:size]
    probes = (
        replace(first, tapped=replace(first.tapped, bits=other)),
        replace(second, tapped=replace(second.tapped, bits=swapped)),
        replace(third, tapped=replace(third.tapped, bits=first.tapped.bits[:0], positions=first.tapped.positions[:0])),
    )
    checks = scene.judged(probes)
    assert "token alignment" in failed(checks)
    assert "another request" in checks["token alignment"].measured


def test_other_weights_fit_nothing(scene: Scene) -> None:
    draw = np.random.default_rng(3)
    noise = [to_bf16(draw.normal(size=probe.tapped.bits.shape).astype(np.float32)) for probe in scene.probes]
    checks = scene.judged(with_bits(scene, noise))
    assert failed(checks) == {"accuracy"}
    assert "like those of no layer" in checks["accuracy"].measured
    assert checks["layer ids"].outcome is CheckOutcome.SKIPPED


def test_a_quantised_target_is_told_to_raise_the_tolerance(scene: Scene) -> None:
    draw = np.random.default_rng(4)
    rough = [
        to_bf16(v + 0.08 * np.linalg.norm(v, axis=-1, keepdims=True) * _unit(draw.normal(size=v.shape)))
        for v in floats(scene)
    ]
    checks = scene.judged(with_bits(scene, rough))
    assert failed(checks) == {"accuracy"}
    assert "right layer" in checks["accuracy"].measured
    assert "self_test.tolerance" in checks["accuracy"].advice


def test_a_missing_state_is_named(scene: Scene) -> None:
    tapped = [probe.tapped for probe in scene.probes]
    assert diagnosis.row_shape(tapped, scene.shape, 48).outcome is CheckOutcome.OK
    without = replace(tapped[1], bits=tapped[1].bits[:, :3])
    check = diagnosis.row_shape([tapped[0], without], scene.shape, 48)
    assert check.outcome is CheckOutcome.FAILED
    assert "3 states of 48 values" in check.measured


def test_token_ids_that_are_moved_or_mapped_are_told_apart(scene: Scene) -> None:
    late = tuple(
        replace(
            probe,
            tapped=replace(
                probe.tapped,
                tokens={p: probe.tapped.tokens[max(p - 1, 0)] for p in probe.tapped.tokens},
                positions=probe.tapped.positions[1:],
                bits=probe.tapped.bits[1:],
            ),
        )
        for probe in scene.probes
    )
    assert "one position late" in diagnosis.tokens(late).measured
    mapped = tuple(
        replace(probe, tapped=replace(probe.tapped, tokens=dict.fromkeys(range(64), 7))) for probe in scene.probes
    )
    assert "other token ids" in diagnosis.tokens(mapped).measured


def test_rows_that_are_no_numbers_are_found(scene: Scene) -> None:
    broken = scene.probes[0].tapped.bits.copy()
    broken[2, 1, 3] = 0x7FC0
    assert "NaN" in diagnosis.finite([replace(scene.probes[0].tapped, bits=broken)]).measured
    assert "zero" in diagnosis.finite([replace(scene.probes[0].tapped, bits=broken * np.uint16(0))]).measured


def test_decoding_rows_one_position_off_are_named(scene: Scene) -> None:
    late = with_bits(scene, [np.roll(probe.tapped.bits, 1, axis=0) for probe in scene.probes])
    check = diagnosis.decoding(late, TOLERANCE)
    assert check.outcome is CheckOutcome.FAILED
    assert "one position late" in check.measured


def test_a_head_that_did_not_emit_the_tokens_is_found(scene: Scene) -> None:
    tapped = [
        replace(probe.tapped, tokens={p: (token + 1) % VOCAB for p, token in probe.tapped.tokens.items()})
        for probe in scene.probes
    ]
    assert diagnosis.greedy(scene.path, tapped, scene.shape, sampled=False).outcome is CheckOutcome.FAILED
    assert diagnosis.greedy(scene.path, tapped, scene.shape, sampled=True).outcome is CheckOutcome.FAILED
    without = Shape(scene.info.aux_layers, False)
    assert diagnosis.greedy(scene.path, tapped, without, sampled=False).outcome is CheckOutcome.SKIPPED


def test_what_a_prefix_cache_hides_is_skipped_not_failed(scene: Scene) -> None:
    hidden = tuple(
        replace(
            probe,
            tapped=replace(
                probe.tapped,
                positions=probe.tapped.positions[len(probe.prompt) :],
                bits=probe.tapped.bits[len(probe.prompt) :],
            ),
        )
        for probe in scene.probes
    )
    assert {check.outcome for check in scene.judged(hidden).values()} == {CheckOutcome.SKIPPED}
    assert diagnosis.tokens(hidden).outcome is CheckOutcome.SKIPPED


def _unit(values: NDArray[Any]) -> NDArray[Any]:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def like_embeddings(scene: Scene, shift: int, noise: float) -> list[Tapped]:
    """Requests whose lowest states are the embeddings of the tokens `shift` positions on, and noise."""
    draw = np.random.default_rng(5)
    table = to_float32(read_tensor(scene.path, "model.embed_tokens.weight"))
    found: list[Tapped] = []
    for probe in scene.probes:
        tapped, bits = probe.tapped, probe.tapped.bits.copy()
        for i, position in enumerate(tapped.positions.tolist()):
            known = table[tapped.tokens.get(position + shift, 0)]
            bits[i, 0] = to_bf16(known + noise * np.abs(table).mean() * draw.normal(size=known.shape))
        found.append(replace(tapped, bits=bits))
    return found


def test_states_that_resemble_their_tokens_embeddings_are_at_their_tokens(scene: Scene) -> None:
    check = resemble(scene.path, like_embeddings(scene, 0, 2.0))
    assert check.outcome is CheckOutcome.OK, check.measured


@pytest.mark.parametrize(("shift", "said"), [(-1, "one position late"), (1, "one position early")])
def test_states_that_resemble_a_neighbours_embedding_are_not(scene: Scene, shift: int, said: str) -> None:
    check = resemble(scene.path, like_embeddings(scene, shift, 2.0))
    assert check.outcome is CheckOutcome.FAILED
    assert said in check.measured


def test_states_that_resemble_no_embedding_say_nothing(scene: Scene) -> None:
    for tapped in (like_embeddings(scene, 0, 1e3), [probe.tapped for probe in scene.probes], []):
        assert resemble(scene.path, tapped).outcome is CheckOutcome.SKIPPED
