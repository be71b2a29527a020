"""Trainings in the process of the tests, which change what they see; those that start others say so."""

import pytest

from dansm.tiny import comparison


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(comparison, "PROCESSES", 1)
