"""What tided may do to a running engine: schedule, swap, profile; and what it may not."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.test_engine_embedded_lossless import Collected, prompts
from tests.tiny import make_draft, make_target
from tided.draft import checkpoint
from tided.draft.eagle3 import Eagle3
from tided.engine.embedded.control import EmbeddedControl, load_draft
from tided.engine.embedded.drafter import Drafter
from tided.engine.embedded.scheduler import Output, Request, Scheduler
from tided.engine.embedded.target import Target
from tided.model.engines import Capability
from tided.model.errors import Refused, Unavailable
from tided.wire.control import MeasureProfile, SetCapture, SetSchedule, Swap

WAIT_S = 120.0


@dataclass
class Running:
    """An engine whose steps run in a thread of their own."""

    scheduler: Scheduler
    control: EmbeddedControl


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft(target_dir, tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def child_dir(draft_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version of the same draft."""
    draft = Eagle3.load(draft_dir)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path_factory.mktemp("child")
    checkpoint.write(path, draft.config, draft.state_tensors())
    return path


@pytest.fixture
def engine(target_dir: Path, draft_dir: Path) -> Iterator[Running]:
    target = Target(target_dir, dtype=torch.float32, max_batch=4, max_context=256, gamma_max=4)
    scheduler = Scheduler(target, Drafter(load_draft(draft_dir, target), target), gammas=(2,))
    control = EmbeddedControl(scheduler, engine="e", incarnation="run-1", url="http://x", taps=True, last_hidden=True)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    yield Running(scheduler, control)
    scheduler.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()


class Waiting(Collected):
    """Collects on the step thread; others wait for the end, or for the first tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.over = threading.Event(), threading.Event()

    def __call__(self, output: Output) -> None:
        super().__call__(output)
        self.started.set()
        if self.last is not None:
            self.over.set()


class Repeating(Waiting):
    """Asks the same again, on the step thread, as often as it was answered before `enough` is set: something always runs."""

    def __init__(self, engine: Running, prompt: tuple[int, ...], max_tokens: int) -> None:
        super().__init__()
        self.enough = threading.Event()
        self.answers: list[list[int]] = []
        self._engine, self._prompt, self._max_tokens = engine, prompt, max_tokens

    def ask(self) -> None:
        name = f"r{id(self)}-{len(self.answers)}"
        self._engine.scheduler.submit(Request(name, self._prompt, self._max_tokens, self, ignore_eos=True))

    def __call__(self, output: Output) -> None:
        again = bool(output.finish) and not self.enough.is_set()
        if output.finish:
            self.answers.append(self.tokens)
            self.tokens = []
        if again:
            self.ask()
        super().__call__(replace(output, finish="") if again else output)


def repeat(engine: Running, prompt: tuple[int, ...], max_tokens: int = 120) -> Repeating:
    """Requests without end; returns when the first tokens are there."""
    sink = Repeating(engine, prompt, max_tokens)
    sink.ask()
    assert sink.started.wait(WAIT_S)
    return sink


def answer(engine: Running, prompt: tuple[int, ...], max_tokens: int = 120) -> list[int]:
    sink = Waiting()
    engine.scheduler.submit(Request(f"r{id(sink)}", prompt, max_tokens, sink, ignore_eos=True))
    assert sink.over.wait(WAIT_S)
    return sink.tokens


def test_a_swap_in_the_middle_of_requests_changes_no_token(engine: Running, draft_dir: Path, child_dir: Path) -> None:
    requests = prompts(3)
    plain = [answer(engine, prompt) for prompt in requests]
    sinks = [repeat(engine, prompt) for prompt in requests]
    versions = {path: checkpoint.version_of(path) for path in (draft_dir, child_dir)}
    for swaps in range(12):
        path = (child_dir, draft_dir)[swaps % 2]
        reply = engine.control.apply(Swap(versions[path], str(path)))
        assert reply["version"] == versions[path] == engine.control.info().version
        assert reply["seconds"] >= 0
        assert engine.scheduler.running or engine.scheduler.waiting
    for sink in sinks:
        sink.enough.set()
        assert sink.over.wait(WAIT_S)
    for sink, tokens in zip(sinks, plain, strict=True):
        assert all(answered == tokens for answered in sink.answers)


def test_the_served_weights_are_the_files(engine: Running, child_dir: Path) -> None:
    version = checkpoint.version_of(child_dir)
    assert engine.control.info().version != version
    assert engine.control.apply(Swap(version, str(child_dir)))["version"] == version
    drafter = engine.scheduler.drafter
    assert drafter is not None
    on_disk = checkpoint.load(child_dir).tensors
    assert all((array == on_disk[name]).all() for name, array in drafter.draft.state_tensors().items())
    assert engine.control.info().vocab_id == checkpoint.vocab_id_of(child_dir)


def broken_copies(source: Path, target_dir: Path, root: Path) -> dict[str, Path]:
    """Checkpoints that must be refused, by what the refusal must say."""
    copies = {what: Path(shutil.copytree(source, root / f"d{i}")) for i, what in enumerate(("truncated", "SHA", "NaN"))}
    weights = (source / "model.safetensors").read_bytes()
    (copies["truncated"] / "model.safetensors").write_bytes(weights[:100])
    (copies["NaN"] / "model.safetensors").write_bytes(weights[:-4000] + b"\xff\x7f" * 8 + weights[-3984:])
    # One bit of a weight: still a sound checkpoint, but not the version that was asked for.
    (copies["SHA"] / "model.safetensors").write_bytes(weights[:-4001] + bytes([weights[-4001] ^ 1]) + weights[-4000:])
    other = make_target(root / "other", vocab=80)
    return copies | {
        "another target": make_draft(other, root / "other-draft"),
        "sizes differ": make_draft(target_dir, root / "small", draft_vocab=32),
        "no such file": root / "missing",
    }


def test_bad_drafts_are_refused_and_the_old_one_stays(
    engine: Running, child_dir: Path, target_dir: Path, tmp_path: Path
) -> None:
    before = engine.control.info().version
    asked = {"SHA": "not ", "NaN": "NaN|version"}
    for what, path in broken_copies(child_dir, target_dir, tmp_path).items():
        good = what in ("another target", "sizes differ")
        version = checkpoint.version_of(path) if good else checkpoint.version_of(child_dir)
        with pytest.raises(Refused, match=asked.get(what, what)):
            engine.control.apply(Swap(version, str(path)))
        assert engine.control.info().version == before
    assert answer(engine, prompts(1)[0], 5)


def test_the_schedule_is_in_force_at_once_and_bounded(engine: Running) -> None:
    assert engine.control.apply(SetSchedule((4, 0, 1))) == {"gammas": [4, 0, 1]}
    assert engine.control.info().gammas == (4, 0, 1)
    for gammas in ((), (5,), (-1,)):
        with pytest.raises(Refused, match=r"0\.\.4"):
            engine.control.apply(SetSchedule(gammas))
    assert engine.control.info().gammas == (4, 0, 1)
    answer(engine, prompts(1)[0], 10)
    counters = engine.control.observe()
    assert {item.gamma for item in counters.steps} == {4}
    assert len(counters.requests) == 1
    assert counters.requests[0].drafted == 4 * counters.requests[0].spec_steps
    assert engine.control.observe().steps == ()


def test_a_profile_is_measured_while_idle_only(engine: Running) -> None:
    assert engine.control.info().profile is None
    reply = engine.control.apply(MeasureProfile())
    profile = engine.control.info().profile
    assert profile is not None
    assert json.loads(json.dumps(reply["profile"]))["tokens"] == [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20]
    assert profile.batches == (1, 2, 4)
    assert min(profile.target_s) > 0
    assert min(profile.draft_s) > 0
    sink = repeat(engine, prompts(1)[0])
    with pytest.raises(Unavailable, match="nothing runs"):
        engine.control.apply(MeasureProfile())
    sink.enough.set()
    assert sink.over.wait(WAIT_S)
    with pytest.raises(Refused, match="SetCapture"):
        engine.control.apply(SetCapture(True, 1))


def test_an_engine_without_speculation_has_nothing_to_swap(target_dir: Path, draft_dir: Path) -> None:
    scheduler = Scheduler(Target(target_dir, dtype=torch.float32, max_batch=2, max_context=64, gamma_max=2))
    control = EmbeddedControl(scheduler, engine="e", incarnation="i", url="", taps=False, last_hidden=True)
    assert Capability.TAP not in control.info().capabilities
    with pytest.raises(Refused):
        scheduler.set_gammas((1,))
    with pytest.raises(Refused, match="without speculation"):
        control.swap(draft_dir)


def test_targets_that_cannot_be_served_are_refused(target_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused):
        Target(tmp_path / "missing", dtype=torch.float32)
    with pytest.raises(Refused, match="max_context"):
        Target(target_dir, dtype=torch.float32, max_context=10_000)
    broken = Path(shutil.copytree(target_dir, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((target_dir / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(Refused):
        Target(broken, dtype=torch.float32)
