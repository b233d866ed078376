"""Both parts of a benchmark on a virtual phone, with a tool that prints in the real one's form and runs nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.devices import TOOLS as FORMAT_TOOLS
from service.errors import RequestUnfit, ToolReportInvalid
from tests.unit.workers.devices.test_profiles import TABS as PROFILE
from tests.unit.workers.devices.test_reports import BENCHMARK_MODEL, LITERT_LM
from tests.unit.workers.devices.test_smoke import write_answers
from tests.virtual_phone.bench import AdbServer, AttachedPhone, adb_server, virtual_phone
from workers.devices.adb import Adb
from workers.devices.android import read_record
from workers.devices.phone import measure, prepare

#: Prints a profile where that is asked for, else times.
GRAPH_TOOL = f"""#!/bin/sh
echo "$@" >> "$PHONE_ROOT/calls"
case "$*" in
*--enable_op_profiling=true*) cat <<'END' ;;
{PROFILE}END
*) cat <<'END' ;;
{BENCHMARK_MODEL}END
esac
"""
#: Answers with what the phone's folder `says`, as itself with two tokens of a prompt; else is timed.
TOOL = f"""#!/bin/sh
echo "$@" >> "$PHONE_ROOT/calls"
case "$*" in
*--use_session=true*) [ ! -e "$PHONE_ROOT/says" ] || cat "$PHONE_ROOT/says"; tokens=2 ;;
*) tokens=1024 ;;
esac
sed "s/Processed 1024/Processed $tokens/" >&2 <<'END'
{LITERT_LM}END
"""

TOOLS = {"litert_lm_advanced_main": TOOL, "benchmark_model": GRAPH_TOOL}

Run = Callable[..., dict[str, Any]]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def ignore(message: str, fraction: float | None = None) -> None:
    """Take progress."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdbServer]:
    with adb_server(tmp_path_factory.mktemp("adb")) as started:
        yield started


@pytest.fixture
def attached(server: AdbServer, tmp_path: Path) -> Iterator[AttachedPhone]:
    with virtual_phone(server, tmp_path / "phone") as phone:
        yield phone


@pytest.fixture
def run(server: AdbServer, attached: AttachedPhone, tmp_path: Path) -> Run:
    """Prepares and measures; the document is `out/measurement.json`."""
    inputs = {name: tmp_path / name for name in ("artifact", "tool", "answers")}
    for folder in (*inputs.values(), tmp_path / "out"):
        folder.mkdir()
    (inputs["artifact"] / "model.litertlm").write_bytes(b"model")
    (inputs["artifact"] / "model.tflite").write_bytes(b"graph")
    for name, script in TOOLS.items():
        (inputs["tool"] / name).write_text(script)
    write_answers(inputs["answers"], [1, 2, 3, 4], [1, 2, 3, 5])
    (attached.root / "says").write_text("output: the kiln is warm\n")
    record = {**read_record(Adb("127.0.0.1", server.port).phone(attached.serial)), "name": "a phone"}

    def call(model_format: str = "litertlm", **params: Any) -> dict[str, Any]:
        tool = FORMAT_TOOLS[model_format]
        told = {
            "adb_host": "127.0.0.1",
            "adb_port": server.port,
            "serial": attached.serial,
            "record": record,
            "run": "step_1-1",
            "cool_down_s": 0,
            "answer_s": 30.0,
            "process_deadline_s": 60.0,
            "logit_range": 10.0,
            "tool": {
                "name": tool,
                "version": "1",
                "abi": "x86_64",
                "files": {tool: digest(TOOLS[tool].encode())},
            },
        }
        whole = {
            "format": model_format,
            "processes": 3,
            "prefill_tokens": 1024,
            "decode_tokens": 256,
            **params,
            "phone": told,
        }
        prepare(whole, inputs, tmp_path, ignore)
        return measure(whole, inputs, tmp_path / "out", ignore)

    return call


def test_the_artifact_answers_on_the_phone(run: Run, attached: AttachedPhone, tmp_path: Path) -> None:
    found = run(smoke_prompts=2)
    assert (found["smoke"]["match_ratio"], found["smoke"]["tokens_compared"]) == (7 / 8, 8)
    assert found["smoke"]["first_divergence"]["prompt"] == "prompt 1"
    document = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert [(answer["expected"], answer["text"]) for answer in document["smoke"]["answers"]] == [
        ("the kiln is warm", "the kiln is warm"),
        ("the kiln is cold", "the kiln is warm"),
    ]
    calls = (attached.root / "calls").read_text().splitlines()
    # A process each, after the one that builds caches and before those that are timed.
    assert ["--use_session=true" in call for call in calls[:4]] == [False, True, True, False]
    assert "--input_prompt=prompt 0" in calls[1]
    assert "--max_output_tokens=8" in calls[1]


@pytest.mark.parametrize("says", [None, "nothing"])
def test_a_phone_that_says_nothing_has_not_answered(run: Run, attached: AttachedPhone, says: str | None) -> None:
    (attached.root / "says").unlink()
    if says:
        (attached.root / "says").write_text(says)
    with pytest.raises(ToolReportInvalid, match="an answer to a prompt"):
        run(smoke_prompts=1)


def test_control_who_asks_nothing_gets_no_smoke(run: Run, attached: AttachedPhone) -> None:
    assert "smoke" not in run()
    assert "--use_session" not in (attached.root / "calls").read_text()


def test_a_profile_runs_apart_from_what_is_timed(run: Run, attached: AttachedPhone, tmp_path: Path) -> None:
    found = run("tflite", signatures=["prefill_16", "decode"], profile=True)
    assert set(found["profile"]) == {"prefill_16", "decode"}
    (graph,) = found["profile"]["decode"]
    assert graph["by_type"][0]["node_type"] == "FULLY_CONNECTED"
    document = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert document["profile"]["decode"]["graphs"][0]["slowest"][0]["name"] == "[dense_1/BiasAdd]:1"
    calls = (attached.root / "calls").read_text().splitlines()
    profiled = [call for call in calls if "--enable_op_profiling=true" in call]
    assert [call.split("--signature_to_run_for=")[1].split()[0] for call in profiled] == ["prefill_16", "decode"]
    # The cold process, three, and the one whose memory is watched; two signatures, but for the last.
    assert len(calls) - len(profiled) == 2 * 4 + 1


def test_control_who_asks_for_no_profile_gets_none(run: Run, attached: AttachedPhone) -> None:
    assert "profile" not in run("tflite", signatures=["decode"])
    assert "profiling" not in (attached.root / "calls").read_text()


def test_arms_have_a_document_each_and_one_that_cannot_be_says_why(
    run: Run, attached: AttachedPhone, tmp_path: Path
) -> None:
    arms = [{"backend": "cpu", "threads": 2}, {"backend": "npu", "threads": None}, {"backend": "gpu", "threads": None}]
    cpu, npu, gpu = run("tflite", signatures=["decode"], arms=arms)["arms"]
    assert npu["error"]["code"] == "request_unfit"
    assert cpu["interleaved"] == gpu["interleaved"] == "step_1-1/1"
    written = {one["document"]: one["backend"] for one in (cpu, gpu)}
    for name, backend in written.items():
        assert json.loads((tmp_path / "out" / name).read_text())["backend"] == backend
    timed = (attached.root / "calls").read_text().splitlines()
    assert ["--use_gpu=true" in line for line in timed[2:8]] == [False, True, True, False, False, True]
    assert "--num_threads=2" in timed[0]
    assert {"delegate": "GPU", "share": "whole"} in gpu["delegations"]["decode"]


def test_arms_cache_apart(run: Run, attached: AttachedPhone) -> None:
    run(arms=[{"backend": "cpu", "threads": 1}, {"backend": "cpu", "threads": 2}])
    caches = {call.split("--cache_dir=")[1].split()[0] for call in (attached.root / "calls").read_text().splitlines()}
    assert len(caches) == 2


def test_where_no_arm_can_be_the_request_is_refused(run: Run, attached: AttachedPhone) -> None:
    with pytest.raises(RequestUnfit):
        run("tflite", arms=[{"backend": "npu", "threads": None}, {"backend": "npu", "threads": 2}])
    assert not (attached.root / "calls").exists()
