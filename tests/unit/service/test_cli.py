"""The command line as far as it needs no server: help, refusals before anything starts, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.commands import convert
from service.commands.progress import ProgressView
from service.commands.report import exit_code, print_outcome

COMMANDS = ("convert", "run", "up", "submit", "jobs", "job", "cancel", "retry", "logs", "download", "recipes")
COMMANDS += ("compare", "pick", "gc", "migrate", "version", "keys", "schedules", "workers", "tenants", "delete")


@pytest.fixture
def run() -> Any:
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(convert, "run_job", start)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Any, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    if command not in ("migrate", "version"):
        assert f"edgekiln {command}" in result.stdout


def test_the_list_of_commands_is_complete(run: Any) -> None:
    listed = run("--help").stdout
    assert all(f"  {command} " in listed for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "dynamic-int8"], "unknown_name: Unknown recipe 'dynamic-int8'. Did you mean 'dynamic_int8'?"),
        (["--format", "litertml"], "unknown_name: Unknown format 'litertml'. Did you mean 'litertlm'?"),
        (["--engine", "trace"], "unknown_name: Unknown engine 'trace'. Did you mean 'traced'?"),
        (["--benchmark", "hots"], "unknown_name: Unknown device 'hots'. Did you mean 'host'?"),
        (["--gate", "min_exact=1"], "unknown_name: Unknown gate 'min_exact'. Did you mean 'min_exact_match'?"),
        (["--gate", "min_exact_match"], "invalid_request: --gate 'min_exact_match' must read NAME=VALUE"),
        (
            ["--prefill", "64", "--context", "32"],
            "invalid_request: The request cannot be used: request: prefill length 64",
        ),
        (["--context", "1"], "invalid_request"),
        (["--context", "0"], "invalid_request"),
        (["--prefill", "32", "--context", "80"], "no multiple of the largest prefill length, 32"),
        (["--gate", "max_kl=nan"], "finite number"),
        (["--context", "many"], "Invalid value for '--context'"),
        (["--colour"], "No such option"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    run: Any, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = run("convert", "owner/name", "-o", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "content", "words"),
    [
        ("--calibration", None, "No such file"),
        ("--calibration", b"", "the file is empty"),
        ("--evaluation", b" \n", "the file is empty"),
        ("--perplexity-text", b"\xff\xfe", "not UTF-8 text, at byte 0"),
        ("--recipe-file", b"[{", "not JSON"),
        ("--recipe-file", b"{}", "own_recipes.mine"),
        ("--recipe-file", b"[{}]", "recipe_invalid"),
        ("--recipe-file", b'[{"a": 1, "a": 2}]', "the key 'a' twice"),
        ("--recipe-file", b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    run: Any, tmp_path: Path, option: str, content: bytes | None, words: str
) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_bytes(content)
    result = run("convert", "owner/name", "-o", str(tmp_path / "out"), option, str(file))
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_calibration_is_text_or_prompts_but_not_both(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("x")
    given = ["--calibration", str(file), "--calibration-prompts", str(file)]
    result = run("convert", "owner/name", "-o", str(tmp_path / "out"), *given)
    assert result.exit_code == 2
    assert "either --calibration or --calibration-prompts" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--recipe", "dynamic-int8"], "unknown_name", "Did you mean 'dynamic_int8'?"),
        (["--colour"], "invalid_request", "No such option"),
        (["--context", "many"], "invalid_request", "Invalid value for '--context'"),
    ],
)
def test_a_failure_is_a_problem_document_for_programs(
    run: Any, tmp_path: Path, arguments: list[str], code: str, words: str
) -> None:
    result = run("convert", "owner/name", "-o", str(tmp_path / "out"), "--json", *arguments)
    problem = json.loads(result.stdout)
    assert (result.exit_code, problem["code"], problem["type"]) == (2, code, f"urn:edgekiln:error:{code}")
    assert words in problem["detail"]
    assert words in result.stderr


def test_a_bug_is_a_problem_document_for_programs(run: Any, tmp_path: Path) -> None:
    arguments = ["convert", "owner/name", "-o", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    result = run(*arguments, "--json")
    assert (result.exit_code, json.loads(result.stdout)["code"]) == (1, "internal_error")


def test_a_source_that_is_nowhere_is_refused(run: Any, tmp_path: Path) -> None:
    result = run("convert", str(tmp_path / "missing"), "-o", str(tmp_path / "out"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("source_not_found: ")


def test_an_output_that_cannot_be_made_is_refused(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("convert", "owner/name", "-o", str(tmp_path / "file" / "out"), "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 2
    assert "Name another folder with -o" in result.stderr


def test_a_source_root_that_is_not_there_is_refused(run: Any, tmp_path: Path) -> None:
    result = run("up", "--data-dir", str(tmp_path), "--source-root", str(tmp_path / "missing"))
    assert result.exit_code == 2
    assert "there is no such folder" in result.stderr


def test_settings_that_contradict_each_other_are_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKILN_LEASE_S", "1")
    result = run("keys", "list")
    assert result.exit_code == 2
    assert result.stderr.startswith("invalid_settings: ")


def test_a_bug_is_a_sentence_and_a_trace_only_when_asked_for(run: Any, tmp_path: Path) -> None:
    arguments = ["convert", "owner/name", "-o", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    plain = run(*arguments)
    traced = run("--trace", *arguments)
    assert plain.exit_code == traced.exit_code == 1
    assert plain.stderr.startswith("internal_error: Unexpected AssertionError: something was started.")
    assert "Traceback" not in plain.stderr
    assert "Traceback" in traced.stderr


def test_ctrl_c_exits_with_130(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "run_job", interrupt)
    result = run("convert", "owner/name", "-o", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 130


def test_recipes_need_no_server(run: Any) -> None:
    names = [recipe["name"] for recipe in json.loads(run("recipes", "--json").stdout)["recipes"]]
    assert "weight_only_int4" in names
    assert all(name in run("recipes").stdout for name in names)


def test_keys_are_made_listed_and_ended_in_the_ledger(run: Any, tmp_path: Path) -> None:
    ledger = ["--data-dir", str(tmp_path)]
    made = run("keys", "create", "laptop", "--expires-days", "1", "--tenant", "team", *ledger)
    assert made.exit_code == 0
    assert made.stdout.startswith("ek_")
    (listed,) = json.loads(run("keys", "list", "--tenant", "team", "--json", *ledger).stdout)
    assert (listed["name"], listed["revoked_at"]) == ("laptop", None)
    assert made.stdout.strip() not in json.dumps(listed)
    assert run("keys", "revoke", listed["id"], *ledger).exit_code == 1  # another tenant's
    assert run("keys", "revoke", listed["id"], "--tenant", "team", *ledger).exit_code == 0
    assert json.loads(run("keys", "list", "--tenant", "team", "--json", *ledger).stdout)[0]["revoked_at"] is not None
    again = run("keys", "revoke", listed["id"], "--tenant", "team", *ledger)
    assert (again.exit_code, again.stderr[:10]) == (1, "not_found:")


@pytest.mark.parametrize(("name", "words"), [("model.tflite", "no tokenizer"), ("model.litertlm", "There is no file")])
def test_a_prompt_needs_a_bundle(run: Any, tmp_path: Path, name: str, words: str) -> None:
    result = run("run", str(tmp_path / name), "12+7=")
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_command_line_starts_without_what_is_heavy() -> None:
    heavy = ["torch", "fastapi", "celery", "sqlalchemy", "httpx", "pydantic", "rich"]
    program = f"import sys, service.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what people read -----------------------------------------------------------------------------


def make_job(**fields: Any) -> dict[str, Any]:
    error = {"code": "gate_refused", "message": "KL is too large.", "retryable": False, "details": {}}
    refused = {
        "name": "dynamic_int4",
        "state": "refused",
        "engine": "traced",
        "error": error,
        "artifacts": [],
        "parity": {"max_abs_error_ratio": 0.25, "kl_mean": 0.5},
        "quality": None,
        "measurements": [],
    }
    artifacts = [
        {"name": "tiny-none.task", "kind": "task", "size_bytes": 5_100_000, "path": "out/tiny-none.task"},
        {"name": "tiny-none.tflite", "kind": "tflite", "size_bytes": 900, "path": "out/tiny-none.tflite"},
    ]
    proven = {
        "name": "none",
        "state": "succeeded",
        "engine": "reauthored",
        "error": None,
        "artifacts": artifacts,
        "parity": {"max_abs_error_ratio": 0.00004, "kl_mean": None},
        "quality": {
            "exact_match": 1.0,
            "source_exact_match": 1.0,
            "by_format": {"task": {"exact_match": 0.75, "source_exact_match": 1.0}},
        },
        "measurements": [
            {"format": "task", "prefill_tokens_per_s": {"median": 17333.2}, "decode_tokens_per_s": {"median": 2402.1}}
        ],
    }
    steps = [
        {"kind": "convert", "state": "succeeded", "reused": True, "error": None},
        {"kind": "publish", "state": "failed", "reused": False, "error": error},
        {"kind": "benchmark", "state": "failed", "reused": False, "error": {**error, "message": "0 tokens/s."}},
    ]
    return {"id": "job_1", "state": "partial", "variants": [proven, refused], "steps": steps, **fields}


def test_the_table_holds_every_figure_and_no_invented_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_outcome(make_job())
    shown = capsys.readouterr()
    rows = [" ".join(line.split()) for line in shown.out.splitlines()]
    assert "none succeeded task 5.1 MB 4e-05 - 75.0% 17,333 2,402" in rows
    assert "none succeeded tflite 900 B 4e-05 - 100.0% - -" in rows
    assert "dynamic_int4 refused - - 0.25 0.5 - - -" in rows
    assert shown.err.splitlines() == [
        "Engine: reauthored, traced.",
        "Exact match of the source: 100.0%.",
        "Files: 2 in out.",
        "dynamic_int4 refused: gate_refused: KL is too large.",
        "benchmark failed: gate_refused: 0 tokens/s.",
        "Job job_1: partial. 1 of 3 steps were reused from earlier work.",
    ]


def test_a_phones_row_tells_its_smoke_and_a_line_its_profile(capsys: pytest.CaptureFixture[str]) -> None:
    node = {"node_type": "FULLY_CONNECTED", "count": 4, "avg_ms": 1.25, "share": 0.75, "times_called": 4}
    speed = {"median": 30.0, "interval": [29.0, 31.0]}
    measurement = {
        "format": "litertlm",
        "device": {"kind": "phone", "model": "P9", "serial": "R5", "tool": {"version": "1"}},
        "backend": "gpu",
        "ran_on": "cpu",
        "threads": 4,
        "prefill_tokens_per_s": speed,
        "decode_tokens_per_s": speed,
        "ttft_s": {"median": 0.2, "interval": None},
        "smoke": {"match_ratio": 0.875},
        "profile": {"decode": [{"graph": "graph", "nodes_executed": 9, "by_type": [node]}]},
        "verdict": "stable",
    }
    job = make_job()
    job["variants"][0]["measurements"] = [measurement]
    print_outcome(job)
    shown = capsys.readouterr()
    assert any("P9" in line and "88%" in line and "stable" in line for line in shown.out.splitlines())
    words = " ".join(shown.out.split())
    assert "gpu 4" in words
    assert "ran on" in words
    expected = "Profile of none on P9, decode, graph (9 nodes): FULLY_CONNECTED 75% (1.25 ms, 4x)"
    assert expected in shown.err.splitlines()


def test_a_refusal_is_told_by_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job()
    verdict = {"gate": "max_size_bytes", "figure_name": "size_bytes", "bound": "at_most", "passed": False}
    job["variants"][1]["error"]["details"] = {
        "missed": [
            {**verdict, "figure": 5_100_000.0, "threshold": 2e6},
            {**verdict, "figure": 2_000_001.0, "threshold": 2e6},
            {**verdict, "gate": "lossy_kl", "figure_name": "parity.kl_mean", "figure": 0.5, "threshold": 0.2},
            {**verdict, "gate": "max_ttft_s", "figure_name": "benchmark.ttft_s", "figure": None, "threshold": 0.2},
        ]
    }
    print_outcome(job)
    told = "max_size_bytes: 5.1 MB, at most 2.0 MB; max_size_bytes: 2,000,001, at most 2,000,000"
    told += "; lossy_kl: 0.5, at most 0.2; max_ttft_s: not measured, at most 200 ms"
    assert f"dynamic_int4 refused: {told}" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("state", "code"), [("succeeded", 0), ("partial", 1), ("failed", 1), ("cancelled", 1)])
def test_only_full_success_exits_with_0(state: str, code: int) -> None:
    assert exit_code(make_job(state=state)) == code


def event(number: int, event_kind: str, /, **data: Any) -> dict[str, Any]:
    return {"number": number, "kind": event_kind, "data": data, "created_at": f"2026-01-01T00:00:{number:02d}+00:00"}


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reads = []

    def read_job() -> dict[str, Any]:
        reads.append(1)
        return {
            "steps": [
                {"id": "a", "kind": "convert", "variants": ["none", "float16"], "format": None},
                {"id": "b", "kind": "bundle", "variants": ["none"], "format": "task"},
            ]
        }

    error = {"code": "disk_full", "message": "No space.", "retryable": True, "details": {}}
    with ProgressView(read_job) as view:
        for item in (
            event(1, "job", state="queued"),
            event(2, "step", step_id="a", kind="convert", state="succeeded", reused=True, error=None),
            event(3, "step", step_id="b", kind="bundle", state="queued", reused=False, error=None),
            event(4, "step", step_id="b", kind="bundle", state="running", error=None),
            event(5, "progress", step_id="b", kind="bundle", message="writing", fraction=0.25),
            event(6, "progress", step_id="b", kind="bundle", message="writing", fraction=0.5),
            event(7, "step", step_id="b", kind="bundle", state="queued", error=error),
            event(8, "step", step_id="b", kind="bundle", state="running", error=error),
            event(10, "step", step_id="b", kind="bundle", state="succeeded", error=None),
            event(11, "variant", name="none", state="running", error=None),
            event(12, "variant", name="none", state="succeeded", error=None),
        ):
            view.on_event(item)
    assert len(reads) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "job: queued",
        "convert: reused",
        "bundle none task: started",
        "bundle none task: writing 25%",
        "bundle none task: will be tried again (disk_full: No space.)",
        "bundle none task: started",
        "bundle none task: done in 2.0 s",
        "variant none: succeeded",
    ]
