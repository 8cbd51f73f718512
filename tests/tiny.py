"""A tiny random Llama with an untrained draft: real files, real arithmetic, no meaning."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tided.draft.init import init_draft

VOCAB = 96
EOS = 2


def make_target(
    path: Path,
    *,
    layers: int = 8,
    seed: int = 0,
    vocab: int = VOCAB,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 8,
) -> Path:
    """A checkpoint directory with weights (fp32) and a tokenizer whose tokens are single characters.

    Engines with kernels of their own need larger heads than the default.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=heads * head_dim,
        intermediate_size=2 * heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    _tokenizer(vocab).save_pretrained(path)
    return path


def make_draft(target: Path, path: Path, *, draft_vocab: int = VOCAB // 2) -> Path:
    """Version 0 for `target`."""
    init_draft(target, path, draft_vocab)
    return path


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    characters = ["<unk>", "<s>", "</s>", *(chr(32 + i) for i in range(vocab - 3))]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(characters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}~{% endfor %}"
    return tokenizer
