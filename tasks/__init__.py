"""How a step becomes an artifact: one thin module per step, and the one cache (``tasks.step``)."""
