"""A vLLM worker extension for `bench.engines.swaps`: the target's weights as one digest. Runs inside vLLM's worker."""

import hashlib
from typing import Any


class TargetChecksum:
    """Methods that vLLM adds to its worker (--worker-extension-cls)."""

    model_runner: Any

    def target_checksum(self) -> str:
        """SHA-256 over every parameter and buffer of the target, in order of their names.

        On a processor vLLM has packed the linears and dropped their plain weights: embeddings, norms and head are what is left.
        """
        import torch

        found = hashlib.sha256()
        model = self.model_runner.get_model()
        for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
            found.update(name.encode())
            found.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        return found.hexdigest()
