"""vLLM 0.32 on a processor loses the temperature of sampled requests that it drafts for: mended here.

`expand_kernel` spreads a request's temperature, top-k and top-p over its drafted tokens. Its stand-in for processors converts what it
is given to int64, fills the copy and drops it (vLLM issue 55005): logits are divided by memory that nobody wrote. Nearly every drafted
token is rejected, and what is sampled in its place is not of the target's distribution: while tokens are drafted, sampled answers
are wrong.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MARK = "_tided"


def expand(
    output: "torch.Tensor",
    input_val: "torch.Tensor",
    cu_num_tokens: "torch.Tensor",
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # vLLM passes it by this name
) -> None:
    """output [tokens]: entry i of `input_val` [requests] cu_num_tokens[i] - cu_num_tokens[i - 1] times, `replace_from` replaced."""
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    values = input_val.masked_fill(input_val == replace_from, replace_to)
    output[: int(counts.sum())] = torch.repeat_interleave(values, counts).to(output.dtype)


def mend(kernels: Any) -> None:
    """Put `expand` in the place of the stand-in in vLLM's module `kernels`, before vLLM registers it. Idempotent."""
    if not hasattr(kernels._expand_kernel_impl, _MARK):
        kernels._expand_kernel_impl = expand


setattr(expand, _MARK, True)
