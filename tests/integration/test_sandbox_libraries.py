"""Libraries that were loaded before the fork work after it, with threads of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workers.sandbox import ChildResult, Limits, Sandbox


def test_forked_children_compute_with_several_threads(tmp_path: Path) -> None:
    with Sandbox({"torch": ["numpy", "torch"]}, target_prefixes=("tests.",)) as sandbox:

        def multiply(index: int) -> ChildResult:
            return sandbox.run(
                "tests.integration.sandbox_steps:multiply",
                {},
                {},
                tmp_path / str(index),
                pool="torch",
                network=False,
                # A lock that was held at the fork shows as a hang, and so as a missed deadline.
                limits=Limits(deadline_s=120),
                on_progress=lambda message, fraction: None,
                should_stop=lambda: None,
            )

        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(multiply, range(4)))
    for result in results:
        assert result.error is None, result.error
        assert result.figures is not None
        assert (result.figures["gradient"], result.figures["product"]) == (512.0, 512.0)
        assert result.figures["threads"] > 1
