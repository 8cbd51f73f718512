"""A real S3 server: rclone's, over HTTP."""

import os
import socket
import subprocess
import sysconfig
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from bench.configs import free_port
from tided.model.ids import new_id

KEY, SECRET = "tided-test", "canary-of-the-secret"


class S3Server:
    """Keeps buckets below `root`, for `KEY` and `SECRET` alone. It can be killed, and started again."""

    def __init__(self, root: Path) -> None:
        self.root, self._port = root, free_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.start()

    @property
    def options(self) -> dict[str, Any]:
        """What a storage's `options` say."""
        return {"endpoint_url": self.endpoint, "key": KEY, "secret": SECRET}

    @property
    def environment(self) -> dict[str, str]:
        """What a host's environment says in their place."""
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL_S3": self.endpoint}
        return keys | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}

    def start(self) -> None:
        program = Path(sysconfig.get_path("scripts")) / "rclone"
        arguments = ["serve", "s3", "--addr", f"127.0.0.1:{self._port}", "--config", os.devnull, str(self.root)]
        with (self.root.parent / "rclone.log").open("ab") as log:
            self.process = subprocess.Popen(
                [program, *arguments], env={"RCLONE_AUTH_KEY": f'"{KEY},{SECRET}"'}, stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def new_bucket(self) -> str:
        self.client.mkdir(name := new_id("bucket"))
        return name

    @cached_property
    def client(self) -> Any:
        """Beside the stores' own, which are those of other hosts."""
        return fsspec.filesystem("s3", **self.options, skip_instance_cache=True, use_listings_cache=False)
