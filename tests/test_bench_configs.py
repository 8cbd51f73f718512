"""Configuration files that benches write."""

from pathlib import Path

import pytest

from bench.configs import write_config
from tided.config import Config, load
from tided.model.errors import ConfigError

ROOT = Path(__file__).parent.parent


def test_changes_are_laid_over_the_default_file(tmp_path: Path) -> None:
    changes = {"daemon": {"state_dir": str(tmp_path / 'odd "name"')}, "training": {"min_rows": 7, "enabled": False}}
    config = write_config(tmp_path / "x" / "config.toml", changes, ROOT / "config.toml")
    assert config.training.min_rows == 7
    assert not config.training.enabled
    assert config.daemon.state_dir == tmp_path / 'odd "name"'
    assert config.gate == load(ROOT / "config.toml").gate


def test_without_a_base_the_built_in_defaults_hold(tmp_path: Path) -> None:
    assert write_config(tmp_path / "config.toml", {}, None) == Config()


def test_what_is_not_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_rowz"):
        write_config(tmp_path / "config.toml", {"training": {"min_rowz": 1}}, None)
