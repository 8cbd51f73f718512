"""What the plugin hooks and reads in SGLang's installed source, by its syntax: when a target moves, this fails and says which."""

import ast
import json
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.ctl_run import tidectl
from tests.engines.environment import CHECKOUT, engine_environment
from tests.tiny import make_target
from tided.engine.sglang import plugin, profile

ARGUMENTS = {
    f"{plugin.WORKER}.forward_batch_generation": ["self", "batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"],
    f"{plugin.WORKER}.verify": ["self", "batch"],
    plugin.PARAMETERS: [],
    f"{plugin.SCHEDULER}.run_event_loop": ["self"],
    f"{plugin.SCHEDULER}.process_input_requests": ["self", "recv_reqs"],
    f"{plugin.SCHEDULER}.process_batch_result": ["self", "batch", "result"],
    f"{plugin.SCHEDULER}.abort_request": ["self", "recv_req"],
    f"{plugin.STATE}.get_internal_state": ["self", "recv_req"],
    f"{plugin.TOKENIZER}.generate_request": ["self", "obj", "request"],
}
MENTIONS = {
    "managers/utils.py": ("class GenerationBatchResult", "accept_lens", "logits_output"),
    "managers/schedule_batch.py": (
        "def output_ids_through_stop",
        "finished_reason",
        "is_retracted",
        "origin_input_ids",
    ),
    "managers/scheduler.py": ("self.model_worker", "self.running_batch", "self.chunked_req", "self.gracefully_exit"),
    "speculative/eagle_worker_v2.py": ("self.hot_token_id", "self.draft_runner", "self.speculative_num_steps"),
    "environ.py": (profile.SKIP_IDLE_DRAFT,),
    "models/llama_eagle3.py": ('"midlayer": "layers.0"', "self.hot_token_id"),
    "speculative/adaptive_spec_params.py": ("def candidate_steps", "def get_steps_for_batch", "def on_verify_complete"),
}


@cache
def package() -> Path:
    (found,) = engine_environment("sglang").python.parents[1].glob("lib/python*/site-packages/sglang")
    return found


def test_the_release_is_the_pinned_one() -> None:
    assert [path.name for path in package().parent.glob("sglang-*.dist-info")] == ["sglang-0.5.23.dist-info"]


def test_every_target_is_held_here() -> None:
    assert set(ARGUMENTS) == set(plugin.TARGETS)


@pytest.mark.parametrize("target", plugin.TARGETS)
def test_a_hook_target_is_where_it_was(target: str) -> None:
    parts = target.split(".")[1:]
    at = next(i for i in range(len(parts), 0, -1) if package().joinpath(*parts[:i]).with_suffix(".py").is_file())
    scope: list[ast.stmt] = ast.parse(package().joinpath(*parts[:at]).with_suffix(".py").read_text()).body
    found: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | None = None
    for name in parts[at:]:
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = next((node for node in scope if isinstance(node, kinds) and node.name == name), None)
        assert found is not None, f"{target}: {name} is not there any more"
        scope = found.body
    if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        given = [argument.arg for argument in found.args.args]
        expected = ARGUMENTS[target]
        assert given[: len(expected)] == expected


@pytest.mark.parametrize("file", MENTIONS)
def test_what_the_plugin_reads_is_still_named_so(file: str) -> None:
    source = (package() / "srt" / file).read_text()
    assert [text for text in MENTIONS[file] if text not in source] == []


PARSE = """
import argparse, json, sys
sys.path.insert(0, sys.argv.pop(1))
import serve
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(json.dumps(vars(parser.parse_args()), default=str))
"""


def test_engine_args_print_what_sglang_itself_parses(tmp_path: Path) -> None:
    target = make_target(tmp_path / "a target")
    config = tmp_path / "config.toml"
    config.write_text(
        f'[daemon]\nstate_dir = "{tmp_path / "s"}"\n[target]\npath = "{target}"\n[training]\ndraft_vocab = 64\n'
        '[engine]\nid = "s"\nport = 8123\nmax_batch = 2\ngamma_max = 4\n'
    )
    shown = tidectl("--config", str(config), "engine-args", "sglang", "--json")
    assert (shown.code, shown.err) == (0, "")
    command = json.loads(shown.out)
    assert command["environment"]["TIDED_ENGINE"] == "s"
    assert command["arguments"][1:3] == ["-m", "sglang.launch_server"]
    built = engine_environment("sglang")
    parsed = subprocess.run(
        [built.python, "-c", PARSE, CHECKOUT / "tests" / "standin", *command["arguments"][3:]],
        env=built.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert parsed.returncode == 0, parsed.stderr
    found = json.loads(parsed.stdout.strip().splitlines()[-1])
    assert (found["model_path"], found["port"], found["max_running_requests"]) == (str(target), 8123, 2)
    assert (found["speculative_num_steps"], found["speculative_num_draft_tokens"]) == (4, 5)
    assert found["speculative_adaptive"] is True
    steps = json.loads(Path(found["speculative_adaptive_config"]).read_text())
    assert steps == {"1": {"candidate_steps": [0, 1, 2, 3, 4]}}
