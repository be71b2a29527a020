"""What the tests of this room share."""

import pytest
from support import make_images


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", width=8, height=8)


@pytest.fixture(autouse=True)
def own_potentials(monkeypatch, tmp_path):
    """Couplings are kept with the test, and not in the user's cache."""
    monkeypatch.setattr("dansm.scale.train.coupling.POTENTIALS", tmp_path / "potentials")
