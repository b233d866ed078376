"""Runs end as they should, and nothing of a run survives it: real zygotes, supervisors and children."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from workers.sandbox import ChildResult, Limits, Sandbox, StopReason

LOG_LIMIT_BYTES = 100_000
STEPS = "tests.integration.sandbox_steps"
MIB = 1024 * 1024

Run = Callable[..., ChildResult]


@pytest.fixture(scope="module")
def canary() -> Iterator[str]:
    """A secret in the worker's environment, there before any zygote starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKILN_STORE_SECRET", "canary-5c1f")
        yield "canary-5c1f"


@pytest.fixture(scope="module")
def sandbox(canary: str) -> Iterator[Sandbox]:
    with Sandbox({"light": ["decimal"]}, log_limit_bytes=LOG_LIMIT_BYTES, target_prefixes=("tests.",)) as sandbox:
        yield sandbox


@pytest.fixture
def run(sandbox: Sandbox, tmp_path: Path) -> Run:
    """Run a step function in a child; keyword arguments override quiet defaults."""

    def run_step(name: str, params: Mapping[str, Any] | None = None, **changes: Any) -> ChildResult:
        options: dict[str, Any] = {
            "inputs": {},
            "step_dir": tmp_path / "step",
            "pool": "light",
            "network": False,
            "limits": Limits(deadline_s=60),
            "on_progress": lambda message, fraction: None,
            "should_stop": lambda: None,
            "poll_s": 0.05,
        }
        options.update(changes)
        return sandbox.run(f"{STEPS}:{name}", params or {}, **options)

    return run_step


def code_of(result: ChildResult) -> str:
    assert result.error is not None
    assert result.figures is None
    return str(result.error.to_json()["code"])


class Watched:
    """Processes held by descriptor, so that a reused pid cannot be mistaken for them."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def add(self, *pids: int) -> None:
        self.fds += [os.pidfd_open(pid) for pid in pids]

    def all_end(self, timeout_s: float) -> bool:
        """Wait until every process has ended."""
        try:
            return all(select.select([fd], [], [], timeout_s)[0] for fd in self.fds)
        finally:
            for fd in self.fds:
                os.close(fd)


# --- how runs end -------------------------------------------------------------------------------


def test_success_gives_figures_files_progress_and_memory(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "text").write_text("hello")
    seen: list[tuple[str, float | None]] = []
    result = run(
        "succeed",
        {"numbers": [1, 2]},
        inputs={"a": source},
        on_progress=lambda message, fraction: seen.append((message, fraction)),
    )
    assert result.error is None
    assert result.figures is not None
    assert (result.figures["sum"], result.figures["text"]) == (3, "hello")
    assert result.figures["pid"] != os.getpid()
    assert (result.output_dir / "sum").read_text() == "3"
    assert seen[-1] == ("done", 1.0)
    assert result.peak_anon_bytes is not None
    assert result.peak_rss_bytes is not None
    assert MIB < result.peak_anon_bytes < 500 * MIB
    assert MIB < result.peak_rss_bytes < 500 * MIB
    assert result.stopped is None


@pytest.mark.parametrize("niceness", [0, 7])
def test_a_run_lets_others_go_first_when_asked(run: Run, niceness: int) -> None:
    figures = run("tell_niceness", niceness=niceness).figures
    assert figures is not None
    assert figures["own"] == os.nice(0) + niceness
    assert figures["group"] in (niceness, None)


def test_linked_inputs_are_readable(run: Run, tmp_path: Path) -> None:
    blob = tmp_path / "store" / "blob"
    blob.parent.mkdir()
    blob.write_text("linked")
    source = tmp_path / "source"
    source.mkdir()
    (source / "text").symlink_to(blob)
    result = run("succeed", {"numbers": []}, inputs={"a": source})
    assert result.figures is not None
    assert result.figures["text"] == "linked"


def test_progress_is_thinned_but_its_last_word_arrives(run: Run) -> None:
    seen: list[str] = []
    result = run("chatter", on_progress=lambda message, fraction: seen.append(message))
    assert result.error is None
    assert seen[-1] == "message 1999"
    assert len(seen) < 200


def test_large_figures_and_progress_from_threads(run: Run) -> None:
    result = run("use_threads")
    assert result.figures == {"text": "x" * 1_000_000}


def test_typed_error_keeps_code_and_details(run: Run) -> None:
    result = run("refuse")
    assert result.error is not None
    assert result.error.to_json() == {
        "code": "checkpoint_invalid",
        "message": "The file 'x' is damaged.",
        "retryable": False,
        "details": {"file": "x"},
    }


def test_bug_is_told_with_its_traceback_in_the_log(run: Run) -> None:
    result = run("break_down")
    assert code_of(result) == "internal_error"
    assert "KeyError: 'no such thing'" in result.log_path.read_text()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("return_nonsense", "internal_error"),
        ("fill_disk", "disk_full"),
        ("run_out_of_memory", "memory_limit_exceeded"),
        ("no_such_function", "internal_error"),
        ("leave", "child_crashed"),
    ],
)
def test_other_ends_are_typed(run: Run, name: str, code: str) -> None:
    assert code_of(run(name)) == code


def test_target_outside_the_prefix_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no step function"):
        sandbox.run(
            "os:system",
            {},
            {},
            tmp_path,
            pool="light",
            network=False,
            limits=Limits(1),
            on_progress=lambda message, fraction: None,
            should_stop=lambda: None,
        )


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_crash_names_its_signal_and_shows_the_log(run: Run, number: signal.Signals) -> None:
    result = run("crash", {"signal": int(number)})
    assert code_of(result) == "child_crashed"
    assert result.error is not None
    assert result.error.details["signal"] == number.name
    assert "last words" in result.error.details["log_tail"]
    assert ("runs out of memory" in result.error.message) == (number == signal.SIGKILL)


def test_native_crash_leaves_the_python_stack(run: Run) -> None:
    result = run("crash_natively")
    assert result.error is not None
    assert "in crash_natively" in result.error.details["log_tail"]


@pytest.mark.parametrize("in_grandchild", [False, True])
def test_memory_hog_is_killed(run: Run, in_grandchild: bool) -> None:
    limit_bytes = 150 * MIB
    result = run("eat_memory", {"in_grandchild": in_grandchild}, limits=Limits(60, limit_bytes))
    assert code_of(result) == "memory_limit_exceeded"
    assert result.error is not None
    assert result.error.details["peak_anon_bytes"] == result.peak_anon_bytes
    assert result.peak_anon_bytes is not None
    assert limit_bytes < result.peak_anon_bytes


def test_memory_below_the_limit_is_measured(run: Run) -> None:
    result = run("eat_memory", {"rounds": 6}, limits=Limits(60, 600 * MIB))
    assert result.error is None
    assert result.peak_anon_bytes is not None
    assert 96 * MIB < result.peak_anon_bytes < 300 * MIB


def test_memory_that_forked_processes_share_counts_once(run: Run) -> None:
    result = run("share_memory", {"mib": 256, "own_mib": 32, "seconds": 1.5})
    assert result.error is None
    assert result.peak_anon_bytes is not None
    # Counted in each of the three processes it would be 832 MiB.
    assert (256 + 2 * 32) * MIB < result.peak_anon_bytes < 600 * MIB


def test_deadline_ends_the_run(run: Run) -> None:
    watched = Watched()
    result = run(
        "hang",
        limits=Limits(deadline_s=1.5),
        on_progress=lambda message, fraction: watched.add(*map(int, message.split())),
    )
    assert code_of(result) == "deadline_exceeded"
    assert len(watched.fds) == 3
    assert watched.all_end(timeout_s=0)


@pytest.mark.parametrize(
    ("reason", "code"),
    [(StopReason.LEASE_LOST, "lease_lost"), (StopReason.SHUTDOWN, "cancelled")],
)
def test_stop_kills_child_and_grandchildren(run: Run, reason: StopReason, code: str) -> None:
    watched = Watched()
    result = run(
        "hang",
        on_progress=lambda message, fraction: watched.add(*map(int, message.split())),
        should_stop=lambda: reason if watched.fds else None,
    )
    assert code_of(result) == code
    assert result.stopped is reason
    assert len(watched.fds) == 3
    # `run` returns only when all are gone: the child, its child, and the one that hid in its own session.
    assert watched.all_end(timeout_s=0)


def test_failing_callback_ends_the_run_and_is_raised(run: Run) -> None:
    watched = Watched()

    def fail(message: str, fraction: float | None) -> None:
        watched.add(*map(int, message.split()))
        raise LookupError("the ledger is gone")

    with pytest.raises(LookupError, match="the ledger is gone"):
        run("hang", on_progress=fail)
    assert watched.all_end(timeout_s=0)


def test_process_left_behind_does_not_outlive_its_step(run: Run) -> None:
    result = run("leave_process_behind")
    assert result.figures is not None
    assert not Path(f"/proc/{result.figures['pid']}").exists()


def test_log_is_capped_and_keeps_both_ends(run: Run) -> None:
    text = run("print_much").log_path.read_text()
    assert text.splitlines()[1] == "first line"
    assert text.endswith("last line\n")
    assert "bytes left out" in text
    assert LOG_LIMIT_BYTES <= len(text) < LOG_LIMIT_BYTES + 100


# --- what a child can reach ---------------------------------------------------------------------


@pytest.mark.parametrize("network", [False, True])
def test_network_is_reached_only_when_granted(run: Run, network: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        result = run("connect", {"host": host, "port": port}, network=network)
    assert result.figures is not None
    assert result.figures["connected"] is network


def look_around(run: Run, tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], ChildResult]:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    outside = tmp_path / "outside"
    outside.write_text("private")
    params = {"worker_pid": os.getpid(), "outside": str(outside)}
    result = run("look_around", params, inputs={"a": source}, **changes)
    assert result.error is None
    assert result.figures is not None
    assert outside.read_text() == "private"
    return result.figures, result


def test_child_sees_its_own_folder_and_no_secrets(run: Run, tmp_path: Path, canary: str) -> None:
    seen, result = look_around(run, tmp_path)
    assert canary not in json.dumps(seen)
    step_dir = tmp_path / "step"
    assert seen["environment"]["HOME"] == str(step_dir / "home")
    assert seen["environment"]["TMPDIR"] == seen["cwd"] == str(step_dir / "scratch")
    assert seen["environment"]["HF_HUB_OFFLINE"] == "1"
    assert (seen["core_limit"], seen["umask"], seen["no_new_privileges"]) == (0, 0o077, True)
    assert seen["credential"] is None
    if result.isolation == "strong":
        assert result.isolation_reasons == ()
        for attempt in ("worker_environment", "outside_read", "outside_write", "input_write"):
            assert seen[attempt] == "PermissionError", attempt
    else:
        assert result.isolation_reasons


def test_credential_arrives_and_leaves_no_trace(run: Run, tmp_path: Path) -> None:
    seen, result = look_around(run, tmp_path, network=True, credential="hub-token-77e1")
    assert seen.pop("credential") == "hub-token-77e1"
    assert "hub-token-77e1" not in json.dumps(seen)
    assert "HF_HUB_OFFLINE" not in seen["environment"]
    for file in (tmp_path / "step").rglob("*"):
        assert file.is_dir() or b"hub-token-77e1" not in file.read_bytes()
    assert result.isolation == "weak" or (seen["outside_read"], seen["outside_write"]) == ("allowed", "PermissionError")


def test_folder_given_to_the_step_is_writable(run: Run, tmp_path: Path) -> None:
    cache = tmp_path / "source"
    cache.mkdir()
    seen, _ = look_around(run, tmp_path, writable=[cache])
    assert seen["input_write"] == "allowed"
    assert (cache / "new").read_text() == "x"


# --- many runs ----------------------------------------------------------------------------------


def test_eight_runs_at_once_share_nothing(run: Run, tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def look(index: int) -> dict[str, Any]:
        folder = tmp_path / str(index)
        folder.mkdir()
        # Passes only when eight children have spoken and none of their runs has returned.
        seen, _ = look_around(
            run,
            folder,
            step_dir=folder / "step",
            credential=str(index),
            on_progress=lambda message, fraction: together.wait(timeout=60) and None,
        )
        return seen

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(look, range(8)))
    assert [seen["credential"] for seen in results] == [str(index) for index in range(8)]
    for seen in results:
        kinds = sorted(target.partition(":")[0] for target in seen["fds"].values())
        assert kinds == ["/dev/null", "pipe", "pipe", "pipe"], seen["fds"]


def test_fifty_runs_leak_nothing(run: Run, sandbox: Sandbox) -> None:
    run("succeed", {"numbers": []})
    zygote_pid = sandbox.zygote_pid("light")
    folders = [Path("/proc/self/fd"), Path(f"/proc/{zygote_pid}/fd")]
    before = [len(list(folder.iterdir())) for folder in folders]
    for index in range(50):
        run(("succeed", "refuse", "leave")[index % 3], {"numbers": []})
    after = [len(list(folder.iterdir())) for folder in folders]
    # The zygote may be just handing a run over, now as before.
    assert after[0] == before[0]
    assert abs(after[1] - before[1]) <= 1
    assert sandbox.zygote_pid("light") == zygote_pid


# --- when others die ----------------------------------------------------------------------------


def test_zygote_death_spares_its_runs_and_the_next_run_gets_another(tmp_path: Path) -> None:
    with Sandbox({"light": []}, target_prefixes=("tests.",)) as sandbox:
        watched = Watched()
        first_pid: int | None = None

        def kill_zygote(message: str, fraction: float | None) -> None:
            nonlocal first_pid
            watched.add(*map(int, message.split()))
            first_pid = sandbox.zygote_pid("light")
            assert first_pid is not None
            zygote = Watched()
            zygote.add(first_pid)
            os.kill(first_pid, signal.SIGKILL)
            assert zygote.all_end(timeout_s=30)

        def run(name: str, params: Mapping[str, Any], stop: Callable[[], StopReason | None]) -> ChildResult:
            return sandbox.run(
                f"{STEPS}:{name}",
                params,
                {},
                tmp_path / name,
                pool="light",
                network=False,
                limits=Limits(60),
                on_progress=kill_zygote if name == "hang" else lambda message, fraction: None,
                should_stop=stop,
                poll_s=0.05,
            )

        result = run("hang", {}, lambda: StopReason.LEASE_LOST if first_pid else None)
        assert result.stopped is StopReason.LEASE_LOST
        assert watched.all_end(timeout_s=0)
        again = run("succeed", {"numbers": [4]}, lambda: None)
        assert again.error is None
        assert sandbox.zygote_pid("light") not in (None, first_pid)


def test_supervisor_death_is_a_crash_and_takes_its_run_along(run: Run) -> None:
    watched = Watched()

    def kill_supervisor(message: str, fraction: float | None) -> None:
        watched.add(*map(int, message.split()))
        child_pid = int(message.split()[0])
        status = Path(f"/proc/{child_pid}/status").read_text()
        supervisor_pid = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
        os.kill(supervisor_pid, signal.SIGKILL)

    result = run("hang", on_progress=kill_supervisor)
    assert code_of(result) == "child_crashed"
    assert result.peak_anon_bytes is None
    assert watched.all_end(timeout_s=30)


def test_worker_death_ends_zygote_and_runs(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from workers.sandbox import Limits, Sandbox
sandbox = Sandbox({{"light": []}}, target_prefixes=("tests.",))
sandbox.run("{STEPS}:hang", {{}}, {{}}, Path(sys.argv[1]), pool="light", network=False, limits=Limits(600),
    on_progress=lambda message, fraction: print(message, sandbox.zygote_pid("light"), flush=True),
    should_stop=lambda: None)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path / "step")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as worker:
        assert worker.stdout is not None
        watched = Watched()
        watched.add(*map(int, worker.stdout.readline().split()))
        assert len(watched.fds) == 4
        worker.kill()
    assert watched.all_end(timeout_s=30)


def test_broken_preload_is_told_and_tried_again(tmp_path: Path) -> None:
    with Sandbox({"broken": ["no_such_module"]}, target_prefixes=("tests.",)) as sandbox:
        for _ in range(2):
            result = sandbox.run(
                f"{STEPS}:succeed",
                {"numbers": []},
                {},
                tmp_path,
                pool="broken",
                network=False,
                limits=Limits(60),
                on_progress=lambda message, fraction: None,
                should_stop=lambda: None,
            )
            assert code_of(result) == "invalid_settings"
            assert result.error is not None
            assert "no_such_module" in result.error.message


def test_closing_stops_runs_and_ends_the_zygote(tmp_path: Path) -> None:
    sandbox = Sandbox({"light": []}, target_prefixes=("tests.",))
    watched = Watched()
    results: list[ChildResult] = []
    is_running = threading.Event()

    def note(message: str, fraction: float | None) -> None:
        zygote_pid = sandbox.zygote_pid("light")
        assert zygote_pid is not None
        watched.add(zygote_pid, *map(int, message.split()))
        is_running.set()

    def work() -> None:
        results.append(
            sandbox.run(
                f"{STEPS}:hang",
                {},
                {},
                tmp_path,
                pool="light",
                network=False,
                limits=Limits(60),
                on_progress=note,
                should_stop=lambda: None,
                poll_s=0.05,
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    assert is_running.wait(timeout=60)
    sandbox.close()
    thread.join(timeout=60)
    assert results[0].stopped is StopReason.SHUTDOWN
    assert watched.all_end(timeout_s=0)
