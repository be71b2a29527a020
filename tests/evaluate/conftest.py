"""What the tests of this room share."""

import pytest

pytest.importorskip("torch_fidelity")


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch):
    from dansm.scale.evaluate import measures

    monkeypatch.setattr(measures, "SUBSETS", 3)  # 100 take a second
