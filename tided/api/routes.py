"""The routes of the admin API. `ENDPOINTS` is the whole table: nothing else is served. docs/operations.md lists it for people."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tided.api.access import PEER, Access, Endpoint, Gate, Peer, may, problem
from tided.api.body import Query, read_body
from tided.api.lifetime import Lifetime
from tided.api.metrics import CONTENT_TYPE, exposition
from tided.api.plane import Plane
from tided.model.codec import to_plain
from tided.model.errors import ConfigError, Conflict, InvariantBroken, NotFound, Refused, TideError, Unavailable
from tided.model.jobs import JobState
from tided.model.policy import SpeculationMode

MAX_LIST = 1000
MAX_WAIT_S = 30.0
EVENT_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class InitDraft:
    target_dir: str
    name: str


@dataclass(frozen=True, slots=True)
class ForEngine:
    """None: the only engine, or all that it fits; the control plane says which."""

    engine: str | None = None


@dataclass(frozen=True, slots=True)
class SetPolicy:
    mode: SpeculationMode
    gamma: int = 0


@dataclass(frozen=True, slots=True)
class Nothing:
    """The body of a request that has none."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request on its way through a handler."""

    request: Request
    plane: Plane
    peer: Peer
    lifetime: Lifetime

    def path(self, name: str) -> str:
        return str(self.request.path_params[name])


async def health(call: Call) -> dict[str, str]:
    return {"status": "ok"}


async def metrics(call: Call) -> Response:
    return Response(await exposition(call.plane), media_type=CONTENT_TYPE)


async def status(call: Call) -> Any:
    return await call.plane.status()


async def engines(call: Call) -> Any:
    return await call.plane.engines()


async def drafts(call: Call) -> Any:
    return await call.plane.drafts()


async def draft(call: Call) -> Any:
    return await call.plane.draft(call.path("ref"))


async def jobs(call: Call) -> Any:
    query = Query(call.request)
    limit = query.count("limit", 50, MAX_LIST)
    state = query.text("state", "")
    query.done()
    if state not in ("", *JobState):
        raise Refused(f"state {state!r}: expected one of {', '.join(JobState)}")
    return await call.plane.jobs(limit, JobState(state) if state else None)


async def job(call: Call) -> Any:
    return await call.plane.job(call.path("job"))


async def workers(call: Call) -> Any:
    return await call.plane.workers()


async def pools(call: Call) -> Any:
    return await call.plane.pools()


async def policy(call: Call) -> Any:
    return await call.plane.policy()


async def decisions(call: Call) -> Any:
    return await call.plane.explain(_engine(call))


async def events(call: Call) -> Any:
    """Events after `after`; with `wait_s`, waits that long for the first one (long poll), less when the server stops."""
    query = Query(call.request)
    after = query.text("after", "")
    limit = query.count("limit", 100, MAX_LIST)
    wait_s = query.number("wait_s", 0.0, 0.0, MAX_WAIT_S)
    query.done()
    deadline = anyio.current_time() + wait_s
    while True:
        found = await call.plane.events(after, limit)
        if found or anyio.current_time() >= deadline or call.lifetime.closed.is_set():
            return found
        with anyio.move_on_after(EVENT_POLL_S):
            await call.lifetime.closed.wait()


async def doctor(call: Call) -> Any:
    return await call.plane.doctor(_engine(call))


def _engine(call: Call) -> str | None:
    query = Query(call.request)
    engine = query.text("engine", "")
    query.done()
    return engine or None


async def init_draft(call: Call) -> Any:
    body = await read_body(call.request, InitDraft)
    target_dir = Path(body.target_dir)
    if not target_dir.is_absolute():
        raise Refused("body.target_dir: expected an absolute path; the daemon's working directory is not yours")
    return await call.plane.init_draft(target_dir, body.name, call.peer.actor)


async def deploy(call: Call) -> Any:
    body = await read_body(call.request, ForEngine)
    return await call.plane.deploy(call.path("ref"), body.engine, call.peer.actor)


async def rollback(call: Call) -> Any:
    await read_body(call.request, Nothing)
    return await call.plane.rollback(call.path("engine"), call.peer.actor)


async def cancel(call: Call) -> Any:
    await read_body(call.request, Nothing)
    return await call.plane.cancel(call.path("job"), call.peer.actor)


async def retry(call: Call) -> Any:
    await read_body(call.request, Nothing)
    return await call.plane.retry(call.path("job"), call.peer.actor)


async def cordon(call: Call) -> Any:
    await read_body(call.request, Nothing)
    return await call.plane.cordon(call.path("worker"), False, call.peer.actor)


async def drain(call: Call) -> Any:
    await read_body(call.request, Nothing)
    return await call.plane.cordon(call.path("worker"), True, call.peer.actor)


async def uncordon(call: Call) -> Any:
    await read_body(call.request, Nothing)
    return await call.plane.uncordon(call.path("worker"), call.peer.actor)


async def set_policy(call: Call) -> Any:
    body = await read_body(call.request, SetPolicy)
    return await call.plane.set_policy(body.mode, body.gamma, call.peer.actor)


async def train(call: Call) -> Any:
    body = await read_body(call.request, ForEngine)
    return await call.plane.train_now(body.engine, call.peer.actor)


async def purge(call: Call) -> Any:
    body = await read_body(call.request, ForEngine)
    return await call.plane.purge(body.engine, call.peer.actor)


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/health", Access.READ, health),
    Endpoint("GET", "/metrics", Access.READ, metrics),
    Endpoint("GET", "/v1/status", Access.READ, status),
    Endpoint("GET", "/v1/engines", Access.READ, engines),
    Endpoint("GET", "/v1/drafts", Access.READ, drafts),
    Endpoint("GET", "/v1/drafts/{ref}", Access.READ, draft),
    Endpoint("GET", "/v1/jobs", Access.READ, jobs),
    Endpoint("GET", "/v1/jobs/{job}", Access.READ, job),
    Endpoint("GET", "/v1/workers", Access.READ, workers),
    Endpoint("GET", "/v1/pools", Access.READ, pools),
    Endpoint("GET", "/v1/policy", Access.READ, policy),
    Endpoint("GET", "/v1/policy/decisions", Access.READ, decisions),
    Endpoint("GET", "/v1/events", Access.OPERATE, events),
    Endpoint("GET", "/v1/doctor", Access.OPERATE, doctor),
    Endpoint("POST", "/v1/drafts", Access.OPERATE, init_draft),
    Endpoint("POST", "/v1/drafts/{ref}/deploy", Access.OPERATE, deploy),
    Endpoint("POST", "/v1/engines/{engine}/rollback", Access.OPERATE, rollback),
    Endpoint("POST", "/v1/jobs/{job}/cancel", Access.OPERATE, cancel),
    Endpoint("POST", "/v1/jobs/{job}/retry", Access.OPERATE, retry),
    Endpoint("POST", "/v1/workers/{worker}/cordon", Access.OPERATE, cordon),
    Endpoint("POST", "/v1/workers/{worker}/drain", Access.OPERATE, drain),
    Endpoint("POST", "/v1/workers/{worker}/uncordon", Access.OPERATE, uncordon),
    Endpoint("POST", "/v1/policy", Access.OPERATE, set_policy),
    Endpoint("POST", "/v1/train", Access.OPERATE, train),
    Endpoint("POST", "/v1/purge", Access.OPERATE, purge),
)


def make_app(plane: Plane, http_host: str, lifetime: Lifetime) -> Gate:
    """The ASGI application. Connections must carry a `Peer` in their scope, or everything is refused."""
    app = Starlette(
        routes=[
            Route(endpoint.path, _served(endpoint, plane, lifetime), methods=[endpoint.method])
            for endpoint in ENDPOINTS
        ],
        exception_handlers={HTTPException: _http_problem, Exception: _internal_problem},
    )
    app.router.redirect_slashes = False
    return Gate(app, http_host)


def status_of(error: TideError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, NotFound):
        return 404
    if isinstance(error, Refused | ConfigError):
        return 400
    if isinstance(error, Conflict):
        return 409
    return 503 if isinstance(error, Unavailable) else 500


def kind_of(error: TideError) -> str:
    """The branch of the error tree that a client acts on."""
    kinds = (NotFound, Refused, ConfigError, Conflict, Unavailable, InvariantBroken)
    return next((kind.__name__ for kind in kinds if isinstance(error, kind)), "TideError")


def _served(endpoint: Endpoint, plane: Plane, lifetime: Lifetime) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        peer: Peer | None = request.scope.get(PEER)
        if peer is None or not may(peer, endpoint.access):
            return problem(403, "Refused", f"{endpoint.method} {endpoint.path} needs the admin socket (tidectl)")
        try:
            answer = await endpoint.handler(Call(request, plane, peer, lifetime))
        except TideError as exc:
            if isinstance(exc, InvariantBroken):
                lifetime.fail(exc)
            return problem(status_of(exc), kind_of(exc), str(exc))
        if isinstance(answer, Response):
            return answer
        return Response(json.dumps(to_plain(answer), allow_nan=False), media_type="application/json")

    return respond


async def _http_problem(request: Request, exc: Exception) -> Response:
    status_code = exc.status_code if isinstance(exc, HTTPException) else 500
    headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else None
    return problem(status_code, "NotFound" if status_code == 404 else "Refused", f"no {request.method} here", headers)


async def _internal_problem(request: Request, exc: Exception) -> Response:
    return problem(500, "InvariantBroken", "tided failed on this request; its log says more")
