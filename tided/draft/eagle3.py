"""The EAGLE-3 draft as a torch module: arithmetic only, no cache and no loop, so that engine and trainer share it.

Row i of a first pass has the embedding of token i+1, the feature h_i = fc(aux_i) and RoPE position i; it predicts token i+2.
Later passes feed the previous pass's *pre-norm* output as the feature (no fc), the drafted token's embedding, position + 1.

    x = cat[input_layernorm(emb), hidden_norm(h)]          2H wide, into q, k and v
    r = h + o_proj(attention(q, k, v))                     the residual is the un-normed feature
    pre = r + mlp(post_attention_layernorm(r))
    logits = lm_head(norm(pre))                            over the draft vocabulary

The embedding is the target's and stays outside.
"""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tided.draft import checkpoint
from tided.draft.checkpoint import Checkpoint, DraftConfig
from tided.draft.target import TargetShape
from tided.draft.tensors import Array
from tided.model.errors import Refused


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 as the target does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """The projections; scores are the caller's."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden, query, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden, key, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden, bias=False)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer whose attention reads 2H-wide inputs."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.rms_eps)
        self.hidden_norm = RMSNorm(config.hidden, config.rms_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.rms_eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)


class Eagle3(nn.Module):
    """An EAGLE-3 draft with the checkpoint's parameter names.

    `version` and `vocab_id` name the checkpoint that the weights came from ("" before the first).
    Leading dimensions `...` are free: the engine passes [batch, tokens], the trainer packed rows.
    """

    d2t: Tensor  # [draft_vocab] int64 offsets: target id = draft id + d2t[draft id]
    t2d: Tensor  # [vocab] bool: whether the draft vocabulary has the token
    inverse_frequencies: Tensor  # [head_dim / 2] float32

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.version = ""
        self.vocab_id = ""
        self.fc = nn.Linear(3 * config.hidden, config.hidden, bias=False)
        self.midlayer = Layer(config)
        self.norm = RMSNorm(config.hidden, config.rms_eps)
        self.lm_head = nn.Linear(config.hidden, config.draft_vocab, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab, dtype=torch.bool))
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("inverse_frequencies", config.rope_theta**-exponents, persistent=False)

    @classmethod
    def load(
        cls,
        directory: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        target: TargetShape | None = None,
    ) -> "Eagle3":
        """A draft from a checked checkpoint directory. Raises `Refused` when it is not sound or not for `target`."""
        return cls.of(checkpoint.load(directory, target), dtype, device)

    @classmethod
    def of(cls, source: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "Eagle3":
        """A draft with the weights of a checked checkpoint."""
        with torch.device("meta"):
            draft = cls(source.config)
        draft = draft.to_empty(device=device)
        exponents = torch.arange(0, source.config.head_dim, 2, dtype=torch.float32) / source.config.head_dim
        draft.inverse_frequencies.copy_(source.config.rope_theta**-exponents)
        for parameter in draft.parameters():
            parameter.data = parameter.data.to(dtype)
        draft.assign(source)
        return draft

    @torch.no_grad()
    def assign(self, source: Checkpoint) -> None:
        """Copy another checkpoint's weights and vocabulary map into this module's storage: the hot swap.

        Raises `Refused`, with nothing changed, when its configuration differs.
        """
        if source.config != self.config:
            raise Refused(
                "the draft's configuration differs from the one being served; restart the engine on it instead"
            )
        for name, tensor in self.state_dict(keep_vars=True).items():
            tensor.copy_(tensor_of(source.tensors[name]))
        self.version, self.vocab_id = source.version, source.vocab_id

    def state_tensors(self) -> dict[str, Array]:
        """Every tensor of the checkpoint, as `checkpoint.write` takes them (weights rounded to BF16)."""
        return {name: array_of(tensor) for name, tensor in self.state_dict().items()}

    def fuse(self, aux: Tensor) -> Tensor:
        """Aux states [..., N, 3H] (low, middle, high) -> features [..., N, H] for the first pass."""
        return self.fc(aux)

    def project(self, emb: Tensor, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings and features [..., N, H], positions [..., N] -> q [..., N, heads, D], k and v [..., N, kv_heads, D].

        RoPE (half rotation, as Hugging Face's Llama) is applied to q and k.
        """
        x = self.mixed(emb, h)
        k, v = self.keys_values(x, positions)
        return self.queries(x, positions), k, v

    def mixed(self, emb: Tensor, h: Tensor) -> Tensor:
        """The attention's input [..., N, 2H]."""
        return torch.cat((self.midlayer.input_layernorm(emb), self.midlayer.hidden_norm(h)), dim=-1)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """q [..., N, heads, D] of inputs x [..., N, 2H]."""
        q = self.midlayer.self_attn.q_proj(x).unflatten(-1, (self.config.heads, self.config.head_dim))
        return self._rotate(q, positions)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [..., N, kv_heads, D] of inputs x [..., N, 2H]."""
        shape = (self.config.kv_heads, self.config.head_dim)
        k = self.midlayer.self_attn.k_proj(x).unflatten(-1, shape)
        v = self.midlayer.self_attn.v_proj(x).unflatten(-1, shape)
        return self._rotate(k, positions), v

    def finish(self, h: Tensor, attn_out: Tensor) -> Tensor:
        """Features [..., N, H] and attention output [..., N, heads * D] -> `pre` [..., N, H], the next pass's feature."""
        residual = h + self.midlayer.self_attn.o_proj(attn_out)
        return residual + self.midlayer.mlp(self.midlayer.post_attention_layernorm(residual))

    def logits(self, pre: Tensor) -> Tensor:
        """`pre` [..., N, H] -> logits [..., N, draft_vocab]."""
        return self.lm_head(self.norm(pre))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1).float() * self.inverse_frequencies
        cos, sin = angles.cos().unsqueeze(-2).to(x.dtype), angles.sin().unsqueeze(-2).to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def tensor_of(array: Array) -> Tensor:
    """A torch tensor over a copy of `array`; uint16 is BF16 bits."""
    copy = np.array(array)
    if copy.dtype == np.uint16:
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def array_of(tensor: Tensor) -> Array:
    """The inverse of `tensor_of`; floating point is rounded to BF16."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        return cast("Array", tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16))
    return tensor.numpy()
