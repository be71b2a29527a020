"""What the tests of this room share."""

import pytest
from support import make_images


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", width=8, height=8)
