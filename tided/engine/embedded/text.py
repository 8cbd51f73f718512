"""Tokens and text: the checkpoint's tokenizer, and text that grows token by token up to a stop string."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tided.model.errors import Refused

_UNFINISHED = "\ufffd"  # what half a character decodes to


class Tokens:
    """The tokenizer and chat template of a checkpoint directory."""

    def __init__(self, path: Path) -> None:
        """Raises `Refused` when the directory holds no usable tokenizer."""
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as exc:
            reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
            raise Refused(f"target {path}: its tokenizer cannot be loaded: {reason}") from exc

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the answer. Raises `Refused` when the template does not take it."""
        if self._tokenizer.chat_template is None:
            raise Refused("this model has no chat template; use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as exc:
            raise Refused(f"the model's chat template refuses these messages ({type(exc).__name__})") from exc
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class StopText:
    """Decodes a growing list of tokens a piece at a time, and holds back what may be the beginning of a stop string."""

    def __init__(self, tokens: Tokens, stops: list[str]) -> None:
        self.stopped = False
        self._tokens, self._stops = tokens, stops
        self._ids: list[int] = []
        self._start = self._read = 0  # decoded together, so that spaces and split characters come out right
        self._held = ""

    def push(self, ids: list[int]) -> str:
        """The text that is certain after `ids`, as far as it was not given before."""
        self._ids += ids
        text = self._tokens.decode(self._ids[self._start :])
        if text.endswith(_UNFINISHED):
            return ""
        return self._take(text)

    def rest(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        text = self._take(self._tokens.decode(self._ids[self._start :]))
        return text if self.stopped else text + self._held

    def _take(self, text: str) -> str:
        known = self._tokens.decode(self._ids[self._start : self._read])
        self._start, self._read = self._read, len(self._ids)
        self._held += text[len(known) :]
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
