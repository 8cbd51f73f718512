"""[target] and [[target]]: names, what differs for one, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from tided.config import Config, parse
from tided.model.errors import ConfigError


def test_one_target_is_a_table_and_several_are_a_list() -> None:
    one = parse({"target": {"path": "/m/SmolLM2 135M"}}, "f")
    assert [target.lineage for target in one.target] == ["smollm2-135m"]
    assert one == parse({"target": [{"path": "/m/SmolLM2 135M"}]}, "f")
    assert Config().target[0].lineage == "smollm2"


def test_what_differs_for_one_target_leaves_the_other_as_it_is() -> None:
    config = parse(
        {
            "target": [
                {"path": "/m/a", "priority": 3, "training": {"min_rows": 7, "jobs_per_hour": 2}},
                {"path": "/m/b"},
            ],
            "training": {"min_rows": 100, "budget_s": 9.0},
            "engine": {"target": "b"},
        },
        "f",
    )
    a, b = config.target
    assert (config.training_of(a).min_rows, config.training_of(a).budget_s) == (7, 9.0)
    assert (a.priority, config.training_of(a).jobs_per_hour) == (3, 2)
    assert (b.priority, config.training_of(b).jobs_per_hour) == (0, 0)
    assert config.training_of(b) is config.training
    assert config.engine_target is b
    assert parse({"target": [{"path": "/m/a"}, {"path": "/m/b"}]}, "f").engine_target.path == Path("/m/a")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"target": []}, r"f: target: .*at least 1"),
        ({"target": [{"path": "/x/m"}, {"path": "/y/m"}]}, r"target: two have the name 'm'"),
        ({"target": {"pth": "/x"}}, r"f: target\.pth: unknown key; did you mean 'path'\?"),
        ({"target": [{"path": "/x"}, {"path": 3}]}, r"f: target\[2\]\.path: .*got 3"),
        ({"target": {"name": "No Name"}}, r"f: target\.name: .*'No Name' is not a name"),
        ({"target": {"path": "/m/a", "training": {"min_row": 7}}}, r"target a: training\.min_row: .*'min_rows'"),
        ({"target": {"path": "/m/a", "training": {"short_window": 600}}}, r"target a: .*short_window must be below"),
        ({"target": {"path": "/m/a", "priority": 10}}, r"f: target\.priority: .*9.*got 10"),
        ({"target": {"path": "/m/a", "training": {"device": "cuda:1"}}}, r"target a: training\.device: .*got 'cuda:1'"),
        ({"worker": {"devices": 2, "device": "cuda:1"}}, r"worker: device must be a kind without a number"),
        ({"target": {"path": "/m/a"}, "engine": {"target": "b"}}, r"engine\.target 'b' is none of the targets: a"),
    ],
)
def test_what_is_refused(data: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(data, "f")
