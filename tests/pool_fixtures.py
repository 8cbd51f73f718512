"""The fixtures `models` and `scene`: two targets, and a tided that leads, without an engine yet."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.control import leading, settings
from tests.pool_scene import Models, Scene
from tests.tiny import make_draft, make_target
from tided.config import TargetConfig


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    first, second = make_target(root / "first"), make_target(root / "second", seed=1)
    drafts = {target: make_draft(target, root / f"{target.name}-0", draft_vocab=64) for target in (first, second)}
    return Models(first, second, drafts)


@pytest.fixture
async def scene(valkey: Valkey, tmp_path: Path, models: Models) -> AsyncIterator[Scene]:
    config = settings(tmp_path, models.first).model_copy(
        update={
            "target": (
                TargetConfig(path=models.first),
                TargetConfig(path=models.second, name="other", training={"min_rows": 400}),
            )
        }
    )
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(leading(valkey, config))
        control.context.clock = lambda: 1_000.0  # it stands still: who is busy stays so, however slow this machine is
        yield Scene(control, models, valkey, tmp_path, stack)
