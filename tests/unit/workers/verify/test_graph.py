from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from workers.verify.graph import MASKED, build_mask


def detail(size: int, context_length: int, dtype: Any) -> dict[str, Any]:
    return {"shape": np.array([1, 1, size, context_length]), "dtype": dtype}


def test_boolean_mask_allows_every_position_up_to_the_token_itself() -> None:
    mask = build_mask(detail(3, 6, np.bool_), 2, 2)
    assert mask.dtype == np.bool_
    assert mask.shape == (1, 1, 3, 6)
    assert mask[0, 0].tolist() == [
        [True, True, True, False, False, False],
        [True, True, True, True, False, False],
        [False] * 6,
    ]


@pytest.mark.parametrize("start", [0, 3])
def test_float_mask_adds_nothing_where_allowed_and_a_finite_loss_elsewhere(start: int) -> None:
    allowed = build_mask(detail(2, 6, np.bool_), start, 2)
    mask = build_mask(detail(2, 6, np.float32), start, 2)
    assert mask.dtype == np.float32
    assert (mask[allowed] == 0).all()
    assert (mask[~allowed] == MASKED).all()
    assert np.isfinite(mask).all()
