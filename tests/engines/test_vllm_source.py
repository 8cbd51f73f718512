"""The places of vLLM's installed source that the plugin hooks into, V1 and V2: a target that moved fails here, loudly."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.engines.environment import engine_environment

CORE = "v1/engine/core.py"
RUNNER_V1, RUNNER_V2 = "v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"
PROPOSER = "v1/spec_decode/llm_base_proposer.py"
SPECULATORS = ("v1/worker/gpu/spec_decode/speculator.py", "v1/worker/gpu/spec_decode/target_dependent_ar/speculator.py")
SCHEDULER = "v1/core/sched/scheduler.py"
# Function -> parameters that the plugin names or passes.
FUNCTIONS = {
    (CORE, "EngineCoreProc.run_busy_loop"): set[str](),
    (CORE, "DPEngineCoreProc.run_busy_loop"): set[str](),
    (CORE, "EngineCoreProc._handle_client_request"): {"request_type", "request"},
    (CORE, "EngineCore.collective_rpc"): {"method", "args"},
    (CORE, "EngineCore.preprocess_add_request"): {"request"},
    (CORE, "EngineCore.post_step"): {"model_executed"},
    (SCHEDULER, "Scheduler.schedule"): set[str](),
    (SCHEDULER, "Scheduler.update_from_output"): {"scheduler_output", "model_runner_output"},
    (SCHEDULER, "Scheduler._free_request"): {"request"},
    (SCHEDULER, "Scheduler.finish_requests"): {"request_ids"},
    (RUNNER_V1, "GPUModelRunner.execute_model"): {"scheduler_output"},
    (RUNNER_V1, "GPUModelRunner.propose_draft_token_ids"): {"hidden_states"},
    (RUNNER_V1, "GPUModelRunner._sample"): {"logits", "spec_decode_metadata"},
    (RUNNER_V1, "GPUModelRunner.get_draft_model"): set[str](),
    (RUNNER_V2, "GPUModelRunner.execute_model"): {"scheduler_output"},
    (RUNNER_V2, "GPUModelRunner.get_draft_model"): set[str](),
    (PROPOSER, "SpecDecodeBaseProposer.load_model"): {"target_model"},
    (PROPOSER, "SpecDecodeBaseProposer.propose"): {
        "num_speculative_tokens",
        "target_token_ids",
        "target_positions",
        "target_hidden_states",
        "next_token_ids",
        "common_attn_metadata",
        "num_rejected_tokens_gpu",
    },
    ("model_executor/layers/utils.py", "dispatch_cpu_unquantized_gemm"): {"layer"},
    ("utils/cpu_triton_utils.py", "_expand_kernel_impl"): {
        "output",
        "input_val",
        "cu_num_tokens",
        "replace_from",
        "replace_to",
        "MAX_NUM_TOKENS",
    },
    ("v1/engine/utils.py", "get_engine_process_shutdown_timeout"): {"request_timeout", "process_timeout"},
}
V2_PROPOSE = {
    "input_batch",
    "last_hidden_states",
    "aux_hidden_states",
    "num_rejected",
    "last_sampled",
    "dummy_run",
    "num_speculative_tokens",
}
# Class -> fields that the plugin reads.
FIELDS = {
    ("v1/core/sched/output.py", "NewRequestData"): {"req_id", "prompt_token_ids", "sampling_params"},
    ("v1/core/sched/output.py", "SchedulerOutput"): {
        "scheduled_new_reqs",
        "num_scheduled_tokens",
        "scheduled_spec_decode_tokens",
        "finished_req_ids",
        "num_invalid_spec_tokens",
        "num_spec_tokens_to_schedule",
    },
    ("v1/worker/gpu/input_batch.py", "InputBatch"): {
        "req_ids",
        "num_reqs",
        "idx_mapping",
        "query_start_loc_np",
        "input_ids",
        "positions",
    },
    ("v1/engine/__init__.py", "EngineCoreRequestType"): {"WAKEUP"},
}
# Text that must be there: calls through the instance, which is what makes them hookable.
CALLS = {
    RUNNER_V1: (
        "self.drafter.propose(",
        "self.propose_draft_token_ids(",
        "self._sample(logits, spec_decode_metadata)",
        "if spec_decode_metadata is None:\n            return self.sampler(",
    ),
    RUNNER_V2: ("self.speculator.propose(",),
    "v1/spec_decode/metadata.py": ("self.max_spec_len = max(self.num_draft_tokens)",),
    SCHEDULER: ("self.dynamic_sd_lookup[", "self._free_request(", "request.spec_token_ids = []"),
    CORE: (
        "self._handle_client_request(*req)",
        "self.input_queue",
        "self.step_fn",
        "self.post_step(",
        "self.batch_queue",
    ),
    "_custom_ops.py": ("handler.handler_tensor = torch.tensor(", "self.dtor(self.handler_tensor.item())"),
    "platforms/cpu.py": ("cpu_tl._expand_kernel_impl",),
    "v1/engine/utils.py": ("= get_engine_process_shutdown_timeout(",),
    "model_executor/layers/linear.py": ("from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm",),
    "model_executor/layers/vocab_parallel_embedding.py": (
        "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm",
    ),
    "model_executor/models/llama_eagle3.py": ("self.draft_id_to_target_id", '"midlayer.": "layers.0."'),
}


@pytest.fixture(scope="module")
def source() -> Path:
    (found,) = engine_environment("vllm").python.parent.parent.glob("lib/python3*/site-packages/vllm")
    return found


def definition(path: Path, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The function or class `A.b` of a file."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    found: ast.FunctionDef | ast.ClassDef | None = None
    for part in name.split("."):
        named = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        assert named, f"{path.name} has no {name}"
        found, body = named[-1], named[-1].body
    assert found is not None
    return found


def parameters(node: ast.AST) -> set[str]:
    assert isinstance(node, ast.FunctionDef)
    return {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


@pytest.mark.parametrize(("where", "expected"), FUNCTIONS.items())
def test_hooked_functions(source: Path, where: tuple[str, str], expected: set[str]) -> None:
    assert expected <= parameters(definition(source / where[0], where[1]))


@pytest.mark.parametrize("path", SPECULATORS)
def test_every_v2_speculator_is_called_alike(source: Path, path: str) -> None:
    tree = ast.parse((source / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "propose"]
    assert functions
    for function in functions:
        assert parameters(function) >= V2_PROPOSE


@pytest.mark.parametrize(("where", "expected"), FIELDS.items())
def test_fields(source: Path, where: tuple[str, str], expected: set[str]) -> None:
    node = definition(source / where[0], where[1])
    fields = {
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    fields |= {
        target.id
        for item in node.body
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    }
    assert expected <= fields


@pytest.mark.parametrize(("path", "texts"), CALLS.items())
def test_calls(source: Path, path: str, texts: tuple[str, ...]) -> None:
    text = (source / path).read_text()
    assert [wanted for wanted in texts if wanted not in text] == []


def test_the_plugin_is_inert_without_an_engine_name() -> None:
    """In vLLM's own environment: found by entry point, and vLLM is as it was until TIDED_ENGINE is set; twice is as once."""
    built = engine_environment("vllm")
    code = """
import os
from importlib.metadata import entry_points
(entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "tided"]
register = entry.load()
from vllm.model_executor.layers import utils as layers
from vllm.v1.engine import core, utils
from vllm.utils import cpu_triton_utils as kernels
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer as P
def state():
    return (kernels._expand_kernel_impl, core.EngineCoreProc.run_busy_loop, core.DPEngineCoreProc.run_busy_loop, P.load_model,
            layers.dispatch_cpu_unquantized_gemm, utils.get_engine_process_shutdown_timeout)
before = state()
register()
assert state() == before
os.environ["TIDED_ENGINE"] = "e"
register()
after = state()
assert all(a is not b for a, b in zip(after, before))
register()
assert state() == after
"""
    done = subprocess.run(
        [str(built.python), "-c", code], env=built.environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_processors_sampling_is_mended() -> None:
    """What vLLM's sampler gets of temperatures and of top-k, once vLLM has registered its stand-ins as its worker does."""
    built = engine_environment("vllm")
    code = """
import torch
from importlib.metadata import entry_points
(entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "tided"]
entry.load()()
from vllm.platforms import current_platform
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens
current_platform.register_triton_kernel_overrides()
ends = torch.tensor([2, 2, 3], dtype=torch.int32)
spread = expand_batch_to_tokens(torch.tensor([0.7, 0.0, 0.0]), ends, 3, replace_from=0, replace_to=1)
assert torch.equal(spread, torch.tensor([0.7, 0.7, 1.0])), spread
spread = expand_batch_to_tokens(torch.tensor([50, 7, 9], dtype=torch.int32), ends, 3)
assert torch.equal(spread, torch.tensor([50, 50, 9], dtype=torch.int32)), spread
"""
    environment = {**built.environment, "TIDED_ENGINE": "e"}
    done = subprocess.run(
        [str(built.python), "-c", code], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
