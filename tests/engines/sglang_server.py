"""A real SGLang server with tided in it, as a subject of the backend contract: real scheduler, worker and HTTP; stand-in CPU kernels."""

from collections.abc import Sequence
from dataclasses import replace

from tests.engines.environment import CHECKOUT
from tests.engines.server import EngineServer
from tided.ctl.engine_args import EngineCommand


class SglangServer(EngineServer):
    kind = "sglang"
    profiled = False
    """Whether latency is measured at start: without that, nothing is drafted by choice; with it, a start takes longer."""

    def command(self) -> EngineCommand:
        printed = super().command()
        python, _, _, *options = printed.arguments
        standin = {
            "--attention-backend": "intel_amx",
            "--cuda-graph-backend-decode": "disabled",
            "--max-total-tokens": "4096",
            "--chunked-prefill-size": str(self.prefill_chunk),
        }
        words = (word for option in standin.items() for word in option)
        switches = ("--skip-server-warmup", "--sleep-on-idle")
        serve = str(CHECKOUT / "tests" / "standin" / "serve.py")
        environment = printed.environment | {"TIDED_PROFILE": str(int(self.profiled))}
        return replace(printed, environment=environment, arguments=(python, serve, *options, *words, *switches))

    async def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        private: bool = False,
        ignore_eos: bool = True,
        temperature: float = 0.0,
    ) -> list[int]:
        parameters = {"temperature": temperature, "max_new_tokens": max_tokens, "ignore_eos": ignore_eos}
        body = {"input_ids": list(prompt), "sampling_params": parameters}
        answer = await self.post("/generate", body, private=private)
        return [int(token) for token in answer["output_ids"]]
