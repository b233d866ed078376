"""Per-op profiles: tables as versions of the tool print them, and everything that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import ToolReportInvalid
from workers.devices.profiles import parse_profile

_PRINTED = Path(__file__).parent / "printed"
#: As builds with tabs and a `[start]` column print it, after the profile of the initialization.
TABS = (_PRINTED / "profile_tabs.txt").read_text()
#: As builds with blanks print it, with what the delegate did inside.
BLANKS = (_PRINTED / "profile_blanks.txt").read_text()


def test_a_profile_with_tabs_is_read_whole() -> None:
    (found,) = parse_profile(TABS)
    assert (found["graph"], found["nodes_executed"]) == ("graph", 3)
    assert found["by_type"] == [
        {"node_type": "FULLY_CONNECTED", "count": 2, "avg_ms": 0.026, "share": 1.0, "times_called": 2},
        {"node_type": "TANH", "count": 1, "avg_ms": 0.0, "share": 0.0, "times_called": 1},
    ]
    slowest = found["slowest"][0]
    assert (slowest["name"], slowest["avg_ms"], slowest["share"]) == ("[dense_1/BiasAdd]:1", 0.016, 0.6)


def test_a_profile_with_blanks_is_read_for_each_graph() -> None:
    main, inside = parse_profile(BLANKS)
    assert main["graph"] == "Primary graph name: main"
    assert [row["node_type"] for row in main["by_type"]] == ["TfLiteXNNPackDelegate", "QUANTIZE"]
    assert inside["graph"] == "Delegate internal"
    assert inside["by_type"][0]["node_type"] == "Convolution (NHWC, QC8) IGEMM"
    assert inside["slowest"][0]["times_called"] == 13


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("Operator-wise", "No", "a per-op profile"),
        ("Number of nodes executed: 3", "", "how many nodes"),
        ("Number of nodes executed: 3", "Number of nodes executed: 0", "a whole profile"),
        ("Top by Computation Time", "Nothing", "a whole profile"),
        ("   100.000%\t   100.000%\t     0.000\t        2", "   -nan%\t   100.000%\t     0.000\t        2", "'-nan'"),
        ("\t        2\t     0.026", "\t        2", "row with 7 columns"),
        ("[avg %]", "[share]", "column 'avg %'"),
    ],
)
def test_a_profile_counts_only_whole(old: str, new: str, named: str) -> None:
    head, mark, regular = TABS.partition("INFO: Operator-wise")
    assert old in mark + regular
    with pytest.raises(ToolReportInvalid) as caught:
        parse_profile(head + (mark + regular).replace(old, new))
    assert named in caught.value.message


@pytest.mark.parametrize("kept", range(0, TABS.count("\n") - 6, 3))
def test_a_profile_that_was_cut_off_is_none(kept: int) -> None:
    with pytest.raises(ToolReportInvalid):
        parse_profile("".join(TABS.splitlines(keepends=True)[:kept]))
