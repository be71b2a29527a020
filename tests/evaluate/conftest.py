"""What the tests of this room share."""

import pytest

from dansm.scale.evaluate import measures

pytest.importorskip("torch_fidelity")


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch):
    monkeypatch.setattr(measures, "SUBSETS", 3)  # 100 take a second
