"""S3 as a storage, by s3fs. Imported for s3:// URLs only: s3fs is an extra.

Its stack has time limits for connecting and for reading, and none for writing, nor for the "100 Continue" that an upload waits for: a
server that is there and says nothing would hold its caller for ever. Here each request has one.
"""

import asyncio
from typing import Any

import fsspec
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.exceptions import ReadTimeoutError

CONNECT_S = 5.0
READ_S = 10.0
"""Between bytes of an answer."""
REQUEST_S = 20.0
"""Until an answer begins: in this time a part is written, so a host needs 500 KB/s."""
PART_BYTES = 8 << 20
"""Of an upload, and of a download: what is held in memory, twice. S3 takes 10,000 parts."""
TRIES = 2
"""By botocore (5xx, "slow down", a lost connection) and again by s3fs (an answer that breaks off): a call fails within 2 * 2 requests."""


class _Session(AIOHTTPSession):
    async def send(self, request: Any) -> Any:
        try:
            async with asyncio.timeout(REQUEST_S):
                return await super().send(request)
        except TimeoutError as exc:
            raise ReadTimeoutError(endpoint_url=request.url, error=exc) from exc


def open_filesystem(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The filesystem and the path in it. `options` are s3fs's, and go before what is set here. Nothing is sent yet.

    Raises `TypeError` for options that nothing knows.
    """
    config = {
        "connect_timeout": CONNECT_S,
        "read_timeout": READ_S,
        "retries": {"mode": "standard", "total_max_attempts": TRIES},
        "http_session_cls": _Session,
    } | options.get("config_kwargs", {})
    filesystem, root = fsspec.url_to_fs(url, **{"default_block_size": PART_BYTES} | options | {"config_kwargs": config})
    AioConfig(**config)  # these two s3fs would make with its first request
    AioSession(**filesystem.kwargs)
    filesystem.retries = TRIES
    return filesystem, root
