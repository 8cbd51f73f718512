"""Which adapter serves an engine: by the kind in its heartbeat, from the entry points `tided.backends`."""

from tided.backends.base import Backend
from tided.backends.guarded import GuardedBackend
from tided.backends.redis import RedisBackend
from tided.model import plugins
from tided.model.engines import EngineInfo
from tided.store.engines import EngineStore


def backend_for(info: EngineInfo, store: EngineStore) -> Backend:
    """The adapter for an engine; a kind that nobody provides is a stack that speaks the protocol.

    Raises `Refused`, which names the plugin, when the one that claims this kind is broken.
    """
    plugin = plugins.installed(plugins.BACKENDS).get(info.kind)
    if plugin is None:
        return RedisBackend(info.engine, store)
    made = plugin.load()
    make = made.of if isinstance(made, type) and issubclass(made, Backend) else made
    if plugin.own:
        return make(info, store)
    try:
        backend = make(info, store)
    except Exception as exc:
        raise plugin.failed(f"making an adapter for engine {info.engine}", exc) from exc
    if not isinstance(backend, Backend):
        raise plugin.failed("making an adapter", TypeError(f"{type(backend).__name__} is no Backend"))
    return GuardedBackend(backend, plugin)
