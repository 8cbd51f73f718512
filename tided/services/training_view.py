"""What is known of a target's training cycle, in figures and in words: the machine's rules from the configuration, the rows that it may
count, whether capture is wanted, and why nothing begins. Pure; `tided.services.dispatcher` acts on it."""

from dataclasses import dataclass

from tided.config import TrainingConfig
from tided.machine import collection as machine
from tided.machine.collection import Collection, CollectionRules, Phase
from tided.services.pools import Pool
from tided.services.stock import Stock

AHEAD = 3
"""While a training is under way, up to so many times `min_rows` are captured ahead."""


@dataclass(frozen=True, slots=True)
class TrainingView:
    """What the controller and the status read: the machine's state, and what is in stock for it."""

    collection: Collection
    stock: Stock
    capture: bool
    reason: str


def rules_of(settings: TrainingConfig) -> CollectionRules:
    return CollectionRules(
        min_rows=settings.min_rows,
        max_rows=AHEAD * settings.min_rows,
        cool_down_ms=round(settings.cool_down_s * 1000),
        jobs_per_hour=settings.jobs_per_hour,
        worker_ms_per_hour=round(settings.worker_s_per_hour * 1000),
        job_ms=round(settings.budget_s * 1000),
        plateau_gain=settings.plateau_gain,
    )


def ripe_rows(stock: Stock, settings: TrainingConfig, pool: Pool, now_ms: int) -> int:
    """Rows as the machine may count them: below its threshold until the gate could judge what comes out, and while something speaks
    against any training."""
    ripe = stock.judgeable and not hindrance(pool, now_ms)
    return stock.fresh_rows if ripe else min(stock.fresh_rows, settings.min_rows - 1)


def view_of(
    collection: Collection, stock: Stock, settings: TrainingConfig, now_ms: int, pool: Pool | None = None
) -> TrainingView:
    """`pool` None: of a target that this tided does not reconcile."""
    # Without samples nobody can say whether an engine is at fault, or no more.
    asked = pool is not None and bool(pool.suspected or pool.wary(now_ms))
    capture = settings.enabled and (asked or machine.capture_wanted(collection, rules_of(settings)))
    if not settings.enabled:
        return TrainingView(collection, stock, capture, "training is disabled in the configuration")
    reason = _reason(collection, stock, settings, now_ms)
    against = hindrance(pool, now_ms) if pool is not None else ""
    if collection.phase is not Phase.TRAINING and against:
        reason += f", not training {against}"
    return TrainingView(collection, stock, capture, reason)


def _reason(collection: Collection, stock: Stock, settings: TrainingConfig, now_ms: int) -> str:
    rules = rules_of(settings)
    match collection.phase:
        case Phase.TRAINING:
            return f"job {collection.job}, or its draft's gate and deployment, is under way"
        case Phase.STOPPED if machine.plateaued(collection, rules):
            gains = ", ".join(f"{gain:.1%}" for gain in collection.gains)
            return f"the last trainings gained next to nothing ({gains}): waiting for drift"
        case Phase.STOPPED:
            return "the last training gave nothing better: waiting for drift"
        case Phase.COLLECTING:
            reason = f"{stock.fresh_rows} of {settings.min_rows} rows"
            if stock.fresh_rows >= settings.min_rows and not stock.judgeable:
                reason += ", waiting for more held-out requests"
            elif stock.fresh_rows >= settings.min_rows and now_ms < collection.not_before_ms:
                reason += f", cooling down for {(collection.not_before_ms - now_ms) / 1000:.0f} s"
            over = machine.over_budget(collection, now_ms, rules)
            return f"{reason}, {over}" if over else reason


def hindrance(pool: Pool, now_ms: int) -> str:
    """Until or while what no training may begin, or "": what a suspected engine serves badly, no training mends."""
    if pool.suspected:
        return f"while a fault of {', '.join(pool.suspected)} is suspected"
    if pool.questioned:
        return f"until a score says why the acceptance of {', '.join(pool.questioned)} has fallen"
    if wary := pool.wary(now_ms):
        return f"until it is sure whether the acceptance of {', '.join(wary)} falls"
    return f"while {pool.hold}" if pool.hold else ""
