"""Features for tests, as cheap as networks of features come: `--features features:seen`."""

from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from dansm.scale.evaluate import real_features
from dansm.scale.evaluate.extractors import Extractor


def seen(images):
    """Features of a random network: what it answers to edges and to light, its mean and its deviation. (N, 20)"""
    weights = torch.randn(10, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    answers = F.conv2d(images.float() / 255, weights.to(images.device)).relu().flatten(2)
    return torch.cat([answers.mean(2), answers.std(2)], 1)


def of_three(images):
    return torch.zeros(3, 4)


def not_finite(images):
    return torch.full((len(images), 2), torch.inf)


NO_FUNCTION = {}
SEEN = Extractor("seen", "seen", lambda images: (seen(images), None))
PIXELS = Extractor("pixels", "pixels", lambda images: (images.flatten(1).float() / 255, None))


def digits(count=600):
    """Handwritten digits in three equal colours, uint8 (count, 3, 8, 8), and their classes."""
    known = load_digits()
    images = torch.from_numpy(np.round(known.images * 15.9375).astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
    return images[:count].contiguous(), torch.from_numpy(known.target[:count])


def features_in_batches(batch, *arguments, **settings):
    with patch.object(real_features, "feature_batch", lambda device: batch):
        return real_features.real_features(*arguments, **settings)


def untrained_inception(folder):
    """A file of weights for torch-fidelity's Inception network, as they are before any training."""
    import torch_fidelity.feature_extractor_inceptionv3 as inception

    with patch.object(inception, "load_state_dict_from_url", lambda *_, **__: {}), \
            patch.object(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None):
        state = inception.FeatureExtractorInceptionV3("", ["2048"], verbose=False).state_dict()
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"
