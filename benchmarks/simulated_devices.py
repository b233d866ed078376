"""Devices whose truth is known: what a process would measure on them, process by process.

A model of a device draws the logarithms of speeds, relative to the artifact's own, of one session: everything that
happens between two captures happens to a session. `TUNING` are the models that thresholds and methods were chosen on;
`JUDGED`, with other noise, other throttling and other seeds, are the ones that the figures in docs/devices.md are of;
`LIMITS` are beyond what is promised: falls that are small, noise that is large, and what no capture shows of itself.
Called by `benchmarks/calibration.py` and its test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Rng = np.random.Generator
#: Log speeds of the first processes of a session: (rng, number of processes) -> [number].
Session = Callable[[Rng, int], np.ndarray]

#: How much is lost by each process, which are numbered from -1, the cold one: (rng, numbers, fall) -> [number].
Shape = Callable[[Rng, np.ndarray, float], np.ndarray]

#: What a phone that throttles loses while a capture runs.
FALLS = (0.15, 0.45)
#: Standard deviation of a session's own level: what two captures of the same differ by for nothing.
SESSION_SD = 0.01
#: Of what prefill and decode do not have in common.
OWN_SD = 0.002
PROCESSES = 6
PREFILL_TOKENS, DECODE_TOKENS = 128, 64
PREFILL_TOKENS_PER_S, DECODE_TOKENS_PER_S = 400.0, 20.0


@dataclass(frozen=True)
class Model:
    """A kind of device. `draw` chooses one such device, and returns its sessions."""

    name: str
    draw: Callable[[Rng], Session]


def quiet(rng: Rng) -> float:
    """Standard deviation between processes: half a percent to four."""
    return float(rng.uniform(0.005, 0.04))


def normal(rng: Rng) -> Session:
    """Processes differ as they differ anywhere."""
    sd = quiet(rng)
    return lambda rng, count: rng.normal(0, sd, count)


def heavy_tails(rng: Rng) -> Session:
    """Now and then a process is far off (Student's t with 3 degrees of freedom)."""
    sd = quiet(rng) / np.sqrt(3)
    return lambda rng, count: rng.standard_t(3, count) * sd


def skewed(rng: Rng) -> Session:
    """Slowed down by more or less, never sped up."""
    sd = quiet(rng)
    return lambda rng, count: -rng.exponential(sd, count)


def interrupted(rng: Rng) -> Session:
    """One process in twenty meets something else that runs, and loses a tenth to a third."""
    calm = normal(rng)
    return lambda rng, count: calm(rng, count) + (rng.random(count) < 0.05) * np.log(rng.uniform(0.67, 0.9, count))


def two_clocks(rng: Rng) -> Session:
    """Each process finds one of two clocks, 3 to 12 % apart."""
    sd, gap, share = rng.uniform(0.003, 0.01), -np.log(rng.uniform(0.88, 0.97)), rng.uniform(0.2, 0.8)
    return lambda rng, count: rng.normal(0, sd, count) - (rng.random(count) < share) * gap


def correlated(rng: Rng) -> Session:
    """What disturbs a process disturbs the next one too, by a third (an autoregressive series)."""
    sd, share = quiet(rng), 1 / 3

    def session(rng: Rng, count: int) -> np.ndarray:
        found = rng.normal(0, sd, count)
        found[1:] *= np.sqrt(1 - share**2)
        for number in range(1, count):
            found[number] += share * found[number - 1]
        return found

    return session


def in_bursts(rng: Rng) -> Session:
    """Something else runs for a while: two processes in a row lose a tenth to a third, at one in thirty."""
    calm = skewed(rng)

    def session(rng: Rng, count: int) -> np.ndarray:
        begins = rng.random(count) < 1 / 30
        burst = begins | np.concatenate([[False], begins[:-1]])
        return calm(rng, count) + burst * np.log(rng.uniform(0.67, 0.9))

    return session


def loud(rng: Rng) -> Session:
    """Processes differ by 5 to 9 %."""
    sd = float(rng.uniform(0.05, 0.09))
    return lambda rng, count: rng.normal(0, sd, count)


def three_clocks(rng: Rng) -> Session:
    """Each process finds one of three clocks, with equal odds, 2 to 6 % apart."""
    sd, gap = rng.uniform(0.003, 0.01), -np.log(rng.uniform(0.94, 0.98))
    return lambda rng, count: rng.normal(0, sd, count) - rng.integers(0, 3, count) * gap


def drifting(rng: Rng) -> Session:
    """Gets slower or faster by at most 4 % over a capture: it warms up, and is not throttled."""
    sd, slope = rng.uniform(0.005, 0.02), rng.uniform(-0.04, 0.04) / 6
    return lambda rng, count: rng.normal(0, sd, count) + slope * np.arange(count)


def _throttled(rng: Rng, shape: Shape, noise: Callable[[Rng], Session], falls: tuple[float, float]) -> Session:
    """Loses a share while a capture runs; the second capture begins as the first one, or where it has ended."""
    calm, fall, stays = noise(rng), float(rng.uniform(*falls)), bool(rng.random() < 0.5)

    def session(rng: Rng, count: int) -> np.ndarray:
        # The cold process is the first of the seven.
        at = np.arange(1 + PROCESSES) - 1
        levels = np.log1p(-np.clip(shape(rng, at, fall), 0, 0.95))
        rest = max(0, count - len(levels))
        later = np.full(rest, levels[-1]) if stays else np.resize(levels[1:], rest)
        return calm(rng, count) + np.concatenate([levels, later])

    return session


def _step(rng: Rng, at: np.ndarray, fall: float) -> np.ndarray:
    return fall * (at >= rng.integers(1, 6))


def _line(rng: Rng, at: np.ndarray, fall: float) -> np.ndarray:
    return fall * np.maximum(at, 0) / 5


def _exponential(rng: Rng, at: np.ndarray, fall: float) -> np.ndarray:
    """As a body warms up: fast at first, then ever slower."""
    found = 1 - np.exp(-np.maximum(at, 0) / rng.uniform(0.7, 3))
    return fall * found / found[-1]


def _stairs(rng: Rng, at: np.ndarray, fall: float) -> np.ndarray:
    """Two steps of a governor."""
    first, second = np.sort(rng.choice(np.arange(1, 6), 2, replace=False))
    share = rng.uniform(0.3, 0.7)
    return fall * (share * (at >= first) + (1 - share) * (at >= second))


def _sawtooth(rng: Rng, at: np.ndarray, fall: float) -> np.ndarray:
    """Falls in a line, and recovers a quarter of it once on the way."""
    found = fall * np.maximum(at, 0) / 5
    found[rng.integers(2, 6)] -= 0.25 * fall
    return found


def _runaway(rng: Rng, at: np.ndarray, fall: float) -> np.ndarray:
    """Slowly at first, then ever faster."""
    return fall * (np.maximum(at, 0) / 5) ** rng.uniform(1.5, 3)


def _with(
    shape: Shape, noise: Callable[[Rng], Session], falls: tuple[float, float] = FALLS
) -> Callable[[Rng], Session]:
    return lambda rng: _throttled(rng, shape, noise, falls)


def _always_slow(rng: Rng) -> Session:
    """Held down before the capture begins, and as long as it lasts."""
    calm, level = normal(rng), np.log(rng.uniform(0.6, 0.85))
    return lambda rng, count: calm(rng, count) + level


def _clock_of_the_session(rng: Rng) -> Session:
    """Runs a whole session at one of two clocks, a tenth apart."""
    calm = normal(rng)
    return lambda rng, count: calm(rng, count) - 0.1 * (rng.random() < 0.5)


@dataclass(frozen=True)
class Set:
    """Models of one purpose."""

    healthy: tuple[Model, ...]
    throttled: tuple[Model, ...] = ()


TUNING = Set(
    healthy=(
        Model("normal", normal),
        Model("heavy tails", heavy_tails),
        Model("interrupted", interrupted),
        Model("two clocks", two_clocks),
    ),
    throttled=(
        Model("step", _with(_step, normal)),
        Model("line", _with(_line, normal)),
        Model("exponential", _with(_exponential, heavy_tails)),
        Model("step, interrupted", _with(_step, interrupted)),
    ),
)
JUDGED = Set(
    healthy=(
        Model("skewed", skewed),
        Model("correlated", correlated),
        Model("in bursts", in_bursts),
        Model("three clocks", three_clocks),
        Model("drifting", drifting),
    ),
    throttled=(
        Model("stairs, skewed", _with(_stairs, skewed)),
        Model("sawtooth, correlated", _with(_sawtooth, correlated)),
        Model("runaway, three clocks", _with(_runaway, three_clocks)),
        Model("step, in bursts", _with(_step, in_bursts)),
    ),
)
LIMITS = Set(
    healthy=(Model("loud", loud), Model("clock of the session", _clock_of_the_session)),
    throttled=(
        Model("stairs of 10 to 15 %", _with(_stairs, skewed, (0.10, 0.15))),
        Model("stairs of 5 to 10 %", _with(_stairs, skewed, (0.05, 0.10))),
        Model("stairs, loud", _with(_stairs, loud)),
        Model("slow from the start", _always_slow),
    ),
)


class SimulatedPhone:
    """One session of a device, as `workers.devices.capture.Device` wants it."""

    def __init__(self, rng: Rng, session: Session, log_level: float) -> None:
        # The cold process and two captures.
        count = 1 + 2 * PROCESSES
        self._log_speeds = session(rng, count) + log_level
        self._own = rng.normal(0, OWN_SD, (2, count))
        self._next = 0

    def run_process(self, _label: str) -> dict[str, Any]:
        """Return what the next process measures, of a bundle and of a graph."""
        prefill, decode = np.exp(self._log_speeds[self._next] + self._own[:, self._next])
        self._next += 1
        figures = {
            "prefill_tokens_per_s": float(prefill) * PREFILL_TOKENS_PER_S,
            "decode_tokens_per_s": float(decode) * DECODE_TOKENS_PER_S,
        }
        return {
            **figures,
            "ttft_s": PREFILL_TOKENS / figures["prefill_tokens_per_s"] + 1 / figures["decode_tokens_per_s"],
            "init_s": 0.5,
            "prefill_tokens": PREFILL_TOKENS,
            "decode_tokens": DECODE_TOKENS,
            "latency_ms": {"decode": [1000 / figures["decode_tokens_per_s"]]},
        }

    def read_conditions(self) -> dict[str, Any]:
        """A phone that does not say how hot it is: only the samples show it."""
        return {"thermal_status": None}


def find_truth(rng: Rng, session: Session, captures: int) -> float:
    """Return the median of the log speeds of a session's last capture, were it repeated without end."""
    end = 1 + captures * PROCESSES
    return float(np.median(np.concatenate([session(rng, end)[-PROCESSES:] for _ in range(200)])))
