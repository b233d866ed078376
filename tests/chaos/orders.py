"""Jobs to be sent through faults, each with the fate that it must meet."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from service.requests import JobRequest, parse_request
from tests.chaos.light_steps import LONGEST_S, write_model

TENANT = "default"
#: What a job will meet, and the state that it ends in.
FATES = {"succeeded": "succeeded", "invalid": "failed", "crashed": "failed", "refused": "failed"}


@dataclass(frozen=True)
class Order:
    """A job that was asked for."""

    number: int
    folder: Path
    fate: str

    @property
    def request(self) -> JobRequest:
        """Eight steps, as the ledger takes them."""
        source = {"kind": "folder", "path": str(self.folder)}
        return parse_request({"source": source, "recipes": ["none"], "formats": ["tflite"]})

    @property
    def key(self) -> str:
        """What makes it one job however often it is sent."""
        return f"storm-{self.number}"


def write_orders(folder: Path, count: int, seed: int, longest_s: float = LONGEST_S) -> list[Order]:
    """Write the checkpoints of `count` jobs: one in twelve is bound to fail, one in eight shares another's."""
    chance = random.Random(seed)
    fates = [fate for fate in FATES if fate != "succeeded"]
    orders: list[Order] = []
    for number in range(count):
        if number % 8 == 7:
            twin = chance.choice(orders)
            orders.append(Order(number, twin.folder, twin.fate))
            continue
        fate = fates[number // 12 % len(fates)] if number % 12 == 5 else "succeeded"
        model = write_model(folder / f"model-{number}", seed * 1_000_000 + number, fate, longest_s)
        orders.append(Order(number, model, fate))
    return orders
