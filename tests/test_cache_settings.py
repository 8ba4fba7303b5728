"""What a plan can say of its features: refused where it can't be, kept as text, and told where it changes the numbers."""

from __future__ import annotations

from typing import Any

import pytest

import transferkit as tk
from transferkit.errors import PlanError
from transferkit.tuning.cache_settings import CacheSettings


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        CacheSettings(True, dtype="int9", views=0, noise=-1.0, extraction="fast")
    assert str(caught.value) == (
        "Planning the feature cache.\n"
        "  found 4 problems:\n"
        "    - dtype='int9' (did you mean 'int8'?); there are 'float32', 'float16', 'bfloat16', 'int8'\n"
        "    - extraction='fast'; there are 'exact', 'folded', 'bfloat16'\n"
        "    - views=0; it must be a whole number above 0\n"
        "    - noise=-1.0; it must be a number, at least 0\n"
        '  to fix it: .cache(True), .cache(False) or .cache("folder", dtype="float16")'
    )


@pytest.mark.parametrize("setting", [{"dtype": "int8"}, {"views": 2}, {"noise": 0.1}, {"extraction": "folded"}])
def test_nothing_can_be_said_of_features_that_are_not_computed(setting: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        tk.FineTuner().cache(False, **setting)
    assert f"{next(iter(setting))} of features that are not to be computed" in str(caught.value)


def test_a_plan_keeps_what_is_unusual_only() -> None:
    plan = tk.FineTuner().cache(True, dtype="int8", views=1, noise=0.1)
    assert repr(plan) == "FineTuner().cache(True, dtype='int8', noise=0.1)"
    assert tk.FineTuner.from_json(plan.to_json()) == plan
