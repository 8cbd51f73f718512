"""Runs tidectl in this process, as a user would: arguments in, exit code and both streams out."""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from unittest import mock

import anyio

from tided.ctl.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def tidectl(*arguments: str, stdin: str = "") -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["tidectl", *arguments]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()))),
        mock.patch.dict("os.environ", {"COLUMNS": "80"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exc:
            return Outcome(cast("int", exc.code or 0), out.getvalue(), err.getvalue())
    return Outcome(0, out.getvalue(), err.getvalue())


async def tidectl_at(socket: Path, *arguments: str, stdin: str = "") -> Outcome:
    """In a thread, so that the server in this event loop can answer."""
    return await anyio.to_thread.run_sync(lambda: tidectl("--socket", str(socket), *arguments, stdin=stdin))
