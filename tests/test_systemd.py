"""The units: what they start exists, they are confined, and systemd itself accepts and rates them where it is installed."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

UNITS = {
    "tided.service": "tided",
    "tided-collector@.service": "tided-collector",
    "tide-engine@.service": "tide-engine",
    "tide-worker@.service": "tide-worker",
}
SYSTEMD = Path("systemd")
EXPOSURE = 15  # tenths; systemd's scale goes to 10.0
EVERYWHERE = {
    "Type": "notify",
    "User": "tided",
    "KillMode": "mixed",
    "NoNewPrivileges": "true",
    "ProtectSystem": "strict",
    "ProtectHome": "true",
    "CapabilityBoundingSet": "",
    "IPAddressDeny": "any",
    "RestartPreventExitStatus": "2",
}


def settings(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (SYSTEMD / unit).read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_there_is_a_unit_for_every_process() -> None:
    assert {path.name for path in SYSTEMD.iterdir()} == set(UNITS)
    scripts = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(UNITS.values()) == set(scripts) - {"tidectl"}


@pytest.mark.parametrize("unit", UNITS)
def test_unit(unit: str, tmp_path: Path) -> None:
    found = settings(unit)
    assert {key: found.get(key) for key in EVERYWHERE} == {key: [value] for key, value in EVERYWHERE.items()}
    assert found["ExecStart"][0].split()[0] == f"/opt/tided/bin/{UNITS[unit]}"
    assert int(found["WatchdogSec"][0]) >= 30
    if shutil.which("systemd-analyze") is None:
        return  # this machine has no systemd to ask
    command = tmp_path / UNITS[unit]
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    copy = tmp_path / unit
    text = (SYSTEMD / unit).read_text(encoding="utf-8")
    copy.write_text(text.replace(f"/opt/tided/bin/{UNITS[unit]}", str(command)))
    verified = analyze("verify", "--man=no", str(copy))
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    rated = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", str(copy))
    assert rated.returncode == 0, rated.stdout.splitlines()[-1]
    assert "Overall exposure level" in rated.stdout


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=180, check=False)


def test_stop_timeouts_leave_room_for_the_drain() -> None:
    config = tomllib.loads(Path("config.toml").read_text(encoding="utf-8"))
    assert int(settings("tide-worker@.service")["TimeoutStopSec"][0]) > config["worker"]["drain_s"] + 10
    assert settings("tided.service")["RuntimeDirectory"] == ["tided"]
