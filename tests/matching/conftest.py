"""Kernels of small blocks, so that few noises go through all that many go through on a GPU."""

import pytest

# lists end again and again, lanes meet more than they remember
SHORT = dict(KEEP=(4, 8), MANY=30, LANES=16, FEW=16, SAMPLES=32)


@pytest.fixture
def short_lists(request, monkeypatch):
    if "own_sizes" not in request.keywords:
        from dansm.scale.matching import kernels
        from dansm.scale.matching.pool import FastPool

        for name, value in SHORT.items():
            monkeypatch.setattr(kernels, name, value)
        monkeypatch.setattr(FastPool, "served_at_once", SHORT["SAMPLES"])
