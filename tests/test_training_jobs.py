"""Whole jobs: train, score and reference on a tiny target, and one clear error for each thing that can be wrong."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.shards import Sample, greedy_samples, prompts, train_spec, write_shard
from tests.tiny import VOCAB
from tided.draft import checkpoint, reference
from tided.draft.reference import FILE
from tided.draft.target import describe
from tided.model.codec import from_plain, to_plain
from tided.model.errors import Refused
from tided.model.jobs import Candidate, JobKind, JobResult, JobSpec, Progress, Recipe
from tided.training import batches
from tided.training.__main__ import EXIT_REFUSED, main
from tided.training.data import Run, mix, read_runs, read_shard, split_prompts
from tided.training.loop import Objective
from tided.training.options import options_for
from tided.training.trainer import drawn

HIDDEN = 48


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    """A train job on 24 prompts, 8 of them held out; a third of the tokens is outside the draft vocabulary."""
    return train_spec(tmp_path_factory.mktemp("job"), passes=3, learning_rate=3e-3)


def run(
    spec: JobSpec | dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str = ""
) -> tuple[int, list[dict[str, Any]]]:
    plain = spec if isinstance(spec, dict) else to_plain(spec)
    (tmp_path / "spec.json").write_text(json.dumps(plain))
    status = main([kind or plain["kind"], str(tmp_path / "spec.json"), "--out", str(tmp_path / "out")])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(spec: JobSpec | dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    status, lines = run(spec, tmp_path, capsys)
    assert status == EXIT_REFUSED
    assert set(lines[-1]) == {"error", "retryable"}
    assert lines[-1]["retryable"] is False
    return lines[-1]["error"]


def reference_job(spec: JobSpec, ids: tuple[int, ...]) -> JobSpec:
    digest = describe(Path(spec.target_dir)).digest
    return replace(spec, kind=JobKind.REFERENCE, token_ids=ids, target=digest, options={})


def fresh(directory: Path) -> Path:
    directory.mkdir()
    return directory


def result_of(lines: list[dict[str, Any]]) -> JobResult:
    for line in lines[:-1]:
        from_plain(Progress, line)
    return from_plain(JobResult, lines[-1]["result"])


def test_train(spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(spec, tmp_path, capsys)
    assert status == 0
    result = result_of(lines)
    assert result.incumbent is not None
    assert result.candidate is not None
    assert checkpoint.verify(Path(result.staged)) == result.version == result.candidate.version
    assert result.incumbent.version == checkpoint.version_of(Path(spec.draft_dir)) != result.version
    assert result.candidate.groups == result.incumbent.groups
    assert len(result.candidate.groups) == 8
    assert checkpoint.vocab_id_of(Path(result.staged)) == checkpoint.vocab_id_of(Path(spec.draft_dir))
    assert result.trained_tokens > 0
    assert result.metrics["validation_best"] >= 1


def test_alone_on_a_directory_of_shards(spec: JobSpec, tmp_path: Path) -> None:
    """The command of docs/training.md: a few paths in; a draft, a report and a picture out."""
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    job = json.loads(page.partition("```json job\n")[2].partition("```")[0])
    shards = [str(Path(spec.shards[0]).parent)]
    job |= {"target_dir": spec.target_dir, "draft_dir": spec.draft_dir, "shards": shards}
    job["options"] |= {"batch_tokens": 32, "passes": 2, "held_out_share": 0.3}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tided.training", "train", "job.json", "--out", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    result = result_of([json.loads(line) for line in done.stdout.splitlines()])
    assert checkpoint.verify(tmp_path / "out" / "draft") == result.version
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert from_plain(JobResult, report["result"]) == result
    assert len(report["losses"]) == result.metrics["steps"] > 0
    assert result.candidate is not None
    assert 0 < len(result.candidate.groups) < 16
    texts = [element.text or "" for element in ElementTree.parse(tmp_path / "out" / "report.svg").iter()]
    assert f"new: length {result.candidate.length:.2f}" in texts
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["draft", "report.json", "report.svg"]


def test_what_is_held_out_is_not_trained_on(
    spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the same prompts come again as replay."""
    seen: set[str] = set()
    mixed = batches.mix

    def noted(fresh: Sequence[Run], replay: Sequence[Run], share: float, rng: random.Random) -> list[Run]:
        seen.update(run.group.hex() for run in [*fresh, *replay])
        return mixed(fresh, replay, share, rng)

    monkeypatch.setattr(batches, "mix", noted)
    job = replace(spec, held_out=(), replay=spec.shards, options=spec.options | {"held_out_share": 0.4})
    status, lines = run(job, tmp_path, capsys)
    assert status == 0
    candidate = result_of(lines).candidate
    assert candidate is not None
    assert candidate.groups
    assert seen
    assert not seen & set(candidate.groups)


def test_adapted_vocabulary(spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(replace(spec, options=spec.options | {"adapt_vocabulary": True}), tmp_path, capsys)
    assert status == 0
    result = result_of(lines)
    assert result.incumbent is not None
    assert result.candidate is not None
    assert result.candidate.out_of_vocabulary < result.incumbent.out_of_vocabulary
    child, parent = checkpoint.load(Path(result.staged)), checkpoint.load(Path(spec.draft_dir))
    assert child.config == parent.config
    assert child.vocab_id != parent.vocab_id


def test_score(spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, trained = run(replace(spec, options=spec.options | {"passes": 1}), tmp_path, capsys)
    status, lines = run(replace(spec, kind=JobKind.SCORE, shards=()), tmp_path, capsys)
    assert status == 0
    assert result_of(lines).candidate == result_of(trained).incumbent


def test_candidates_are_scored_beside_it(spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the same requests and each with its own vocabulary, as if it had been scored alone."""
    options = spec.options | {"passes": 1, "adapt_vocabulary": True}
    trained = result_of(run(replace(spec, options=options), tmp_path, capsys)[1])
    same = Path(spec.draft_dir)
    others = (Candidate(trained.version, trained.staged), Candidate(checkpoint.version_of(same), str(same)))
    scoring = replace(spec, kind=JobKind.SCORE, shards=(), candidates=others)
    result = result_of(run(scoring, tmp_path, capsys)[1])
    assert result.scores == (trained.candidate, trained.incumbent)
    assert result.candidate == trained.incumbent
    wrong = replace(scoring, candidates=(Candidate("0" * 64, str(same)),))
    assert "not 000000000000" in refused(wrong, tmp_path, capsys)


def test_score_by_temperature(spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(replace(spec, kind=JobKind.SCORE, shards=(), mix=((0.0, 0.5), (1.0, 0.5))), tmp_path, capsys)
    assert status == 0
    candidate = result_of(lines).candidate
    assert candidate is not None
    (greedy,) = [score for score in candidate.sampling if sum(score.steps) > 1]
    assert greedy.temperature == 0.0
    assert greedy.conditional == pytest.approx(candidate.conditional, abs=0.02)
    assert len(greedy.steps) == len(candidate.groups)


def test_a_prompt_that_comes_often_does_not_fill_a_score(spec: JobSpec) -> None:
    runs = read_runs(spec.held_out, HIDDEN, VOCAB)
    often = [*([runs[0]] * 12), *runs[1:]]
    tokens = 10 * len(runs[0].queries(1))
    found = drawn(often, tokens)
    assert 10 <= len(found) <= 12
    assert found == drawn(often, tokens)
    assert len({run.group for run in drawn(often, 10**6)}) == len({run.group for run in runs})
    assert len({run.group for run in found}) > 3


def test_reference_is_what_transformers_computes(
    spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tuple(prompts(1, VOCAB, 20, seed=5)[0])
    status, lines = run(reference_job(spec, ids), tmp_path, capsys)
    assert status == 0
    tensors = load_file(Path(result_of(lines).staged))
    assert Path(result_of(lines).staged).name == FILE
    assert tensors["ids"].tolist() == list(ids)
    model = AutoModelForCausalLM.from_pretrained(spec.target_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert tensors["states"].shape[1] == 8 + 2
    for k in range(8):
        torch.testing.assert_close(tensors["states"][:, k], hidden[k][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tensors["states"][:, 9], hidden[8][0], rtol=1e-4, atol=1e-4)
    unnormed = reference.read(Path(result_of(lines).staged)).states[:, 8]
    torch.testing.assert_close(model.model.norm(torch.from_numpy(unnormed.copy())), hidden[8][0], rtol=1e-4, atol=1e-4)


def test_sequences_of_one_job_do_not_see_each_other(
    spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (tuple(prompts(1, VOCAB, length, seed=length)[0]) for length in (6, 11))
    job = replace(reference_job(spec, first + second), options={"lengths": [6, 11], "threads": 1})
    _, lines = run(job, fresh(tmp_path / "both"), capsys)
    both = reference.read(Path(result_of(lines).staged))
    assert both.sequences == (first, second)
    assert both.target == job.target
    _, lines = run(replace(job, token_ids=second, options={}), fresh(tmp_path / "alone"), capsys)
    alone = reference.read(Path(result_of(lines).staged))
    np.testing.assert_allclose(both.states[6:], alone.states, rtol=1e-5, atol=1e-5)
    assert "add up" in refused(replace(job, options={"lengths": [6, 12]}), tmp_path, capsys)
    assert "the job is about" in refused(replace(job, target="0" * 64), tmp_path, capsys)


def test_reference_with_llama3_rope(spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "llama3"
    target.mkdir()
    (target / "model.safetensors").symlink_to(Path(spec.target_dir) / "model.safetensors")
    config = json.loads((Path(spec.target_dir) / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (target / "config.json").write_text(json.dumps(config))
    ids = tuple(prompts(1, VOCAB, 20, seed=5)[0])
    job = replace(spec, kind=JobKind.REFERENCE, token_ids=ids, target_dir=str(target), target=describe(target).digest)
    _, lines = run(job, tmp_path, capsys)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.inference_mode():
        last = model.model(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(load_file(result_of(lines).staged)["states"][:, -1], last, rtol=1e-4, atol=1e-4)


def test_errors_are_one_line(spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = Path(spec.shards[0])
    assert "unknown field 'lerning_rate'" in refused(replace(spec, options={"lerning_rate": 1}), tmp_path, capsys)
    assert "batch_tokens" in refused(replace(spec, options={"batch_tokens": "many"}), tmp_path, capsys)
    assert "no such file" in refused(replace(spec, draft_dir=str(tmp_path / "none")), tmp_path, capsys)
    assert "no such file" in refused(replace(spec, shards=(str(tmp_path / "none"),)), tmp_path, capsys)
    assert "without shards" in refused(replace(spec, shards=(str(fresh(tmp_path / "empty")),)), tmp_path, capsys)
    assert "pack_rows" in refused(replace(spec, options={"pack_rows": 50}), tmp_path, capsys)
    assert "nothing" in refused(replace(spec, shards=()), tmp_path, capsys).replace("no generated token", "nothing")
    assert "unknown field 'kinds'" in refused(to_plain(spec) | {"kinds": 1}, tmp_path, capsys)
    assert "token_ids" in refused(reference_job(spec, (VOCAB,)), tmp_path, capsys)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(shard.read_bytes()[:-5])
    assert "truncated" in refused(replace(spec, shards=(str(cut),)), tmp_path, capsys)


def test_shards_of_another_target_or_schema(spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = Sample(np.zeros((6, 4, 32), np.float32), np.arange(8), 2)
    other = write_shard(tmp_path / "other.safetensors", [sample])
    assert "another target's" in refused(replace(spec, shards=(str(other),)), tmp_path, capsys)
    other = write_shard(tmp_path / "digest.safetensors", [sample], target="f" * 64)
    assert "another target's model (ffffffffffff" in refused(replace(spec, shards=(str(other),)), tmp_path, capsys)
    sample = replace(sample, states=np.zeros((6, 4, HIDDEN), np.float32))
    newer = write_shard(tmp_path / "newer.safetensors", [sample], schema="2")
    assert "schema '2' is unknown" in refused(replace(spec, held_out=(str(newer),)), tmp_path, capsys)
    beyond = write_shard(tmp_path / "beyond.safetensors", [replace(sample, ids=np.arange(8) + VOCAB)])
    assert "outside the target's vocabulary" in refused(replace(spec, shards=(str(beyond),)), tmp_path, capsys)


def test_too_little_memory_is_said(
    spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(Objective, "forward", too_much)
    assert "lower options.batch_tokens" in refused(spec, tmp_path, capsys)


def test_divergence_is_said(spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = np.full((20, 4, HIDDEN), np.nan, np.float32)
    states[:, 3] = 0
    broken = write_shard(tmp_path / "nan.safetensors", [Sample(states, np.arange(3, 25), 2)])
    assert "diverged" in refused(replace(spec, shards=(str(broken),), options={}), tmp_path, capsys)


def test_samples_without_the_last_state_train_on_ids(
    spec: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = greedy_samples(Path(spec.target_dir), prompts(6, VOCAB, seed=2), 8)
    hard = [replace(sample, states=sample.states[:, :3]) for sample in samples]
    shard = write_shard(tmp_path / "hard.safetensors", hard, has_last="0")
    status, lines = run(replace(spec, shards=(str(shard), *spec.shards)), tmp_path, capsys)
    assert status == 0
    assert result_of(lines).trained_tokens > 0


def test_sigterm_ends_it_at_once(spec: JobSpec, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(to_plain(replace(spec, budget_s=600.0, options={"passes": 10_000}))))
    command = [sys.executable, "-m", "tided.training", "train", str(path), "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        from_plain(Progress, json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert b"Traceback" not in errors


def test_recipes() -> None:
    assert options_for(Recipe.REFRESH, {}).learning_rate < options_for(Recipe.COLD, {}).learning_rate
    with pytest.raises(Refused, match="replay_share"):
        options_for(Recipe.COLD, {"replay_share": 1.5})
    with pytest.raises(Refused, match="optimizer"):
        options_for(Recipe.COLD, {"optimizer": "sgd"})


def test_validation_is_by_prompt_and_replay_is_a_share(spec: JobSpec) -> None:
    runs = read_shard(Path(spec.shards[0]), HIDDEN)
    training, validation = split_prompts([*runs, *runs], 0.3, b"validation")
    assert len(training) + len(validation) == 2 * len(runs)
    assert validation
    assert not {run.group for run in training} & {run.group for run in validation}
    mixed = mix(runs[:6], runs[6:], 0.25, random.Random(0))
    assert len(mixed) == 8
