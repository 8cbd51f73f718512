"""Runs the trainer of `speculators` 0.9 on one core: `bench.peers` starts this file in the environment of `engines/build.py speculators`.

    peers_run.py samples SHARD TARGET_DIR OUT       shards of tided's as the data folder that `speculators` reads
    peers_run.py train REPORT ARGUMENTS...          `speculators train ARGUMENTS...`; REPORT gets tokens and seconds after each epoch

What is changed of it is what keeps it from a machine without an accelerator: the device that a model is moved to, the device of autocast,
and waiting for an accelerator. Its epochs, steps, schedule and checkpoints are its own. Its validation is left out, and writing checkpoints
is not timed. Nothing of tided is imported.

A trained token is a position whose prediction is in the loss of the first pass of the unroll, counted each time it is trained. Seconds are
CPU seconds of this process, which has one thread: what a clock shows on a core of its own, whatever else the machine does.
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

AUX_STATES = 3


def samples(shard: Path, target_dir: Path, out: Path) -> None:
    """One row for each run: its ids, states, and which tokens' predictions count. All runs must have the last state.

    The last state is wanted before the target's final norm, and a shard has it behind: divided by the norm's weight it gives the same again
    when it is normed. A copy of the first row stands at the end, because a split for validation must not be empty.
    """
    torch: Any = import_module("torch")
    files: Any = import_module("safetensors.torch")
    tensors = files.load_file(shard)
    norm = (
        import_module("safetensors").safe_open(target_dir / "model.safetensors", "pt").get_tensor("model.norm.weight")
    )
    ends = zip(
        tensors["run_rows"].tolist(), tensors["run_ids"].tolist(), tensors["prompt_tokens"].tolist(), strict=True
    )
    rows: list[tuple[Any, Any, int]] = []
    row = token = 0
    for count, ids, prompt in ends:
        rows.append((tensors["ids"][token : token + count].long(), tensors["states"][row : row + count], prompt))
        row, token = row + count, token + ids
    (out / "hidden_states").mkdir(parents=True)
    columns: dict[str, list[Any]] = {"input_ids": [], "loss_mask": [], "seq_len": []}
    for number, (ids, states, prompt) in enumerate([*rows, rows[0]]):
        last = (states[:, AUX_STATES].float() / norm.float()).to(states.dtype)
        states = torch.cat([states[:, :AUX_STATES], last.unsqueeze(1)], 1).contiguous()
        files.save_file({"hidden_states": states, "token_ids": ids}, out / "hidden_states" / f"hs_{number}.safetensors")
        # The token at a place that counts is read, and the one behind it predicted: the first of an answer by the prompt's last.
        columns["loss_mask"].append([int(place >= prompt - 1) for place in range(len(ids))])
        columns["input_ids"].append(ids.tolist())
        columns["seq_len"].append(len(ids))
    import_module("datasets").Dataset.from_dict(columns).with_format("torch").save_to_disk(str(out))


def train(report: Path, arguments: list[str]) -> None:
    """Train, and write a list of {epoch, tokens, steps, seconds}, all counted from the start."""
    torch: Any = import_module("torch")
    torch.accelerator.synchronize = lambda: None
    trainer: Any = import_module("speculators.train.trainer")
    trainer.get_local_rank = lambda: "cpu"
    trainer.Trainer.run_training = lambda self: _epochs(self, report)
    torch.set_num_threads(1)
    import_module("speculators.train.cli").main(
        import_module("speculators.train.config").TrainConfig.resolve(arguments)
    )


def _epochs(trainer: Any, report: Path) -> None:
    trainer.device_type = "cpu"
    done: list[dict[str, float]] = []
    tokens = 0

    def count(_: Any, __: Any, given: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += int(given["loss_mask"].sum())

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    seconds = 0.0
    for epoch in range(trainer.config.num_epochs):
        began = time.process_time()
        trainer.train_epoch(epoch)
        seconds += time.process_time() - began
        trainer.maybe_save_checkpoint(epoch)
        done.append({"epoch": epoch, "tokens": tokens, "steps": trainer.global_step, "seconds": seconds})
    report.write_text(json.dumps(done))


if __name__ == "__main__":
    mode, first, *rest = sys.argv[1:]
    if mode == "samples":
        samples(Path(first), Path(rest[0]), Path(rest[1]))
    else:
        train(Path(first), rest)
