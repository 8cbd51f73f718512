"""A stand-in trainer for tests of the worker: does what the job's options say, in the real one's terms, in milliseconds."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


def say(plain: object) -> None:
    print(json.dumps(plain), flush=True)  # noqa: T201


def exit_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(4)


def main() -> None:
    kind, spec_file, _, out = sys.argv[1:5]
    assert sys.argv[5:] == ["--with-parent"]
    threading.Thread(target=exit_with_stdin, daemon=True).start()
    options = json.loads(Path(spec_file).read_text())["options"]
    Path(out, "pid").write_text(str(os.getpid()))
    say({"fraction": 0.25, "note": f"{kind} began"})
    act = options.get("act", "finish")
    if act == "environment":
        say({"result": {"staged": json.dumps(dict(os.environ)), "metrics": {"nice": os.nice(0)}}})
    elif act == "finish":
        print("a library prints this", flush=True)  # noqa: T201
        say({"result": {"staged": out, "seconds": 1.5}})
    elif act == "train":  # gives a draft that the test has made, once it has read all that it needs
        spec = json.loads(Path(spec_file).read_text())
        needed = (f"{spec[name]}/config.json" for name in ("target_dir", "draft_dir"))
        assert all(Path(path).read_bytes() for path in (*needed, *spec["shards"], *spec["held_out"]))
        for file in ("config.json", "model.safetensors"):
            Path(out, file).write_bytes(Path(options["gives"], file).read_bytes())
        while options.get("gate") and not Path(options["gate"]).exists():
            time.sleep(0.02)
        say({"result": {"staged": out, "version": options["version"]}})
    elif act == "error":
        say({"error": "shard 7 is not readable", "retryable": options["retryable"]})
        sys.exit(3)
    elif act == "die":
        print("last words", file=sys.stderr, flush=True)  # noqa: T201
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "exit":
        sys.exit(7)
    elif act == "huge":
        say({"result": {"metrics": {str(n): 1.0 for n in range(200_000)}}})
    elif act == "nonsense":
        say({"result": {"unknown": 1}})
    elif act == "hang":  # deaf to SIGTERM, with a child of its own
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "600"])
        Path(out, "child").write_text(str(child.pid))
        say({"fraction": 0.5, "note": "hanging"})
        time.sleep(600)
    elif act == "resume":  # goes on from a checkpoint; without one, leaves one and ends, or hangs
        checkpoint = Path(out, "checkpoint.safetensors")
        if checkpoint.exists():
            say({"result": {"staged": out, "metrics": {"steps": float(checkpoint.read_text())}}})
            return
        checkpoint.write_text("17")
        say({"fraction": 0.5, "note": "checkpoint written"})
        if options["then"] == "fail":
            say({"error": "no memory", "retryable": True})
            sys.exit(3)
        time.sleep(600)
    elif act == "wait":  # until the test makes the file
        gate = Path(options["gate"])
        while not gate.exists():
            say({"fraction": 0.5, "note": "waiting"})
            time.sleep(0.05)
        say({"result": {"staged": out}})


if __name__ == "__main__":
    main()
