"""Every Redis key of tided. No other module spells a key.

Keys of an engine carry the hash tag `{engine}`, so that a sample's XADD and its byte credit stay in one slot of a Redis Cluster;
keys of the control plane carry `{ctl}`. `PERMANENT` names the patterns that may live without a TTL; everything else must expire,
which a fixture of the integration tests enforces.
"""

from tided.model.ids import check_name

PREFIX = "tided:"

PERMANENT = (
    "tided:{*}:samples",  # bounded by byte credit
    "tided:{*}:credit",
    "tided:{*}:dead",  # bounded by MAXLEN
    "tided:{*}:ledger",  # one hash of counters an engine
    "tided:{ctl}:epoch",
    "tided:{ctl}:events",  # bounded by MAXLEN
    "tided:{ctl}:state:*",  # a few records an engine or target
    "tided:{ctl}:policy",
    "tided:{ctl}:cordon:*",  # one word a worker, until the operator takes it back
)


def _engine(engine: str, name: str) -> str:
    return f"{PREFIX}{{{check_name(engine, 'engine')}}}:{name}"


def _control(name: str) -> str:
    return f"{PREFIX}{{ctl}}:{name}"


# --- engine side ---


def samples(engine: str) -> str:
    """Stream of sample chunks: fields `h` (header) and `p` (payload)."""
    return _engine(engine, "samples")


def credit(engine: str) -> str:
    """Bytes of samples in the stream that are not acknowledged yet (an integer)."""
    return _engine(engine, "credit")


def dead(engine: str) -> str:
    """Stream of poison entries set aside, without their payload."""
    return _engine(engine, "dead")


def ledger(engine: str) -> str:
    """Hash of the collector's counters for the engine's samples, in rows."""
    return _engine(engine, "ledger")


def seen(engine: str, incarnation: str) -> str:
    """Hash of one producer incarnation's stored sequence numbers (a watermark and what is above it) and last totals. Has a TTL."""
    return _engine(engine, f"seen:{check_name(incarnation, 'incarnation')}")


def seen_pattern(engine: str) -> str:
    """Matches `seen` of every incarnation of the engine."""
    return _engine(engine, "seen:*")


def aside(engine: str) -> str:
    """Hash of what the collector sets aside for the self-test: `i:INCARNATION` and `g:GROUP`. Written by the leader; has a TTL."""
    return _engine(engine, "aside")


def purge(engine: str) -> str:
    """The entry of `samples` up to which an operator wants everything gone. Written by the leader; has a TTL."""
    return _engine(engine, "purge")


def pressing(engine: str) -> str:
    """Present while a question waits for the engine's newest samples. Written by the leader; has a TTL."""
    return _engine(engine, "pressing")


def info(engine: str) -> str:
    """The engine's heartbeat record, under a TTL."""
    return _engine(engine, "info")


def commands(engine: str) -> str:
    """Stream of commands to the engine; read from the newest at start; trimmed and under a TTL."""
    return _engine(engine, "commands")


def replies(engine: str) -> str:
    """Stream of the engine's replies; trimmed and under a TTL."""
    return _engine(engine, "replies")


def observations(engine: str) -> str:
    """Stream of the engine's reports; trimmed and under a TTL."""
    return _engine(engine, "observations")


def fetches(engine: str) -> str:
    """List of an engine's requests for parts of a draft. Has a TTL."""
    return _engine(engine, "fetches")


def parts(engine: str, command: str) -> str:
    """List of the parts of a draft on their way to the engine that a `deliver` command is about. Has a TTL."""
    return _engine(engine, f"parts:{check_name(command, 'command')}")


ENGINE_INFO_PATTERN = f"{PREFIX}{{*}}:info"
SAMPLES_PATTERN = f"{PREFIX}{{*}}:samples"
SAMPLES_GROUP = "collector"

# --- control plane ---


def lease() -> str:
    """The leader's lease: its name, under a TTL."""
    return _control("lease")


def epoch() -> str:
    """The newest epoch given to any leader."""
    return _control("epoch")


def job(job_id: str) -> str:
    return _control(f"job:{check_name(job_id, 'job')}")


JOB_PREFIX = f"{PREFIX}{{ctl}}:job:"
"""Before a job id, it is `job(id)`: for scripts that find the id in a queue."""


def jobs(state: str) -> str:
    """Sorted set of the ids of queued jobs, or of those that ended in a state, by when they came into it."""
    return _control(f"jobs:{check_name(state, 'job state')}")


JOBS_PREFIX = f"{PREFIX}{{ctl}}:jobs:"
"""Before a state, it is `jobs(state)`: for scripts that move a job."""


def untold() -> str:
    """List of the ids of jobs that have failed for good, until the leader has told of them."""
    return _control("jobs-untold")


def queue(alike: str) -> str:
    """Sorted set of queued job ids by the time before which they must not start. `alike`: what the jobs of the queue have in
    common (`tided.machine.placement.queue_of`)."""
    return _control(f"queue:{check_name(alike, 'queue')}")


QUEUE_PREFIX = f"{PREFIX}{{ctl}}:queue:"
"""Before what its jobs have in common, it is `queue`: for scripts that find that in a job."""


def queues() -> str:
    """Sorted set of the queues that are not empty, by what comes after `QUEUE_PREFIX`, most urgent first."""
    return _control("queues")


def idle() -> str:
    """Sorted set of the workers that asked for a training in vain, by their rate."""
    return _control("idle")


def offers() -> str:
    """Hash: what the workers of `idle` offer, and when they asked."""
    return _control("idle-offers")


def running() -> str:
    """Sorted set of running job ids by the time at which their lease ends."""
    return _control("running")


def worker(worker_name: str) -> str:
    """A worker's heartbeat: a hash of its record and its incarnation, under a TTL."""
    return _control(f"worker:{check_name(worker_name, 'worker')}")


def cordon(worker_name: str) -> str:
    """Present while an operator wants the worker to claim nothing: `cordon`, or `drain` when it shall also give back what it runs."""
    return _control(f"cordon:{check_name(worker_name, 'worker')}")


CORDON_PREFIX = f"{PREFIX}{{ctl}}:cordon:"
"""Before a worker's name, it is `cordon(name)`."""


WORKER_PREFIX = f"{PREFIX}{{ctl}}:worker:"
"""Before a worker's name, it is `worker(name)`."""


def workers() -> str:
    """Sorted set of the workers that have registered and not signed off, by their last heartbeat; those of the last day."""
    return _control("workers")


def events() -> str:
    return _control("events")


def policy() -> str:
    return _control("policy")


def state(name: str, about: str) -> str:
    """A record of the leader about an engine (its deployment) or a target by its digest (its collection, its head)."""
    return _control(f"state:{check_name(name)}:{check_name(about)}")
