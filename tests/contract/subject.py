"""What a backend must offer to be put through the contract (tests/contract/suite.py).

An engine's test module gives a module-scoped fixture `subject` that starts one and stops it at the end, on the server of the fixture
`contract_redis`, and derives its class from the suite's:

    pytest_plugins = ("tests.contract.fixtures",)

    @pytest.fixture(scope="module")
    def subject(contract_redis: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]: ...

    class TestVllm(BackendContract): ...
    class TestVllmRestart(RestartContract): ...
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tided.model.engines import Capability


class Subject(Protocol):
    """A serving engine as its clients meet it, with a draft, connected to Redis. Attributes are fixed before `start`."""

    @property
    def kind(self) -> str:
        """As in its heartbeat."""
        ...

    @property
    def engine(self) -> str:
        """Its name in Redis."""
        ...

    @property
    def target_dir(self) -> Path:
        """Checkpoint of its target (tests/tiny.py or larger), with a tokenizer whose vocabulary is its own."""
        ...

    @property
    def draft_dir(self) -> Path:
        """Checkpoint that it serves first."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it must declare, no more and no less."""
        ...

    @property
    def tolerance(self) -> float:
        """Relative L2 error by which a tapped row may differ from an fp32 reference: 1e-4 in float32, 2e-2 in bfloat16."""
        ...

    @property
    def temperatures(self) -> tuple[float, ...]:
        """At which it can sample; 0.0 is greedy."""
        ...

    @property
    def prefix_cache(self) -> bool:
        """Whether the head of a prompt may lack rows, because it was computed for an earlier request."""
        ...

    @property
    def context(self) -> int:
        """Prompt and output tokens that one request may have; at least 128."""
        ...

    def start(self) -> None:
        """Start (again) and return once requests are served."""
        ...

    def kill(self) -> None:
        """End it at once, without a chance to say goodbye (SIGKILL)."""
        ...

    def stop(self) -> None:
        """End it in order. Raises if it does not end well."""
        ...

    async def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        private: bool = False,
        ignore_eos: bool = True,
        temperature: float = 0.0,
    ) -> list[int]:
        """The output's token ids. `private`: the request opts out of capture. A caller that cancels this hangs up: the engine aborts.

        Called from several tests' event loops, one after the other, and concurrently within one. Raises what it likes when the request
        fails.
        """
        ...
