"""The noises that samples start from."""

import math

import torch

from dansm.scale.base.noise import path_noise


def test_image_17_starts_from_the_same_noise_in_any_batch():
    alone = path_noise([17], (3, 4, 4), seed=5)[0]
    batch = path_noise(range(10, 20), (3, 4, 4), seed=5)
    assert batch.shape == (10, 3, 4, 4) and batch.dtype == torch.float32
    assert torch.equal(batch[7], alone)
    assert torch.equal(path_noise([40, 17, 3], (3, 4, 4), seed=5)[1], alone)


def test_path_noise_of_other_images_and_seeds_is_other_noise():
    many = torch.cat([path_noise(range(50), (8,), seed=seed) for seed in range(4)])
    assert len(many.unique(dim=0)) == 200
    assert not torch.equal(path_noise([1], (8,), seed=2), path_noise([2], (8,), seed=1))


def test_path_noise_is_standard_normal():
    z = path_noise(range(400), (250,)).double()
    assert abs(z.mean()) < 4 / math.sqrt(z.numel()) and abs(z.var() - 1) < 4 * math.sqrt(2 / z.numel())


def test_path_noise_of_no_images_is_empty():
    assert path_noise([], (3, 2)).shape == (0, 3, 2)
