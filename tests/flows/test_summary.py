"""The closing lines of a run, of results that lack numbers."""

from __future__ import annotations

from flows.summary import Result


def test_a_recall_that_no_active_neuron_defines_is_not_available() -> None:
    """Thresholds at which all of x1 is zero may be within the budget of a toy model."""
    predictor = {"recall": None, "predicted_sparsity": 0.995, "true_sparsity": 1.0, "cutoff": 0.5}
    found = Result("run", "recipe", predictor=predictor).lines
    assert found[0] == (
        "predictor   recall n/a (no neuron is active), predicted sparsity 99.5 % (true 100.0 %) at cutoff 0.5"
    )
