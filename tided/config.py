"""The configuration file as frozen models. Every rule about values, alone or together, is here.

`load(path)` reads TOML and either gives a whole `Config` or raises one `ConfigError` that lists every problem as
`file: key: what was expected, what was got`; a misspelt key is refused with the nearest known one named.
"""

import difflib
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    model_validator,
)

from tided.model import plugins
from tided.model.errors import ConfigError, Refused
from tided.model.ids import check_name, name_from

Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1)]


def _hidden(options: dict[str, Any]) -> dict[str, str]:
    return dict.fromkeys(options, "**********")


Options = Annotated[dict[str, Any], Field(repr=False), PlainSerializer(_hidden)]
"""Of somebody else's: they may hold credentials, so only their names are ever shown."""


def _name(value: str) -> str:
    try:
        return check_name(value)
    except Refused as exc:
        raise ValueError(str(exc)) from exc


Name = Annotated[str, AfterValidator(_name)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class RedisConfig(_Section):
    """`url` empty: tided starts its own Valkey on a unix socket under `daemon.state_dir`."""

    url: SecretStr = SecretStr("")
    maxmemory_bytes: Bytes = 512 * 1024 * 1024

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        url = self.url.get_secret_value()
        if url and urlsplit(url).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("url must start with redis://, rediss:// or unix://, or be empty for the embedded Valkey")
        return self


class DaemonConfig(_Section):
    name: Name = "tided"
    state_dir: Path = Path("build/state")
    socket: Path | None = None  # None: state_dir/tided.sock
    socket_mode: Literal["0600", "0660"] = "0600"
    lease_ttl_s: Seconds = 10.0
    cycle_s: Seconds = 0.5
    http_host: str = "127.0.0.1"
    http_port: Annotated[int, Field(ge=0, le=65535)] = 0  # 0: no TCP listener
    start_collector: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def socket_path(self) -> Path:
        return self.socket or self.state_dir / "tided.sock"


class TargetConfig(_Section):
    """A model that engines serve. All engines that serve it share its samples, its trainings and its drafts.

    `name` is that of its drafts' lineage, None: its directory's. `priority`: its jobs go before those of targets with a lower one.
    `training`: what differs from [training] for this target.
    """

    path: Path = Path("build/models/smollm2")
    name: Name | None = None
    priority: Annotated[int, Field(ge=0, le=9)] = 0
    training: dict[str, Any] = {}

    @cached_property
    def lineage(self) -> str:
        return self.name or name_from(self.path.resolve().name, "draft")


class EngineConfig(_Section):
    """What the embedded engine, `tide-engine`, starts with. `target`: the name of the one that it serves, None: the first."""

    id: Name = "local"
    target: Name | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"
    threads: Count = 1
    max_batch: Annotated[int, Field(ge=1, le=64)] = 8
    max_context: Annotated[int, Field(ge=32)] = 1024
    gamma_max: Annotated[int, Field(ge=0, le=8)] = 4
    report_interval_s: Seconds = 0.5


class CaptureConfig(_Section):
    """`credit_bytes` bounds what waits in Redis; `ring_slots` chunks of about 1 MB are allocated in the engine."""

    last_hidden: bool = True
    ring_slots: Annotated[int, Field(ge=2, le=1024)] = 16
    credit_bytes: Bytes = 128 * 1024 * 1024


class SelfTestConfig(_Section):
    """What is asked of an engine before its samples may train and its draft may be swapped.

    `probe`: send short fixed prompts to engines that tell their URL. `tolerance`: relative error of tapped states against
    float32 reference states; a quantised target needs more.
    """

    enabled: bool = True
    probe: bool = True
    allow_unverified: bool = False
    tolerance: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    reference_wait_s: Seconds = 120.0
    probe_timeout_s: Seconds = 30.0
    retry_s: Seconds = 300.0


class SamplesConfig(_Section):
    """Bounds of what is kept on disk. `held_out_fraction` of the prompts is never trained on."""

    held_out_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    max_bytes: Bytes = 2 * 1024 * 1024 * 1024
    max_age_s: Seconds = 86400.0
    shard_rows: Count = 4096
    shard_age_s: Seconds = 10.0


class StorageConfig(_Section):
    """Where tided and its workers hand samples, drafts and reference states over to each other.

    `url` empty: nothing is handed over; workers and engines see `daemon.state_dir` under the same path. `options` go to the filesystem of
    the URL's scheme; they may hold credentials, so only their names are ever shown. `cache_bytes` bounds what a worker, and tided for
    itself, keeps of it on the own disk.
    """

    url: SecretStr = SecretStr("")
    options: Options = {}
    cache_bytes: Bytes = 8 * 1024 * 1024 * 1024

    @property
    def is_shared(self) -> bool:
        return bool(self.url.get_secret_value())

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        if self.is_shared and "://" not in self.url.get_secret_value():
            raise ValueError(
                "url must be one that fsspec knows, such as file:///mnt/tided or s3://bucket/tided, or empty"
            )
        return self


class SpeculationConfig(_Section):
    """How many tokens are drafted. Speculation is chosen where predicted speedup > 1 + `margin`.

    `policy` is a name of the entry points `tided.policies`; `options` are for policies that take their own. `probe_loss`: the share of
    the time that probes may cost; `most_lost`: of the last minute, what drafting may cost in all before it rests. `shadow_every_s`: while
    nothing is drafted, how often a worker scores the draft on tapped states; 0 is never.
    """

    policy: str = "threshold"
    options: Options = {}
    gamma_max: Annotated[int, Field(ge=0, le=8)] = 4
    margin: Annotated[float, Field(ge=0, le=1)] = 0.03
    hysteresis: Annotated[float, Field(ge=0, le=1)] = 0.03
    dwell_steps: Count = 32
    probe_every_s: Seconds = 5.0
    probe_steps: Count = 16
    probe_loss: Annotated[float, Field(gt=0, le=1)] = 0.01
    most_lost: Annotated[float, Field(gt=0, le=1)] = 0.02
    shadow_every_s: Annotated[float, Field(ge=0)] = 60.0


class TrainingConfig(_Section):
    """When to train (Algorithm 1) and with what.

    `fault_check_s`: how often, at most, the served draft is scored to see whether the engine accepts what it could, when nothing has
    fallen; 0 is never. `fault_wait_s`: how long training waits for the score that explains a fall. `jobs_per_hour` and
    `worker_s_per_hour` bound the trainings that begin of themselves, 0 is no bound; `plateau_gain`: after two drafts in a row that
    gained less than this share, none begins until acceptance drifts; 0 is never. `batch_tokens`: of a step, 0 is the recipe's. `device`,
    `devices` and `memory_bytes` (of each): what a worker must have to be given a training; "" is any kind.
    """

    enabled: bool = True
    min_rows: Count = 20_000
    short_window: Count = 64
    long_window: Count = 512
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.05
    cool_down_s: Annotated[float, Field(ge=0)] = 20.0
    budget_s: Seconds = 180.0
    replay_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    draft_vocab: Annotated[int, Field(ge=64)] = 8192
    fault_check_s: Annotated[float, Field(ge=0)] = 300.0
    fault_wait_s: Annotated[float, Field(ge=0)] = 120.0
    jobs_per_hour: Annotated[int, Field(ge=0)] = 0
    worker_s_per_hour: Annotated[float, Field(ge=0)] = 0.0
    plateau_gain: Annotated[float, Field(ge=0, lt=1)] = 0.01
    batch_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    device: Annotated[str, Field(pattern="^[a-z]*$", max_length=16)] = ""
    devices: Annotated[int, Field(ge=1, le=1024)] = 1
    memory_bytes: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        if self.short_window >= self.long_window:
            raise ValueError("short_window must be below long_window")
        if 0 < self.worker_s_per_hour < self.budget_s:
            raise ValueError("worker_s_per_hour must be 0, or at least budget_s, or no training could ever begin")
        return self


class PoolConfig(_Section):
    """Drafts by domain, to go back to when traffic does.

    `size`: most domains of a target. After a drift its drafts are scored once so many requests and scored rows are in stock, within
    `deadline_s`, for which training waits; while the drift is unanswered or acceptance has risen, every `retry_s`. `same`: share of its
    length at home by which a draft may fall short and be taken to be home; `alike`: share by which near-duplicates may differ.
    `reserve_share`: of `samples.max_bytes`, what all domains together may keep for replay.
    """

    enabled: bool = True
    size: Annotated[int, Field(ge=2, le=64)] = 8
    min_requests: Annotated[int, Field(ge=2)] = 10
    min_rows: Count = 400
    deadline_s: Seconds = 60.0
    retry_s: Seconds = 60.0
    same: Annotated[float, Field(ge=0, lt=1)] = 0.15
    alike: Annotated[float, Field(ge=0, lt=1)] = 0.03
    reserve_share: Annotated[float, Field(gt=0, le=0.75)] = 0.25


class GateConfig(_Section):
    """A draft is deployed only if the lower bound of its gain on held-out requests is above zero."""

    min_requests: Annotated[int, Field(ge=2)] = 30
    min_tokens: Count = 2000
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 2000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    seed: int = 0


class DeploymentConfig(_Section):
    """How a new version is watched: for `watch_requests`, or `watch_s` at most. On the one engine that gets it before the others do, for
    `canary_requests` and `canary_s` if these are more."""

    swap_deadline_s: Seconds = 30.0
    watch_requests: Count = 20
    watch_s: Seconds = 120.0
    canary_requests: Count = 60
    canary_s: Seconds = 300.0
    rollback_margin: Annotated[float, Field(gt=0, lt=1)] = 0.10


class JobsConfig(_Section):
    lease_s: Seconds = 15.0
    keep_s: Seconds = 7 * 86400.0


class WorkerConfig(_Section):
    """`devices`: a training runs on so many, one process each; `memory_bytes`: of each, 0: what the host has, if they are its processors.

    `drain_s`: how long what runs may go on when the worker is stopped, or drains.
    """

    name: Name = "worker"
    kinds: tuple[Literal["train", "score", "reference"], ...] = ("train", "score", "reference")
    threads: Count = 1
    device: str = "cpu"
    devices: Annotated[int, Field(ge=1, le=64)] = 1
    memory_bytes: Annotated[int, Field(ge=0)] = 0
    drain_s: Annotated[float, Field(ge=0)] = 20.0

    @model_validator(mode="after")
    def _check_devices(self) -> Self:
        if self.devices > 1 and ":" in self.device:
            raise ValueError("device must be a kind without a number, such as cuda, when there are several devices")
        return self


class LauncherConfig(_Section):
    """Workers from a scheduler that owns the devices. `kind` empty: none; else a name of the entry points `tided.launchers`.

    `name`: launched workers are NAME-1 to NAME-`max_workers`; one for each tided at a scheduler. `command`: a shell's, how tide-worker is
    started there, to which flags are added. `cpus` is asked of the scheduler for each, and `devices` if `device` is not "cpu"; with
    `memory_bytes` (of each, 0: not known) they are what such a worker says that it has. `after_s`: a job that waits so long gets a
    worker of its own although one that is registered could do it. `idle_s`: a launched worker that finds no job for so long ends.
    `options` are handed to the scheduler with each submission; of these too only the names are ever shown.
    """

    kind: str = ""
    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]*$", max_length=32)] = "launched"
    url: str = "http://127.0.0.1:8265"
    token: SecretStr = SecretStr("")
    command: Annotated[str, Field(min_length=1)] = "tide-worker --config /etc/tided/config.toml"
    cpus: Annotated[float, Field(ge=0)] = 1.0
    device: Annotated[str, Field(pattern="^[a-z]+$", max_length=16)] = "cpu"
    devices: Annotated[int, Field(ge=1, le=64)] = 1
    memory_bytes: Annotated[int, Field(ge=0)] = 0
    max_workers: Annotated[int, Field(ge=1, le=64)] = 1
    after_s: Annotated[float, Field(ge=0)] = 10.0
    idle_s: Seconds = 60.0
    options: Options = {}


def _listed(value: Any) -> Any:
    """[target] is one, [[target]] are several."""
    return [value] if isinstance(value, dict | TargetConfig) else value


class Config(_Section):
    redis: RedisConfig = RedisConfig()
    daemon: DaemonConfig = DaemonConfig()
    target: Annotated[tuple[TargetConfig, ...], BeforeValidator(_listed), Field(min_length=1)] = (TargetConfig(),)
    engine: EngineConfig = EngineConfig()
    capture: CaptureConfig = CaptureConfig()
    self_test: SelfTestConfig = SelfTestConfig()
    samples: SamplesConfig = SamplesConfig()
    storage: StorageConfig = StorageConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    training: TrainingConfig = TrainingConfig()
    pool: PoolConfig = PoolConfig()
    gate: GateConfig = GateConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    jobs: JobsConfig = JobsConfig()
    worker: WorkerConfig = WorkerConfig()
    launcher: LauncherConfig = LauncherConfig()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.daemon.cycle_s * 3 > self.daemon.lease_ttl_s:
            raise ValueError(
                "daemon.lease_ttl_s must be at least three times daemon.cycle_s, or the lease is lost between cycles"
            )
        if self.speculation.gamma_max > self.engine.gamma_max:
            raise ValueError(
                "speculation.gamma_max must not be above engine.gamma_max, which bounds what the engine can draft"
            )
        if self.capture.credit_bytes * 2 > self.redis.maxmemory_bytes and not self.redis.url.get_secret_value():
            raise ValueError("redis.maxmemory_bytes must be at least twice capture.credit_bytes")
        lineages = [target.lineage for target in self.target]
        for name in lineages:
            if lineages.count(name) > 1:
                raise ValueError(f"target: two have the name {name!r}; give each a target.name of its own")
        if self.engine.target is not None and self.engine.target not in lineages:
            raise ValueError(f"engine.target {self.engine.target!r} is none of the targets: {', '.join(lineages)}")
        for target in self.target:
            self.training_of(target)
        return self

    @property
    def engine_target(self) -> TargetConfig:
        """What the embedded engine serves."""
        return next((target for target in self.target if target.lineage == self.engine.target), self.target[0])

    def training_of(self, target: TargetConfig) -> TrainingConfig:
        """[training] with what differs for a target."""
        if not target.training:
            return self.training
        try:
            return TrainingConfig.model_validate(self.training.model_dump() | target.training)
        except ValidationError as exc:
            problems = "; ".join(_problem(error, ("training",)) for error in exc.errors(include_url=False))
            raise ValueError(f"target {target.lineage}: {problems}") from exc

    @property
    def redis_url(self) -> str:
        """Where Redis is: the configured URL, or the embedded Valkey's socket."""
        socket = (self.daemon.state_dir / "valkey" / "valkey.sock").absolute()
        return self.redis.url.get_secret_value() or f"unix://{socket}"

    @property
    def samples_dir(self) -> Path:
        return self.daemon.state_dir / "samples"

    @property
    def drafts_dir(self) -> Path:
        return self.daemon.state_dir / "drafts"

    @property
    def cache_dir(self) -> Path:
        """Where tided keeps what workers put into the shared storage, until it has taken it."""
        return self.daemon.state_dir / "cache"

    @property
    def references_dir(self) -> Path:
        return self.daemon.state_dir / "references"


def load(path: Path) -> Config:
    """Read and check a configuration file. Relative paths in it are relative to the working directory.

    Raises `ConfigError` that lists every problem; nothing is ever half taken.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigError(
            f"{path}: there is no such file; copy the commented config.toml and pass it with --config"
        ) from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}") from exc
    return parse(data, str(path))


def check_plugins(config: Config, source: str) -> None:
    """Raise `ConfigError` when `config` names a policy or a launcher that is not installed here.

    For tided and who checks a file for it: engines and workers read the same file on hosts without its plugins.
    """
    named = [("speculation.policy", plugins.POLICIES, config.speculation.policy)]
    if config.launcher.kind:
        named.append(("launcher.kind", plugins.LAUNCHERS, config.launcher.kind))
    for key, group, name in named:
        try:
            plugins.find(group, name)
        except Refused as exc:
            raise ConfigError(f"{source}: {key}: {exc}") from exc


def parse(data: dict[str, Any], source: str) -> Config:
    """Check a plain table; `source` names it in errors."""
    try:
        return Config.model_validate(data)
    except ValidationError as exc:
        problems = [f"{source}: {_problem(_unlisted(error, data))}" for error in exc.errors(include_url=False)]
        raise ConfigError("\n".join(problems)) from exc


def _unlisted(error: Any, data: dict[str, Any]) -> Any:
    """Without the number of a target where [target] is the only one."""
    location = error["loc"]
    if location[:1] == ("target",) and isinstance(data["target"], dict):
        return {**error, "loc": tuple(part for part in location if not isinstance(part, int))}
    return error


def _problem(error: Any, above: tuple[str, ...] = ()) -> str:
    location: list[str | int] = [*above, *error["loc"]]
    key = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in location)
    key = key.removeprefix(".") or "(whole file)"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(location)}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    got = "" if error["type"] == "missing" or {"url", "options"} & set(location) else f", got {error['input']!r}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}{got}"


def _nearest(location: list[str | int]) -> str:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        annotation = next(iter(get_args(annotation)), annotation)  # of a tuple of sections, the section
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        model = annotation
    close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(model.model_fields)}"
