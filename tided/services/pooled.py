"""The pools of drafts as people are told of them."""

from tided.model.status import DomainStatus, PoolStatus
from tided.policies.domains import Domains
from tided.services.context import Context, Target
from tided.services.scout import Cause, Scout, Scouting, Stage
from tided.services.stock import Stockroom

_CAUSES = {
    Cause.DRIFT: "after a drift",
    Cause.UNANSWERED: "for a drift that is not answered yet",
    Cause.SHADOW: "because an engine drafts nothing",
}


async def pools(context: Context, scout: Scout) -> tuple[PoolStatus, ...]:
    """By target, those that are configured and could be read. Raises `Unavailable`."""
    return tuple([await _pool(context, scout, target) for target in context.targets.values()])


async def _pool(context: Context, scout: Scout, target: Target) -> PoolStatus:
    scouting = await scout.current(target.info.digest)
    reserved = await Stockroom(context).reserved(target.info.digest)
    domains = scouting.domains
    newest = max(domains.scorings, key=lambda scoring: scoring.at_ms, default=None)
    lengths = dict(newest.lengths) if newest is not None else {}
    return PoolStatus(
        target=target.name,
        state=scouting.stage.value if context.config.pool.enabled else "off",
        reason=_reason(scouting) if context.config.pool.enabled else "pool.enabled is false",
        scored_ms=newest.at_ms if newest is not None else 0,
        domains=tuple(
            [
                DomainStatus(
                    number=entry.number,
                    draft=await _name(context, entry.version),
                    version=entry.version,
                    present=entry.number == domains.current,
                    length=entry.length,
                    scored=lengths.get(entry.version),
                    used_ms=entry.used_ms,
                    uses=entry.uses,
                    reserve_rows=reserved.get(entry.number, 0),
                )
                for entry in domains.entries
            ]
        ),
    )


def _reason(scouting: Scouting) -> str:
    match scouting.stage:
        case Stage.SAMPLING:
            return f"waiting for new requests to score the drafts on, {_CAUSES[scouting.cause]}"
        case Stage.SCORING:
            return f"job {scouting.job} scores the drafts, {_CAUSES[scouting.cause]}"
        case Stage.SWITCHING:
            return f"engines go back to {scouting.winner[:12]}, or its watch is under way"
        case Stage.IDLE:
            return _present(scouting.domains)


def _present(domains: Domains) -> str:
    if domains.current:
        return f"domain {domains.current} is served"
    if domains.entries:
        return "no known domain is served: the next draft that is deployed opens one"
    return "no draft was deployed yet"


async def _name(context: Context, version: str) -> str:
    draft = await context.find_draft(version)
    return f"{draft.lineage}@{draft.number}" if draft is not None else ""
