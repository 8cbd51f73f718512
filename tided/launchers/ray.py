"""Ray by its Jobs API over HTTP: nothing of Ray is installed beside tided.

A launch is a submission. Ray holds it back until the processors and devices that it names are free, runs it on whatever node has them,
sets CUDA_VISIBLE_DEVICES there, and keeps what became of it until that is deleted.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httpx

from tided.config import LauncherConfig
from tided.model.errors import Refused, Unavailable
from tided.model.launch import Launch, LaunchState

TIMEOUT_S = 8.0
SUBMIT_S = 60.0
"""Ray may leave a submission pending for ever when its client hangs up."""
_JOBS = "/api/jobs/"
_STATES = {
    "PENDING": LaunchState.PENDING,
    "RUNNING": LaunchState.RUNNING,
    "STOPPED": LaunchState.STOPPED,
    "SUCCEEDED": LaunchState.SUCCEEDED,
    "FAILED": LaunchState.FAILED,
}
_AWAY = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
_MESSAGE_CHARS = 300


class RayLauncher:
    """See `tided.launchers.base.Launcher`. `transport`: for tests, instead of the network."""

    def __init__(self, config: LauncherConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Raises `Refused` for a URL that is none."""
        self._config = config
        token = config.token.get_secret_value()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        try:
            self._client = httpx.AsyncClient(base_url=config.url, headers=headers, trust_env=False, transport=transport)
        except httpx.InvalidURL as exc:
            raise Refused(f"launcher.url {config.url!r}: {exc}") from exc

    async def states(self) -> dict[str, Launch]:
        listed = _body(await self._ask("GET", _JOBS))
        try:
            submitted = [job for job in listed if job["submission_id"]]  # others were begun from within the cluster
            return {job["submission_id"]: _launch(job) for job in submitted}
        except (KeyError, TypeError, ValueError) as exc:
            raise Refused(f"Ray at {self._config.url}: a list of jobs of another shape: {exc!r}") from exc

    async def submit(self, launch_id: str, command: str) -> None:
        config = self._config
        body: dict[str, Any] = {"entrypoint_num_cpus": config.cpus}
        if config.device != "cpu":
            body["entrypoint_num_gpus"] = config.devices
        body |= config.options
        body |= {"entrypoint": command, "submission_id": launch_id}
        answer = await self._ask("POST", _JOBS, body, SUBMIT_S)
        if answer.is_error and "already exists" not in answer.text:
            raise self._refusal("submit", answer)

    async def cancel(self, launch_id: str) -> None:
        """A submission that has not begun stays pending, and is stopped as soon as it begins."""
        self._check("stop", await self._ask("POST", f"{_JOBS}{launch_id}/stop"))

    async def forget(self, launch_id: str) -> None:
        self._check("delete", await self._ask("DELETE", f"{_JOBS}{launch_id}"))

    async def aclose(self) -> None:
        await self._client.aclose()

    def _check(self, what: str, answer: httpx.Response) -> None:
        if answer.is_error and answer.status_code != HTTPStatus.NOT_FOUND:
            raise self._refusal(what, answer)

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = TIMEOUT_S
    ) -> httpx.Response:
        try:
            answer = await self._client.request(method, path, json=body, timeout=timeout_s)
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            why = str(exc) or type(exc).__name__
            raise Unavailable(f"Ray at {self._config.url} cannot be reached: {why}") from exc
        if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise Refused(f"Ray at {self._config.url} lets nobody in without its token: set launcher.token")
        if answer.status_code in _AWAY:
            raise Unavailable(f"Ray at {self._config.url} answers {answer.status_code}")
        return answer

    def _refusal(self, what: str, answer: httpx.Response) -> Refused:
        """Errors of Ray are whole tracebacks: the sentence is in a last line."""
        return Refused(f"Ray at {self._config.url} would not {what}: {_sentence(answer.text)} ({answer.status_code})")


def _body(answer: httpx.Response) -> Any:
    try:
        return answer.raise_for_status().json()
    except (httpx.HTTPStatusError, ValueError) as exc:
        raise Refused(f"{answer.url} answers no list of jobs: is it the address of Ray's dashboard? ({exc})") from exc


def _launch(job: Mapping[str, Any]) -> Launch:
    state = _STATES[job["status"]]
    message = str(job.get("message") or "")
    failed = state is LaunchState.FAILED
    return Launch(state, _failure(message) if failed else message[:_MESSAGE_CHARS], int(job.get("end_time") or 0))


def _failure(message: str) -> str:
    """Ray says how it ended, and then shows the log, of which the last line is most to the point."""
    head, _, log = message.partition(", last available logs")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{_sentence(head)}: {lines[-1][:_MESSAGE_CHARS]}" if len(lines) > 1 else _sentence(head)


def _sentence(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" .\t")]
    return lines[-1][:_MESSAGE_CHARS] if lines else "no reason given"
