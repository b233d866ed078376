"""The protocol of a measurement, on a device that says what a test wants it to say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import BenchmarkFailed, DeviceHot, DeviceLost, EdgeKilnError, ToolReportInvalid
from workers.devices import capture

ASKED = {
    "format": "litertlm",
    "processes": 6,
    "threads": 4,
    "backend": "gpu",
    "prefill_tokens": 128,
    "decode_tokens": 64,
}


def make_device(run: Callable[[int], dict[str, Any]], fit: Callable[[int], None] = lambda _: None) -> capture.Device:
    """A device whose nth process answers `run(n)`, after `fit(n)`."""
    counts = {"run": 0, "fit": 0}

    def call(name: str, function: Callable[[int], Any]) -> Any:
        counts[name] += 1
        return function(counts[name] - 1)

    return capture.Device(
        record={"name": "a phone", "kind": "virtual"},
        run_process=lambda _label: call("run", run),
        read_conditions=lambda: {"thermal_status": 0},
        wait_until_fit=lambda: call("fit", fit),
    )


def sample(number: int, **fields: Any) -> dict[str, Any]:
    speed = 100.0 + number % 3
    figures = {"prefill_tokens_per_s": speed, "decode_tokens_per_s": speed, "ttft_s": 1 / speed, "init_s": 0.5}
    return {**figures, "prefill_tokens": 128, "decode_tokens": 64, "wall_s": 2.0, "log": "", **fields}


def measure(device: capture.Device, folder: Path) -> dict[str, Any]:
    return capture.measure(device, ASKED, folder, lambda *_: None)


def test_what_ran_elsewhere_than_asked_says_so_in_its_figures(tmp_path: Path) -> None:
    assert measure(make_device(lambda number: sample(number, ran_on="cpu")), tmp_path)["ran_on"] == "cpu"
    assert json.loads((tmp_path / capture.DOCUMENT).read_text())["ran_on"] == "cpu"


def test_control_what_ran_as_asked_says_nothing(tmp_path: Path) -> None:
    assert "ran_on" not in measure(make_device(sample), tmp_path)


def test_a_phone_that_gets_too_hot_for_a_second_capture_keeps_the_first(tmp_path: Path) -> None:
    def noisy(number: int) -> dict[str, Any]:
        speed = 100.0 * (1 + number % 2)
        return sample(number, prefill_tokens_per_s=speed, decode_tokens_per_s=speed)

    def fit(number: int) -> None:
        if number > ASKED["processes"]:
            raise DeviceHot("hot")

    found = measure(make_device(noisy, fit), tmp_path)
    assert (found["verdict"], found["captures"]) == ("noisy", 1)


def test_a_phone_that_is_too_hot_at_first_is_an_error(tmp_path: Path) -> None:
    def fit(number: int) -> None:
        raise DeviceHot("hot")

    with pytest.raises(DeviceHot):
        measure(make_device(sample, fit), tmp_path)


def test_answers_stand_in_the_document_and_how_they_compare_in_the_figures(tmp_path: Path) -> None:
    smoke = capture.Aside({"match_ratio": 0.5}, {"match_ratio": 0.5, "answers": [{"text": "warm"}]})
    device = dataclasses.replace(make_device(sample), asides={"smoke": lambda: smoke})
    assert measure(device, tmp_path)["smoke"] == smoke.figures
    assert json.loads((tmp_path / capture.DOCUMENT).read_text())["smoke"] == smoke.whole


def test_an_answer_that_is_missing_fails_before_anything_is_timed(tmp_path: Path) -> None:
    counts = []

    def fail() -> capture.Aside:
        raise ToolReportInvalid("no answer")

    device = dataclasses.replace(
        make_device(lambda number: counts.append(number) or sample(number)), asides={"smoke": fail}
    )
    with pytest.raises(ToolReportInvalid):
        measure(device, tmp_path)
    assert counts == [0]


def test_a_phone_that_stays_slow_is_hot_the_second_time_too(tmp_path: Path) -> None:
    """Cold process, then three fast ones of the first capture; everything after them is a fifth slower."""

    def throttled(number: int) -> dict[str, Any]:
        speed = 100.0 if number <= 3 else 80.0
        return sample(number, prefill_tokens_per_s=speed, decode_tokens_per_s=speed)

    found = measure(make_device(throttled), tmp_path)
    assert (found["verdict"], found["captures"]) == ("hot", 2)
    document = json.loads((tmp_path / capture.DOCUMENT).read_text())
    assert [each["verdict"] for each in document["captures"]] == ["hot", "hot"]


#: Runs a process of an arm, by its number among those of the arm; what it raises befalls the arm.
Behaviour = Callable[[int], dict[str, Any]]


def measure_arms(
    folder: Path, *behaviours: Behaviour
) -> tuple[list[dict[str, Any] | EdgeKilnError], list[tuple[int, str]]]:
    """Measure arms that behave so; return what becomes of each, and the order in which their processes ran."""
    order: list[tuple[int, str]] = []

    def make_arm(number: int, behaviour: Behaviour) -> capture.Arm:
        counts = iter(range(100))

        def run(label: str) -> dict[str, Any]:
            order.append((number, label))
            return behaviour(next(counts))

        device = dataclasses.replace(make_device(sample), run_process=run)
        return capture.Arm(device, {**ASKED, "processes": 4, "threads": number})

    arms = [make_arm(number, behaviour) for number, behaviour in enumerate(behaviours, 1)]
    return capture.measure_arms(arms, "run-7", folder, lambda *_: None), order


def noisy(number: int) -> dict[str, Any]:
    speed = 100.0 * (1 + number % 2)
    return sample(number, prefill_tokens_per_s=speed, decode_tokens_per_s=speed)


def test_arms_run_a_process_each_in_every_round_and_take_turns_at_being_first(tmp_path: Path) -> None:
    found, order = measure_arms(tmp_path, sample, sample)
    assert order[:2] == [(1, "cold process"), (2, "cold process")]
    assert [number for number, _ in order[2:]] == [1, 2, 2, 1, 1, 2, 2, 1]
    assert [one["interleaved"] for one in found if isinstance(one, dict)] == ["run-7/1", "run-7/1"]
    for number, one in enumerate(found, 1):
        assert isinstance(one, dict)
        document = json.loads((tmp_path / one["document"]).read_text())
        assert document["threads"] == number
        assert [each["round"] for each in document["captures"][0]["samples"]] == [1, 2, 3, 4]


def test_only_what_was_noisy_runs_again_and_is_no_more_in_turns_with_what_was_not(tmp_path: Path) -> None:
    (quiet, first, second), order = measure_arms(tmp_path, sample, noisy, noisy)
    assert isinstance(quiet, dict)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert [one["captures"] for one in (quiet, first, second)] == [1, 2, 2]
    assert (quiet["interleaved"], first["interleaved"], second["interleaved"]) == ("run-7/1", "run-7/2", "run-7/2")
    assert [number for number, _ in order[3 + 3 * 4 :]] == [2, 3, 3, 2, 2, 3, 3, 2]
    again = json.loads((tmp_path / first["document"]).read_text())["captures"][1]["samples"]
    assert [each["round"] for each in again] == [5, 6, 7, 8]


@pytest.mark.parametrize("failing", [0, 2])
def test_an_arm_that_fails_takes_no_others_figures_away(tmp_path: Path, failing: int) -> None:
    def fail(number: int) -> dict[str, Any]:
        if number == failing:
            raise BenchmarkFailed("the GPU is away")
        return sample(number)

    (good, bad), order = measure_arms(tmp_path, sample, fail)
    assert isinstance(bad, BenchmarkFailed)
    assert isinstance(good, dict)
    assert good["processes"] == 4
    # It is not asked again.
    assert len([number for number, _ in order if number == 2]) == failing + 1
    assert [path.name for path in tmp_path.iterdir()] == [good["document"]]


def test_what_befalls_the_device_ends_all_arms(tmp_path: Path) -> None:
    def lose(number: int) -> dict[str, Any]:
        raise DeviceLost("it is away")

    with pytest.raises(DeviceLost):
        measure_arms(tmp_path, sample, lose)


def test_control_one_arm_is_in_turns_with_nobody(tmp_path: Path) -> None:
    found = measure(make_device(sample), tmp_path)
    assert not {"interleaved", "document"} & set(found)
