"""The tests of the prior: whether noises that were paired with images still are N(0, I)."""

import pytest
import torch

import dansm
from dansm.scale.studies import prior

TESTS = ("size_p", "mean_p", "variance_p", "covariance_p")


@pytest.mark.parametrize("shape", [(3000, 20), (400, 300)])
def test_normal_noise_passes_about_as_often_as_it_should(shape):
    """Of 40 draws, each test finds p below 0.1 in four; fourteen would be a chance of one in 10⁵."""
    torch.manual_seed(1)
    found = [prior.tests_of([torch.randn(shape)]) for _ in range(40)]
    for test in TESTS:
        assert sum(each[test] < 0.1 for each in found) < 14, test
        assert sum(each[test] > 0.5 for each in found) > 8, test


@pytest.mark.parametrize(("change", "test"), [
    (lambda z: 1.03 * z, "size_p"), (lambda z: z + 0.05, "mean_p"),
    (lambda z: z * torch.linspace(0.9, 1.1, z.shape[1]), "variance_p"),
    (lambda z: z + 0.15 * z.roll(1, 1), "covariance_p")])
def test_noise_that_is_not_normal_is_found(change, test):
    z = torch.randn(3000, 40, generator=torch.Generator().manual_seed(2))
    assert prior.tests_of(change(z).split(700))[test] < 1e-4 < prior.tests_of([z])[test]


def test_whole_pools_keep_the_prior_and_the_nearest_of_k_does_not():
    images = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(3)) * 0.4 + 0.6
    ways = [prior.Way("pool", "greedy", 500), prior.Way("first", "greedy", 500, (0.0, 0.25)),
            prior.Way("nearest", "nearest", 16)]
    pool, first, nearest = prior.prior(images, ways)
    assert pool["noises"] == nearest["noises"] == 2000 and first["noises"] == 500
    assert min(pool[test] for test in TESTS) > 1e-3
    assert max(first["mean_p"], nearest["mean_p"], nearest["size_p"]) < 1e-6


def test_a_pool_larger_than_the_images_is_emptied_by_epochs_of_them():
    """Image by image: each comes once an epoch, in another order, and the pool hands out all that it drew."""
    images = torch.randn(300, 1, 2, 2, generator=torch.Generator().manual_seed(4))
    way = prior.Way("pool", "greedy", 700)
    used = torch.cat(list(prior.paired(images, way, 3)))
    assert len(used) == 700
    drawn = dansm.NoisePool(700, (1, 2, 2), seed=3)(torch.zeros(700, 1, 2, 2)).flatten(1)
    assert sorted(map(tuple, used.tolist())) == sorted(map(tuple, drawn.tolist()))
    late = torch.cat(list(prior.paired(images, way._replace(part=(6 / 7, 1.0)), 3)))
    assert torch.equal(late, used[600:])
    assert used[:100].norm(dim=1).mean() < late.norm(dim=1).mean()  # short noises go first
