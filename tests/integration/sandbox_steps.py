"""Step functions that behave and misbehave; run in children by `test_sandbox`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.errors import CheckpointInvalid, ConversionFailed
from workers.steps import Progress

Params = Mapping[str, Any]
Inputs = Mapping[str, Path]


def succeed(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    progress("adding", 0.5)
    text = "".join((folder / "text").read_text() for folder in inputs.values())
    (output_dir / "sum").write_text(str(sum(params["numbers"])))
    progress("done", 1.0)
    return {"sum": sum(params["numbers"]), "text": text, "pid": os.getpid()}


def tell_niceness(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    group = Path("/proc/self/autogroup")
    return {"own": os.nice(0), "group": int(group.read_text().split()[-1]) if group.exists() else None}


def chatter(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    for index in range(2000):
        progress(f"message {index}")
    return {}


def refuse(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    raise CheckpointInvalid("The file 'x' is damaged.", file="x")


def break_down(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    raise KeyError("no such thing")


def return_nonsense(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    return {"ratio": float("nan")}


def fill_disk(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    try:
        Path("/dev/full").write_text("x")  # the kernel's own full disk
    except OSError as error:
        raise ConversionFailed("The converter gave up.") from error
    return {}


def run_out_of_memory(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    raise MemoryError


def crash(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    print("last words", flush=True)
    os.kill(os.getpid(), params["signal"])
    return {}


def crash_natively(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    ctypes.string_at(0)
    return {}


def leave(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    os._exit(7)


def eat_memory(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Grow by 16 MiB a round, in a grandchild if asked."""
    if params.get("in_grandchild"):
        code = "b=[]\nwhile True: b.append(b'x' * (16 << 20)); import time; time.sleep(0.02)"
        subprocess.run([sys.executable, "-c", code], check=False)
    held = []
    for _ in range(params.get("rounds", 10_000)):
        held.append(b"x" * (16 << 20))
        time.sleep(0.01)
    time.sleep(1.0)  # several sampling intervals
    return {}


def share_memory(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Hold `mib` MiB, share them with two forked processes, and let each of those make `own_mib` of its own."""
    held = bytearray(b"x" * (params["mib"] << 20))
    pids = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            own = bytearray(b"x" * (params["own_mib"] << 20))
            time.sleep(params["seconds"])
            os._exit(len(own) + len(held) == 0)
        pids.append(pid)
    return {"statuses": [os.waitpid(pid, 0)[1] for pid in pids]}


def hang(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Start a grandchild, one that hides in a session of its own, and wait for ever."""
    sleeper = "import time; time.sleep(3600)"
    plain = subprocess.Popen([sys.executable, "-c", sleeper])
    hidden = (
        "import subprocess, sys; "
        f"sleeper = subprocess.Popen([sys.executable, '-c', {sleeper!r}], stdout=2, start_new_session=True); "
        "print(sleeper.pid)"
    )
    orphan = int(subprocess.run([sys.executable, "-c", hidden], stdout=subprocess.PIPE, check=True).stdout)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    progress(f"{os.getpid()} {plain.pid} {orphan}")
    while True:
        signal.pause()


def leave_process_behind(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    return {"pid": process.pid}


def connect(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    try:
        with socket.create_connection((params["host"], params["port"]), timeout=5):
            return {"connected": True}
    except OSError as error:
        return {"connected": False, "error": str(error)}


def look_around(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Report what the step can see of its surroundings."""
    progress("looking around")
    seen: dict[str, Any] = {
        "environment": dict(os.environ),
        "initial_environment": Path("/proc/self/environ").read_text(),
        "arguments": Path("/proc/self/cmdline").read_text(),
        "cwd": str(Path.cwd()),
        "credential": params.get("credential"),
        "fds": _list_fds(),
        "core_limit": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "umask": os.umask(0o077),
        "no_new_privileges": "NoNewPrivs:\t1" in Path("/proc/self/status").read_text(),
    }
    attempts = {
        "worker_environment": lambda: Path(f"/proc/{params['worker_pid']}/environ").read_bytes(),
        "outside_read": lambda: Path(params["outside"]).read_bytes(),
        "outside_write": lambda: Path(params["outside"]).write_text("changed"),
        "input_write": lambda: (next(iter(inputs.values())) / "new").write_text("x"),
        "worker_signal": lambda: os.kill(params["worker_pid"], 0),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            seen[name] = "allowed"
        except OSError as error:
            seen[name] = type(error).__name__
    return seen


def print_much(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    print("first line")
    for _ in range(100):
        print("x" * 10_000)
    os.write(2, b"last line\n")
    return {}


def use_threads(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    threads = [threading.Thread(target=progress, args=(f"from thread {index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"text": "x" * 1_000_000}


def multiply(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Use the thread pools of the libraries that the zygote has loaded."""
    torch, numpy = sys.modules["torch"], sys.modules["numpy"]
    torch.set_num_threads(4)
    layer = torch.nn.Linear(512, 512)
    layer(torch.ones(512, 512)).sum().backward()
    product = numpy.ones((512, 512)) @ numpy.ones((512, 512))
    return {
        "gradient": float(layer.bias.grad[0]),
        "product": float(product[0, 0]),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def _list_fds() -> dict[str, str]:
    fds = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            fds[link.name] = str(link.readlink())
    return fds
