"""Packages that are not installed but look so: a folder with modules and metadata, for `sys.path` or PYTHONPATH. No pip, no network."""

import shutil
import tomllib
from pathlib import Path

EXAMPLE = Path(__file__).parent / "plugin_example"


def install(root: Path, package: str, entry_points: dict[str, dict[str, str]], modules: dict[str, str]) -> Path:
    """Put a package of single-file `modules` into `root`, as `pip install --target` would."""
    metadata = root / f"{package.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = list[str]()
    for group, names in entry_points.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in names.items()), ""]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    for name, source in modules.items():
        (root / f"{name}.py").write_text(source)
    return root


def install_example(root: Path) -> Path:
    """Put tests/plugin_example into `root`, with the entry points that its pyproject.toml declares."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(root, project["name"], project["entry-points"], {})
    shutil.copytree(EXAMPLE / "tided_example", root / "tided_example", ignore=shutil.ignore_patterns("__pycache__"))
    return root
