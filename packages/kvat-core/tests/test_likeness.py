"""What is impossible, rather than improbable: differences stay finite, as what is published is strict JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from kvat_core import likeness
from kvat_core.schema import Rounding


def predicted(*probabilities: float) -> Any:
    """Log-probabilities of one request and one step."""
    with np.errstate(divide="ignore"):
        return np.log(np.array([[probabilities]], dtype=np.float32))


def test_a_token_that_only_the_candidate_cannot_choose_costs_much_and_not_all() -> None:
    found = likeness.compare(predicted(0.5, 0.3, 0.2), predicted(0.0, 0.6, 0.4), None)

    assert 10 < found.kl_nats < math.inf
    assert found.first_clear_divergence == 0
    assert json.dumps(json.loads(found.model_dump_json()), allow_nan=False)


@pytest.mark.parametrize("other", [(0.0, 0.6, 0.4), (0.1, 0.5, 0.4)])
def test_what_is_impossible_to_the_reference_counts_for_nothing(other: tuple[float, ...]) -> None:
    one = (0.0, 0.6, 0.4)
    by_hand = sum(p * math.log(p / q) for p, q in zip(one, other, strict=True) if p)

    found = likeness.compare(predicted(*one), predicted(*other), None)
    assert found.kl_nats == pytest.approx(by_hand, abs=1e-6)


def test_what_both_cannot_choose_is_no_rounding() -> None:
    only_one = predicted(1.0, 0.0, 0.0)
    assert likeness.rounding(only_one, only_one) == Rounding(choice_nats=0.0, kl_nats=0.0)


def test_what_one_pass_makes_impossible_is_a_rounding_that_is_a_number() -> None:
    found = likeness.rounding(predicted(0.5, 0.3, 0.2), predicted(0.6, 0.0, 0.4))
    assert 10 < found.choice_nats < math.inf
    assert 10 < found.kl_nats < math.inf
