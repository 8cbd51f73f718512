"""What is kept of each domain to be replayed: bounds, whom a training replays, and that every row is accounted for."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Valkey
from tests.control import Control, leading, settings, store_samples
from tided.draft.target import describe
from tided.services.stock import Stockroom
from tided.store.samples import Split

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.real
ENGINE = "double"
ROWS = 25
"""A shard's rows here: one request."""


@dataclass
class Scene:
    """A domain's budget is 75 rows: three shards."""

    control: Control
    target: Path
    stockroom: Stockroom

    @property
    def digest(self) -> str:
        return describe(self.target).digest

    def store(self, *created_ms: int) -> tuple[str, ...]:
        for at_ms in created_ms:
            store_samples(self.control.context.config, self.target, ENGINE, 1, 0, at_ms)
        return tuple(
            str(shard.path)
            for shard in self.control.context.samples.shards(Split.TRAIN)
            if shard.created_ms in created_ms
        )

    async def retire(self, paths: tuple[str, ...], domain: int, *others: int) -> None:
        await self.stockroom.retire(self.digest, paths, domain, {domain, *others})

    async def kept(self) -> dict[int, int]:
        return await self.stockroom.reserved(self.digest)

    def ledger(self) -> tuple[int, int, int]:
        """(stored, trained, waiting)"""
        ledger = self.control.context.samples.ledger()
        return ledger.stored, ledger.trained, ledger.waiting


@pytest.fixture
async def scene(valkey: Valkey, tmp_path: Path, target: Path) -> AsyncIterator[Scene]:
    training: dict[str, object] = {"min_rows": 225, "replay_fraction": 0.25}
    async with leading(valkey, settings(tmp_path, target, training=training)) as control:
        yield Scene(control, target, Stockroom(control.context))


async def test_each_domain_keeps_a_bounded_part_and_the_rest_is_consumed(scene: Scene) -> None:
    await scene.retire(scene.store(*range(1000, 1010)), 1)
    assert await scene.kept() == {1: 3 * ROWS}
    assert scene.ledger() == (250, 175, 75)
    await scene.retire(scene.store(*range(2000, 2006)), 2, 1)
    assert await scene.kept() == {1: 3 * ROWS, 2: 3 * ROWS}  # the second took nothing from the first
    assert scene.ledger() == (400, 250, 150)
    newest = {shard.created_ms for shard in scene.control.context.samples.shards(Split.TRAIN)}
    assert newest == {1007, 1008, 1009, 2003, 2004, 2005}


async def test_within_a_domain_old_and_new_share_its_budget(scene: Scene) -> None:
    await scene.retire(scene.store(1000, 1001, 1002), 1)
    await scene.retire(scene.store(2000, 2001, 2002), 1)
    kept = sorted(shard.created_ms for shard in scene.control.context.samples.shards(Split.TRAIN))
    assert kept == [1002, 2001, 2002]


async def test_a_training_replays_the_other_domains_alike(scene: Scene) -> None:
    for domain in (1, 2, 3):
        await scene.retire(scene.store(*range(1000 * domain, 1000 * domain + 3)), domain, 1, 2, 3)
    scene.store(*range(9000, 9006))  # 150 rows: 50 of replay, a shard or two
    stock = await scene.stockroom.stock(scene.digest, 9000, 3)
    assert stock.fresh_rows == 150
    replayed = sorted(int(Path(path).stem.rsplit("-", 1)[-1]) for path in stock.replay)
    assert replayed == [1002, 2002]
    scene.store(*range(9100, 9118))  # 600 rows in all: 200 of replay, of which the others have 150
    stock = await Stockroom(scene.control.context).stock(scene.digest, 9000, 3)
    replayed = sorted(int(Path(path).stem.rsplit("-", 1)[-1]) for path in stock.replay)
    assert replayed == [1000, 1001, 1002, 2000, 2001, 2002, 3001, 3002]


async def test_the_reserve_of_a_domain_that_went_is_consumed(scene: Scene) -> None:
    await scene.retire(scene.store(1000, 1001), 1)
    await scene.retire(scene.store(2000), 2)  # the first is not known any more
    assert await scene.kept() == {2: ROWS}
    assert scene.ledger() == (75, 50, 25)


async def test_a_reserve_has_its_share_of_the_disk(scene: Scene) -> None:
    (path,) = scene.store(1000)
    bytes_each = Path(path).stat().st_size
    context = scene.control.context
    pool = context.config.pool.model_copy(update={"size": 2, "reserve_share": 0.5})
    samples = context.config.samples.model_copy(update={"max_bytes": 8 * bytes_each + 8})
    context.config = context.config.model_copy(update={"pool": pool, "samples": samples})
    await scene.retire((path, *scene.store(1001, 1002, 1003)), 1)
    assert await scene.kept() == {1: 2 * ROWS}


async def test_retiring_is_safe_to_repeat(scene: Scene) -> None:
    paths = scene.store(1000, 1001, 1002, 1003)
    await scene.retire(paths, 1)
    before = (await scene.kept(), scene.ledger())
    await scene.retire(paths, 1)
    assert (await scene.kept(), scene.ledger()) == before


async def test_purge_reaches_the_reserve(scene: Scene) -> None:
    await scene.retire(scene.store(1000, 1001), 1)
    scene.control.context.samples.purge()
    assert await scene.kept() == {1: 0}
    stock = await scene.stockroom.stock(scene.digest, 0, 2)
    assert stock.replay == ()
