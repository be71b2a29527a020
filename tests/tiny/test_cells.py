"""The film of cells that settle: its shares even out, and the file is the one that results/toy/cells.py draws."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from support import ROOT

import dansm

FILM = ROOT / "results" / "toy" / "cells.gif"


@pytest.fixture(scope="module")
def cells():
    spec = importlib.util.spec_from_file_location("cells", FILM.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shares_are_even_at_the_end_and_potentials_those_of_dansm(cells):
    x, z = cells.scene()
    potentials, shares = zip(*cells.settling(x, z), strict=True)
    assert (potentials[0] == 0).all() and (shares[0] == 0).any()
    assert shares[-1] == pytest.approx(1 / 24, rel=0.03)
    coupling = dansm.Semidiscrete(x, seed=0)
    coupling.solve(error=0.03)
    apart = potentials[-1] - coupling.potentials
    assert (apart - apart.mean()).abs().max() < 0.05


def test_a_fair_share_is_pale_a_large_one_red_a_small_one_blue(cells):
    large, fair, small = cells.colours_of(torch.tensor([2 / 3, 1 / 3, 0.0]))
    assert large[0] > large[2] + 0.3 and small[2] > small[0] + 0.1 and fair.min() > 0.9


@pytest.mark.slow
def test_the_film_is_drawn_again_alike(cells, tmp_path):
    cells.save_film(cells.frames(*cells.scene()), tmp_path / "cells.gif")
    pairs = zip(*(ImageSequence.Iterator(Image.open(path)) for path in (FILM, tmp_path / "cells.gif")), strict=True)
    apart = [np.abs(np.subtract(*(np.asarray(frame.convert("L"), float) for frame in pair))).mean() for pair in pairs]
    assert len(apart) == len(cells.SHOWN) and max(apart) < 2  # of 255 shades
    assert FILM.stat().st_size < 500_000
