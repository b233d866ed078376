"""What EdgeKiln counts on at any adb device: `make test-device SERIAL=...` holds a real phone to it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from service.errors import DeviceFull, DeviceHung, DeviceLost, EdgeKilnError
from tests.kiln import wait_for
from tests.virtual_phone.bench import AttachedPhone
from workers.devices import traces
from workers.devices.adb import Adb, Phone, quote
from workers.devices.android import read_conditions, read_record
from workers.devices.processes import Processes
from workers.devices.recovery import is_up

RUN = "conformance-1"
SETTING = "settings get global stay_on_while_plugged_in"
#: More than one piece of the protocol, and no multiple of one.
BYTES = bytes(range(256)) * 1021


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a file"
    path.write_bytes(BYTES)
    return path


@pytest.fixture
def tool(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with a program that any phone runs, and its digest."""
    folder = tmp_path / "tool"
    folder.mkdir()
    (folder / "probe").write_text('#!/system/bin/sh\necho "$@"; sleep "${1:-0}"; exit "${2:-0}"\n')
    return folder, {"probe": digest((folder / "probe").read_bytes())}


def start(phone: Phone, tool: tuple[Path, dict[str, str]], *words: str, deadline_s: float = 60) -> str:
    """Run the program as tools are run; return what it printed."""
    home, _ = traces.place_tool(phone, *tool)
    traces.open_run(phone, RUN)
    boot_id = read_record(phone)["boot_id"]
    # Named by its shell: virtual phones have theirs elsewhere.
    command = ["sh", f"{home}/probe", *words]
    return Processes(phone, RUN, "probe", boot_id, deadline_s).start("process", command).log


def test_it_is_up(phone: Phone) -> None:
    assert phone.adb.states()[phone.serial] == "device"
    is_up(phone)


def test_words_arrive_as_they_are(phone: Phone) -> None:
    words = ["a b", "$HOME", "'", '"', "*", "-n", "\\", "ü", ";exit 3", "%s"]
    said = phone.read(f"for word in {quote(*words)}; do printf '%s\\n' \"$word\"; done")
    assert said.split("\n")[:-1] == words


@pytest.mark.parametrize("status", [0, 1, 7, 127])
def test_the_exit_status_is_the_commands_own(phone: Phone, status: int) -> None:
    answer = phone.run(f"echo out; echo err >&2; exit {status}")
    assert (answer.stdout, answer.stderr, answer.status) == ("out\n", "err\n", status)


def test_much_output_arrives_whole(phone: Phone) -> None:
    lines = phone.read("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done", 120).split("\n")
    assert lines[:-1] == [f"line {number}" for number in range(20000)]


def test_a_command_ends_at_its_deadline(phone: Phone) -> None:
    with pytest.raises(DeviceHung):
        phone.run("sleep 30", deadline_s=1)
    assert phone.read("echo still here") == "still here\n"


def test_a_file_is_checked_by_its_digest_there(phone: Phone, source: Path) -> None:
    traces.open_run(phone, RUN)
    target = f"{traces.run_dir(RUN)}/a file"
    counts: list[int] = []
    traces.push_checked(phone, source, target, digest(BYTES), on_bytes=counts.append)
    assert counts[-1] == len(BYTES)
    assert phone.read(f"wc -c < {quote(target)}").strip() == str(len(BYTES))
    with pytest.raises(DeviceLost, match="damaged"):
        traces.push_checked(phone, source, target, digest(b"other bytes"))


def test_it_says_how_much_room_it_has(phone: Phone) -> None:
    traces.require_room(phone, 1024)
    with pytest.raises(DeviceFull) as caught:
        traces.require_room(phone, 1 << 50)
    assert caught.value.details["free_bytes"] > 0


def test_a_tool_is_brought_once_and_runs(phone: Phone, tool: tuple[Path, dict[str, str]]) -> None:
    home, _ = traces.place_tool(phone, *tool)
    assert traces.place_tool(phone, *tool) == (home, False)
    assert start(phone, tool, "0", "0", "two words") == "0 0 two words\n"
    # What was tampered with is brought again.
    phone.read(f"echo x >> {home}/probe")
    assert traces.place_tool(phone, *tool) == (home, True)
    phone.read(f"rm -rf {home}")


def test_a_tool_that_fails_or_does_not_end_says_so(phone: Phone, tool: tuple[Path, dict[str, str]]) -> None:
    with pytest.raises(EdgeKilnError, match="ended with status 9"):
        start(phone, tool, "0", "9")
    with pytest.raises(EdgeKilnError, match="did not end within 1 s"):
        start(phone, tool, "1000", deadline_s=1)


def test_it_says_what_it_is(phone: Phone) -> None:
    record = read_record(phone)
    for name in ("kind", "serial", "model", "abi", "android", "sdk", "memory_bytes", "boot_id", "kernel"):
        assert record[name], name
    assert record["abi"] in record["abis"]
    assert record["ram_gib"] * 1024**3 >= record["memory_bytes"]
    assert sum(len(cluster["cores"]) for cluster in record["clusters"]) == record["cores"]
    assert read_record(phone) == record


def test_it_says_how_it_is(phone: Phone) -> None:
    conditions = read_conditions(phone)
    assert conditions["boot_id"] == read_record(phone)["boot_id"]
    assert 0 < conditions["battery_percent"] <= 100
    assert conditions["memory_available_bytes"] > 0
    assert conditions["wakefulness"]
    if read_record(phone)["sdk"] >= 29:
        assert conditions["thermal_status"] is not None, "Android 10 and newer tell their thermal status"


def test_it_is_left_as_it_was(phone: Phone) -> None:
    before = phone.read(SETTING)
    traces.open_run(phone, RUN)
    folder = traces.run_dir(RUN)
    # A process as a tool's is: it has its number written down, and a path of ours in its command line.
    phone.read(f"sh -c 'echo $$ > {folder}/pid; while :; do sleep 1; done' {folder} > /dev/null 2>&1 &")
    wait_for(lambda: phone.run(f"[ -s {folder}/pid ]").status == 0, "the process has begun")
    pid = phone.read(f"cat {folder}/pid").strip()
    assert pid.isdigit()
    traces.close_runs(phone)
    wait_for(lambda: phone.run(f"kill -0 {pid}").status != 0, "the process is dead")
    assert phone.read(SETTING) == before
    assert phone.run(f"[ -e {folder} ]").status == 1


def test_two_runs_are_never_on_it(phone: Phone) -> None:
    traces.open_run(phone, "conformance-1")
    traces.open_run(phone, "conformance-2")
    assert phone.read(f"ls {traces.HOME}/runs").split() == ["conformance-2"]


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ({"lose_after_bytes": 40}, DeviceLost),
        ({"no_exit_packet": "echo"}, DeviceLost),
        ({"stall": "echo"}, DeviceHung),
        ({"truncate_push": 1000}, DeviceLost),
        ({"disk_full": True}, DeviceFull),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_faults_have_their_types(
    phone: Phone, virtual: AttachedPhone, source: Path, faults: dict[str, object], error: type[EdgeKilnError]
) -> None:
    virtual.set_faults(**faults)
    impatient = Adb(phone.adb.host, phone.adb.port, answer_s=3).phone(phone.serial)

    def use() -> None:
        impatient.read("echo whole")
        traces.push_checked(impatient, source, "/data/local/tmp/edgekiln/file", digest(BYTES))

    with pytest.raises(error):
        use()
    virtual.set_faults()
    virtual.attach()
    phone.read("rm -f /data/local/tmp/edgekiln/file")
