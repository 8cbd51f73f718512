"""tidectl: looks at tided and steers it, through the admin socket only.

Exit codes: 0 done, 1 refused (the request is wrong, or what it names does not exist), 2 wrong usage or configuration, 3 tided or
something behind it is unavailable, 4 conflict (something else is under way), 5 tided failed.

Imports are lazy on purpose: `tidectl status` has 400 ms in all, and the interpreter, typer and rich take most of it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tided.ctl.locate import socket_path
from tided.model.errors import ConfigError, Conflict, InvariantBroken, Refused, TideError, Unavailable

if TYPE_CHECKING:
    from tided.api.client import Client

EXIT_CODES: dict[type[TideError], int] = {Refused: 1, ConfigError: 2, Unavailable: 3, Conflict: 4, InvariantBroken: 5}
FOLLOW_WAIT_S = 20.0

app = typer.Typer(name="tidectl", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
drafts = typer.Typer(no_args_is_help=True, help="Draft versions: make the first, look, deploy, roll back.")
jobs = typer.Typer(no_args_is_help=True, help="Jobs on workers: training, scoring.")
workers = typer.Typer(no_args_is_help=True, help="Workers: look, and say which may have jobs.")
policy = typer.Typer(no_args_is_help=True, help="How many tokens are drafted: tided decides, or you do.")
train = typer.Typer(no_args_is_help=True, help="Training on demand.")
config = typer.Typer(no_args_is_help=True, help="Configuration files.")
GROUPS = {"drafts": drafts, "jobs": jobs, "workers": workers, "policy": policy, "train": train, "config": config}
for name, group in GROUPS.items():
    app.add_typer(group, name=name)

Json = Annotated[bool, typer.Option("--json", help="Print the API's answer as JSON.")]
Engine = Annotated[str | None, typer.Option("--engine", help="Id of an engine, as `tidectl engines` lists it.")]


@dataclass(frozen=True)
class _Where:
    socket: Path | None
    config: Path | None


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    context: typer.Context,
    socket: Annotated[Path | None, typer.Option(help="tided's admin socket. Else $TIDED_SOCKET is used.")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Use the socket that this configuration file names.")
    ] = None,
) -> None:
    """Look at tided and steer it."""
    context.obj = _Where(socket, config_file)


def _client(context: typer.Context) -> "Client":
    from tided.api.client import Client

    where: _Where = context.obj
    return Client(socket_path(where.socket, where.config))


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """What tided is doing, and why."""
    client = _client(context)
    from tided.ctl import render

    render.plain(client.get("/v1/status")) if as_json else render.status(client.status())


@app.command()
def engines(context: typer.Context, as_json: Json = False) -> None:
    """The connected engines."""
    from tided.model.status import EngineStatus

    render, answer = _get(context, "/v1/engines")
    render.plain(answer) if as_json else render.engines(_records(EngineStatus, answer))


@workers.command("list")
def workers_list(context: typer.Context, as_json: Json = False) -> None:
    """The connected workers."""
    from tided.model.jobs import WorkerInfo

    render, answer = _get(context, "/v1/workers")
    render.plain(answer) if as_json else render.workers(_records(WorkerInfo, answer))


@workers.command("cordon")
def workers_cordon(context: typer.Context, worker: str, as_json: Json = False) -> None:
    """Give a worker no more jobs, until it is uncordoned. What it runs goes on."""
    _mark(context, worker, "cordon", as_json)


@workers.command("drain")
def workers_drain(context: typer.Context, worker: str, as_json: Json = False) -> None:
    """Cordon a worker; what it runs ends within its `drain_s`, or is given back."""
    _mark(context, worker, "drain", as_json)


@workers.command("uncordon")
def workers_uncordon(context: typer.Context, worker: str, as_json: Json = False) -> None:
    """Let a worker have jobs again."""
    _mark(context, worker, "uncordon", as_json)


def _mark(context: typer.Context, worker: str, verb: str, as_json: bool) -> None:
    from tided.ctl import render

    answer = _post(context, ("workers", worker, verb), {})
    render.plain(answer) if as_json else render.say(f"{worker}: {'may have jobs' if answer == 'none' else answer}")


@app.command()
def pool(context: typer.Context, as_json: Json = False) -> None:
    """The drafts by domain of each target, to go back to when traffic does."""
    from tided.model.status import PoolStatus

    render, answer = _get(context, "/v1/pools")
    render.plain(answer) if as_json else render.pools(_records(PoolStatus, answer))


@app.command()
def doctor(
    context: typer.Context,
    engine: Annotated[str | None, typer.Argument(help="Of the engines only this one.")] = None,
    as_json: Json = False,
) -> None:
    """Look the whole installation over: every check, what was found, what to do. Exit code 1 if one failed."""
    from tided.model.verification import Finding

    render, answer = _get(context, "/v1/doctor", {"engine": engine} if engine else None)
    from tided.ctl import doctor as report

    findings = _records(Finding, answer)
    render.plain(answer) if as_json else report.show(findings)
    if not report.healthy(findings):
        raise typer.Exit(1)


@app.command("engine-args")
def engine_args(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="vllm or sglang.")],
    draft: Annotated[Path | None, typer.Option(help="Checkpoint to boot on; else version 0 of the target.")] = None,
    python: Annotated[str, typer.Option(help="The interpreter of the engine's environment.")] = "python",
    as_json: Json = False,
) -> None:
    """Print the command line that starts a serving engine with tided in it."""
    from tided.config import Config, load
    from tided.ctl import render
    from tided.ctl.engine_args import command

    where: _Where = context.obj
    found = command(kind, load(where.config) if where.config is not None else Config(), draft, python)
    if as_json:
        render.plain({"environment": found.environment, "arguments": list(found.arguments)})
    else:
        sys.stdout.write(found.shell() + "\n")


@app.command()
def replay(
    context: typer.Context,
    trace: Annotated[str, typer.Argument(help="A trace file, or the name of a generated one: bursty, recurring, ...")],
    policies: Annotated[list[str] | None, typer.Option("--policy", help="By name; repeat it for more.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of a generated trace.")] = 0,
    seconds: Annotated[float, typer.Option(min=10, max=86_400, help="Length of a generated trace.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Run policies over recorded or generated traffic in virtual time. Needs no running tided."""
    from tided.config import Config, load
    from tided.ctl import render
    from tided.ctl import replay as offline
    from tided.model.codec import to_plain

    where: _Where = context.obj
    settings = (load(where.config) if where.config is not None else Config()).speculation
    found = offline.replay(trace, policies or (), settings, seed, seconds)
    render.plain(to_plain(found)) if as_json else offline.show(found)


@app.command()
def plan(
    devices: Annotated[
        list[str], typer.Argument(help="KIND=COUNT with the paper's rates, or KIND=COUNT:INFERENCE:TRAINING.")
    ],
    speedup: Annotated[float, typer.Option(help="Of serving with an adapted draft over serving as it is.")],
    spread: Annotated[float, typer.Option(min=0, help="How much lower or higher the speedup may be.")] = 0.0,
    training: Annotated[
        float, typer.Option(min=0, help="The least training rate that keeps up with the traffic.")
    ] = 0.0,
    collect: Annotated[float, typer.Option(min=0, help="Seconds of collecting before the first training.")] = 0.0,
    work: Annotated[
        float, typer.Option(min=0, help="Of the first training: tokens, where TRAINING is tokens a second.")
    ] = 0.0,
    over: Annotated[float | None, typer.Option(help="Seconds from the start that count; else for ever.")] = None,
    as_json: Json = False,
) -> None:
    """Which devices should serve, which should train, and whether training pays. Needs no running tided."""
    from tided.ctl import plan as offline
    from tided.ctl import render
    from tided.model.codec import to_plain

    found = offline.made(devices, speedup, spread, training, collect, work, over)
    render.plain(to_plain(found)) if as_json else offline.show(found)


@drafts.command("init")
def drafts_init(
    context: typer.Context,
    target_dir: Annotated[Path, typer.Argument(help="Checkpoint directory of the target model.")],
    name: Annotated[str | None, typer.Option(help="Name of the new lineage; else the directory's.")] = None,
    as_json: Json = False,
) -> None:
    """Make version 0 of a draft from the target itself, and store it."""
    target = target_dir.absolute()
    answer = _post(context, ("drafts",), {"target_dir": str(target), "name": name or target.name.lower()}, slow=True)
    _show_draft(answer, as_json)


@drafts.command("import")
def drafts_import(
    source: Annotated[Path, typer.Argument(help="A draft as speculators, or a trainer for SGLang or vLLM, wrote it.")],
    target_dir: Annotated[Path, typer.Argument(help="Checkpoint directory of the target model.")],
    out: Annotated[Path, typer.Argument(help="Directory for the draft as tided, vLLM and SGLang load it.")],
    as_json: Json = False,
) -> None:
    """Turn another trainer's draft into one of tided's, to train further or to boot on. Needs no running tided."""
    from tided.ctl import render
    from tided.draft.formats import import_draft

    version = import_draft(source, target_dir, out)
    render.plain({"version": version, "directory": str(out)}) if as_json else typer.echo(f"{out}: version {version}")


@drafts.command("export")
def drafts_export(
    draft: Annotated[Path, typer.Argument(help="Directory of a draft.")],
    target_dir: Annotated[Path, typer.Argument(help="Checkpoint directory of the target model.")],
    out: Annotated[Path, typer.Argument(help="Directory for the draft as speculators reads it.")],
    as_json: Json = False,
) -> None:
    """Write a draft in the format of speculators. vLLM and SGLang load it as it is. Needs no running tided."""
    from tided.ctl import render
    from tided.draft.formats import export_speculators

    export_speculators(draft, target_dir.absolute(), out)
    render.plain({"directory": str(out)}) if as_json else typer.echo(str(out))


@drafts.command("list")
def drafts_list(context: typer.Context, as_json: Json = False) -> None:
    """All stored versions."""
    from tided.model.drafts import Draft

    render, answer = _get(context, "/v1/drafts")
    if as_json:
        render.plain(answer)
    else:
        snapshot = _client(context).status()
        render.drafts(_records(Draft, answer), [engine.info for engine in snapshot.engines], snapshot.canaries)


@drafts.command("show")
def drafts_show(context: typer.Context, draft: str, as_json: Json = False) -> None:
    """One version: lineage@number, or the first digits of its digest."""
    from tided.api.client import api_path

    _show_draft(_client(context).get(api_path("drafts", draft)), as_json)


@drafts.command("deploy")
def drafts_deploy(context: typer.Context, draft: str, engine: Engine = None, as_json: Json = False) -> None:
    """Swap a version into one engine, or into all that it fits, without asking the gate."""
    _show_deployments(_post(context, ("drafts", draft, "deploy"), {"engine": engine}), as_json)


@drafts.command("rollback")
def drafts_rollback(context: typer.Context, engine: str, as_json: Json = False) -> None:
    """Go back to the version that the engine served before, and quarantine the present one."""
    _show_deployments([_post(context, ("engines", engine, "rollback"), {})], as_json)


@jobs.command("list")
def jobs_list(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most this many, newest first.")] = 20,
    state: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")] = None,
    as_json: Json = False,
) -> None:
    """Jobs, newest first."""
    from tided.model.jobs import Job

    render, answer = _get(context, "/v1/jobs", {"limit": limit, **({"state": state} if state else {})})
    render.plain(answer) if as_json else render.jobs(_records(Job, answer))


@jobs.command("show")
def jobs_show(context: typer.Context, job: str, as_json: Json = False) -> None:
    """One job."""
    from tided.api.client import api_path

    _show_job(_client(context).get(api_path("jobs", job)), as_json)


@jobs.command("cancel")
def jobs_cancel(context: typer.Context, job: str, as_json: Json = False) -> None:
    """Stop a job. A running attempt ends within one lease."""
    _show_job(_post(context, ("jobs", job, "cancel"), {}), as_json)


@jobs.command("retry")
def jobs_retry(context: typer.Context, job: str, as_json: Json = False) -> None:
    """Train again, by a new job, where a training failed or was cancelled: from what is stored now."""
    _show_job(_post(context, ("jobs", job, "retry"), {}), as_json)


@policy.command("show")
def policy_show(context: typer.Context, as_json: Json = False) -> None:
    """What is set."""
    _show_policy(_client(context).get("/v1/policy"), as_json)


@policy.command("set")
def policy_set(
    context: typer.Context,
    mode: Annotated[str, typer.Argument(help="auto, off, or gamma=N.")],
    as_json: Json = False,
) -> None:
    """auto: tided decides by predicted speedup. off: no speculation. gamma=N: always N drafted tokens."""
    body: dict[str, Any] = {"mode": mode, "gamma": 0}
    if mode.startswith("gamma=") and mode.removeprefix("gamma=").isdecimal():
        body = {"mode": "fixed", "gamma": int(mode.removeprefix("gamma="))}
    elif mode not in ("auto", "off"):
        raise typer.BadParameter(f"expected auto, off or gamma=N, got {mode!r}", param_hint="MODE")
    _show_policy(_post(context, ("policy",), body), as_json)


@policy.command("explain")
def policy_explain(
    context: typer.Context,
    engine: Annotated[str | None, typer.Argument(help="Of the engines only this one.")] = None,
    as_json: Json = False,
) -> None:
    """The newest decision about each engine, with the figures that led to it."""
    from tided.model.status import Explanation

    render, answer = _get(context, "/v1/policy/decisions", {"engine": engine} if engine else None)
    render.plain(answer) if as_json else render.explanations(_records(Explanation, answer))


@train.command("now")
def train_now(context: typer.Context, engine: Engine = None, as_json: Json = False) -> None:
    """Train from what is stored, without waiting for drift or for more samples."""
    _show_job(_post(context, ("train",), {"engine": engine}), as_json)


@app.command()
def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more, until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many of the newest to begin with.")] = 20,
    as_json: Json = False,
) -> None:
    """What happened, oldest first. With --json one object a line."""
    client = _client(context)
    from tided.ctl import render
    from tided.model.codec import to_plain

    after, wait_s = "", 0.0
    while True:
        for item in client.events(after, limit, wait_s):
            after = item.id
            render.json_line(to_plain(item)) if as_json else render.event(item)
        if not follow:
            return
        # Nothing happened yet: "0" is before every event.
        after, limit, wait_s = after or "0", 1000, FOLLOW_WAIT_S


@config.command("check")
def config_check(file: Path) -> None:
    """Check a configuration file as tided does at its start. Needs no running tided."""
    from tided.config import check_plugins, load

    check_plugins(load(file), str(file))
    typer.echo(f"{file}: ok")


@app.command()
def purge(
    context: typer.Context,
    engine: Engine = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what was captured from requests, in Redis and on disk, of one engine or of all. Drafts stay."""
    if not yes:
        typer.confirm(f"Delete the captured samples of {engine or 'all engines'}?", abort=True)
    answer = _post(context, ("purge",), {"engine": engine}, slow=True)
    if as_json:
        from tided.ctl import render

        render.plain(answer)
    else:
        typer.echo(
            "purged: " + (", ".join(f"{name} {value}" for name, value in answer.items()) or "nothing was stored")
        )


def _get(context: typer.Context, path: str, query: dict[str, str | int | float] | None = None) -> tuple[Any, Any]:
    """The renderer and the answer: the call comes first, so that a missing daemon is told at once."""
    answer = _client(context).get(path, query)
    from tided.ctl import render

    return render, answer


def _post(context: typer.Context, parts: tuple[str, ...], body: dict[str, Any], slow: bool = False) -> Any:
    from tided.api.client import SLOW_TIMEOUT_S, api_path

    return _client(context).post(api_path(*parts), body, SLOW_TIMEOUT_S if slow else None)


def _records(cls: type[Any], answer: Any) -> list[Any]:
    from tided.model.codec import from_plain

    return [from_plain(cls, item) for item in answer]


def _show_draft(answer: Any, as_json: bool) -> None:
    from tided.ctl import render
    from tided.model.drafts import Draft

    render.plain(answer) if as_json else render.draft(*_records(Draft, [answer]))


def _show_job(answer: Any, as_json: bool) -> None:
    from tided.ctl import render
    from tided.model.jobs import Job

    render.plain(answer) if as_json else render.job(*_records(Job, [answer]))


def _show_deployments(answer: Any, as_json: bool) -> None:
    from tided.ctl import render
    from tided.model.deployments import Deployment

    render.plain(answer) if as_json else render.deployments(_records(Deployment, answer))


def _show_policy(answer: Any, as_json: bool) -> None:
    from tided.ctl import render, words
    from tided.model.policy import PolicySetting

    render.plain(answer) if as_json else render.say(f"policy {words.policy(*_records(PolicySetting, [answer]))}")


def exit_code(error: TideError) -> int:
    """See the module's docstring."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 5)


def main() -> None:
    """Run tidectl; every error is one line on stderr and an exit code."""
    try:
        app()
    except TideError as exc:
        sys.stderr.write(f"tidectl: {exc}\n")
        sys.exit(exit_code(exc))


if __name__ == "__main__":
    main()
