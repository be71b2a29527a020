"""The autoencoder's weights as they come: a diffusers folder, old and new, and single files with the original names."""

import json
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from autoencoders import SMALL, as_ckpt, as_safetensors, original, original_name, write_settings
from safetensors.torch import save_file
from support import CPU

from dansm import BadInput
from dansm.scale.data import autoencoder
from dansm.scale.data.autoencoder import Decoder, Encoder, random_autoencoder, read_autoencoder

diffusers = pytest.importorskip("diffusers")

LEVELS = len(SMALL["block_out_channels"])


@pytest.fixture(scope="module")
def network():
    """An AutoencoderKL of diffusers' own making: what ours must agree with."""
    torch.manual_seed(1)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * LEVELS, up_block_types=("UpDecoderBlock2D",) * LEVELS)
    return diffusers.AutoencoderKL(**SMALL, **blocks, latent_channels=4).eval()


@pytest.fixture(scope="module")
def whole(network):
    return network.state_dict()


@pytest.fixture
def folder(network, tmp_path):
    network.save_pretrained(tmp_path / "model" / "vae")
    return tmp_path / "model" / "vae"


def digest_of(weights):
    """The digest of a network of these weights, which diffusers itself loads."""
    made = random_autoencoder(SMALL)
    made.network.load_state_dict(weights)
    return made.digest


def images(count=2, size=16):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8))


def test_the_names_are_those_that_diffusers_reads(network, whole):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    read = convert_ldm_vae_checkpoint(original(whole), dict(network.config))
    assert read.keys() == whole.keys()
    assert all(torch.equal(read[name], whole[name]) for name in whole)


def test_the_full_size_network_has_the_names_of_stable_diffusion():
    with torch.device("meta"):
        names = {original_name(name, 4) for name in autoencoder._new_network({}).state_dict()}
    assert len(names) == 248
    assert {"encoder.down.3.block.1.conv2.weight", "encoder.down.1.block.0.nin_shortcut.bias", "quant_conv.bias",
            "encoder.mid.attn_1.q.weight", "decoder.mid.attn_1.proj_out.weight", "decoder.norm_out.weight",
            "decoder.up.0.block.2.norm1.bias", "decoder.up.3.upsample.conv.weight", "decoder.mid.block_2.conv1.bias",
            "encoder.down.0.downsample.conv.weight", "decoder.mid.attn_1.norm.bias"} <= names


@pytest.mark.parametrize("kind", ["vae", "model", "file in it", ".safetensors", ".ckpt", "bare", "old", "fp16"])
def test_every_form_gives_the_same_network(kind, whole, folder, tmp_path):
    path = {"vae": folder, "model": folder.parent, "file in it": folder / autoencoder.FILES[0]}.get(kind)
    if kind == ".ckpt":
        path = as_ckpt(tmp_path / "sd.ckpt", whole)
    elif kind in (".safetensors", "bare"):
        path = as_safetensors(tmp_path / "sd.safetensors", whole, "first_stage_model." if kind[0] == "." else "")
    elif kind in ("old", "fp16"):
        path = folder
        weights = dict(whole)
        for older, newer in autoencoder.OLDER_NAMES.items():
            weights = {name.replace(newer, older): weight for name, weight in weights.items()}
        (folder / autoencoder.FILES[0]).unlink()
        save_file(weights, folder / (autoencoder.FILES[0] if kind == "old" else autoencoder.FILES[1]))
    read = read_autoencoder(path)
    assert [*read.network.config.block_out_channels] == [*SMALL["block_out_channels"]]
    assert all(torch.equal(read.network.state_dict()[name], weight) for name, weight in whole.items())
    assert read.digest == read_autoencoder(folder).digest and len(read.digest) == 64


def test_both_halves_compute_what_the_whole_does(network, folder):
    read = read_autoencoder(folder)
    x, z = images(), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        posterior = network.encode(x.float() / 127.5 - 1).latent_dist
        scaled, unscaled = (((network.decode(z / factor).sample + 1) * 127.5).clamp(0, 255) for factor in (0.18215, 1))
    mean, log_variance = Encoder(read, CPU).moments(x).chunk(2, 1)
    assert torch.allclose(mean, posterior.mean * 0.18215, atol=1e-6)
    assert torch.allclose((log_variance / 2).exp(), posterior.std * 0.18215, rtol=1e-4)
    ours = Decoder(read, CPU).decode(z)
    assert ours.dtype == torch.uint8 and ours.shape == (2, 3, 16, 16)
    assert scaled.std() > 5 and (ours.float() - scaled).abs().max() <= 0.51
    assert (scaled - unscaled).abs().max() > 5  # the factor is seen


def test_a_half_holds_the_weights_of_no_other(folder, whole):
    read = read_autoencoder(folder)
    names = [name for name, _ in Encoder(read, CPU).net.named_parameters()]
    assert len(names) == sum(name.startswith(("encoder", "quant_conv")) for name in whole)


def test_factor_and_shift_are_the_folders_own_both_ways(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "scaling_factor": 0.5, "shift_factor": 0.25}))
    other, plain = read_autoencoder(folder), random_autoencoder(SMALL)
    plain.network.load_state_dict(other.network.state_dict())
    mean, log_variance = Encoder(other, CPU).moments(images()).chunk(2, 1)
    raw_mean, raw_log_variance = Encoder(plain, CPU).moments(images()).chunk(2, 1)
    raw_mean, raw_log_variance = raw_mean / 0.18215, raw_log_variance - 2 * np.log(0.18215)
    assert torch.allclose(mean, (raw_mean - 0.25) * 0.5, atol=1e-6)
    assert torch.allclose(log_variance.exp(), raw_log_variance.exp() * 0.25)
    assert torch.equal(Decoder(other, CPU).decode(mean), Decoder(plain, CPU).decode(raw_mean * 0.18215))
    assert other.identity == {"autoencoder": plain.digest, "factor": 0.5, "shift": 0.25}


def test_another_weight_gives_another_digest():
    one, other = (random_autoencoder(SMALL, seed) for seed in (0, 1))
    assert one.digest == random_autoencoder(SMALL, 0).digest != other.digest


def test_bf16_is_near_float32(folder):
    read = read_autoencoder(folder)
    exact, rough = (Encoder(read, CPU, precision).moments(images()) for precision in ("fp32", "bf16"))
    assert rough.dtype == torch.float32 and 0 < (exact - rough).abs().max() < 0.05


# ------------------------------------------------------------------------------- refused


def refused(path, *told):
    with pytest.raises(BadInput) as error:
        read_autoencoder(path)
    message = str(error.value)
    assert "\n" not in message and "expected" in message, message
    for words in told:
        assert words in message, message


def changed(path, weights, lacking="no weight at all", more=(), **settings):
    """A .ckpt without the weights whose name matches, and with others."""
    write_settings(path.parent, **settings)
    kept = {name: weight for name, weight in weights.items() if not re.search(lacking, name)}
    torch.save({"state_dict": {**kept, **dict(more)}}, path)
    return path


def test_missing_keys_are_named_and_counted(whole, tmp_path):
    weights = original(whole)
    path = changed(tmp_path / "a.ckpt", weights, "decoder")
    refused(path, str(path), "Missing key", "decoder.conv_in.weight", "…")
    path = changed(tmp_path / "b.ckpt", weights, r"quant_conv\.bias$")
    refused(path, '"quant_conv.bias", "post_quant_conv.bias"')


@pytest.mark.parametrize(("lacking", "named"), [
    (r"down\.2\.", "encoder.down_blocks.2.resnets.0.norm1.weight"),
    (r"up\.2\.", "decoder.up_blocks.0.resnets.0.norm1.weight"),
    (r"up\.\d\.block\.2", "decoder.up_blocks.0.resnets.2.norm1.weight"),
    (r"up\.0\.|up\.1\.", "decoder.up_blocks.1.resnets.0.norm1.weight"),
])
def test_a_file_with_fewer_or_more_levels_is_no_other_autoencoder(lacking, named, tmp_path):
    like_sd = {"block_out_channels": (32, 64, 64), "layers_per_block": 2, "sample_size": 16}  # the last two are equal
    weights = original(random_autoencoder(like_sd, 3).network.state_dict())
    assert len(read_autoencoder(changed(tmp_path / "whole.ckpt", weights, **like_sd)).network.state_dict()) == 200
    refused(changed(tmp_path / "partial.ckpt", weights, lacking, **like_sd), named)
    refused(changed(tmp_path / "larger.ckpt", weights, **{**like_sd, "block_out_channels": (32, 64)}), "2 levels")


def test_keys_that_are_not_of_the_network_are_named(whole, tmp_path):
    more = {f"first_stage_model.encoder.down.2.attn.0.{name}": torch.zeros(2) for name in ("norm.bias", "q.bias")}
    path = changed(tmp_path / "a.ckpt", original(whole), more=more)
    refused(path, "Unexpected key", *(name.removeprefix("first_stage_model.") for name in more))


def test_a_weight_of_another_shape_is_named(whole, tmp_path):
    key = "first_stage_model.encoder.conv_in.bias"
    refused(changed(tmp_path / "a.ckpt", original(whole), more={key: torch.zeros(7)}),
            "encoder.conv_in.bias", "[7]", "[32]")


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w')",))


def test_a_pickle_with_code_is_not_run(whole, tmp_path):
    code = Code(tmp_path / "ran")
    torch.save({"state_dict": original(whole), "note": code}, tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", "code")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(code))
    refused(tmp_path / "b.ckpt")
    assert not code.path.exists()


def test_notes_of_a_trainer_that_is_not_installed_do_no_harm(whole, tmp_path, monkeypatch):
    """Some files of Stable Diffusion have a class of lightning's for a key."""
    kind = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", kind.__module__):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules[kind.__module__].ModelCheckpoint = kind
    path = as_ckpt(tmp_path / "sd.ckpt", whole, {"callbacks": {kind: {"monitor": "val"}}})
    monkeypatch.undo()
    assert read_autoencoder(path).digest == digest_of(whole)


def test_a_ckpt_of_an_old_torch_is_read(whole, tmp_path):
    write_settings(tmp_path)
    torch.save({"state_dict": original(whole)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert read_autoencoder(tmp_path / "old.ckpt").digest == digest_of(whole)


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_files_that_are_none_or_cut_off(name, content, whole, tmp_path):
    path = (as_ckpt if name == "a.ckpt" else as_safetensors)(tmp_path / name, whole)
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2] if content is None else content)
    refused(path, str(path))


def test_what_holds_no_autoencoder_is_refused(folder, tmp_path):
    refused(tmp_path / "nowhere", "nowhere")
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "x.safetensors", "first_stage_model.")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json")
    settings = folder / "config.json"
    before = settings.read_text()
    settings.write_text(before.replace("AutoencoderKL", "UNet2DModel"))
    refused(folder, "UNet2DModel")
    settings.write_text("[]")
    refused(folder, str(folder))
    settings.write_text(json.dumps({**json.loads(before), "block_out_channels": [32, 33]}))
    refused(folder, str(folder))
    settings.write_text(before)
    (folder / autoencoder.FILES[0]).unlink()
    refused(folder, ".safetensors")


def test_settings_are_stable_diffusions_where_none_lie_beside(monkeypatch, whole, tmp_path):
    monkeypatch.setattr(autoencoder, "SETTINGS", {**autoencoder.SETTINGS, **SMALL})
    torch.save(original(whole), tmp_path / "sd.ckpt")
    assert read_autoencoder(tmp_path / "sd.ckpt").digest == digest_of(whole)


def test_a_missing_diffusers_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.loaders.single_file_utils", None)
    code, _, err = run("decode", "latents.npy", "--autoencoder", "vae", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "pip install 'dansm[latent]'" in err


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_latent_that_is_nan_or_decodes_to_nan_is_named_by_its_number(folder, batch):
    decoder = Decoder(read_autoencoder(folder), CPU)
    decoder.fits = lambda size: batch
    for wrong in range(5):
        z = torch.zeros(5, 4, 4, 4)
        z[wrong] = torch.nan
        with pytest.raises(BadInput, match=f"latent {40 + wrong} holds NaN"):
            decoder.decode(z, 40)
    decoder.net[1].conv_out.bias.fill_(torch.inf)
    with pytest.raises(BadInput, match="latent 0 decodes to NaN in float32"):
        decoder.decode(torch.zeros(1, 4, 4, 4))


def test_as_many_are_decoded_at_a_time_as_the_memory_holds(folder, monkeypatch):
    read, sizes = read_autoencoder(folder), []
    one = 7 * 32 * 16**2 * 4 / 1e9  # gigabytes: seven times 32 channels of 16×16 float32 numbers
    for memory, batch in ((0, 1), (0.9 * one, 1), (1.1 * one, 1), (2.1 * one, 2), (5.5 * one, 5), (9e9, 8)):
        assert Decoder(read, CPU, memory=memory).fits(4) == batch
    assert Decoder(read, CPU, memory=4.4 * one).fits(8) == 1 == Decoder(read, CPU, "bf16", memory=2.2 * one).fits(8)
    assert Decoder(read, CPU, "bf16", memory=2.2 * one).fits(4) == 4
    monkeypatch.setattr(autoencoder, "free_memory", lambda _: 4e9 * 3.3 * one)
    assert Decoder(read, CPU).fits(4) == 3  # a quarter of what is free
    decoder = Decoder(read, CPU, memory=2.1 * one)
    decoder.net.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    assert len(decoder.decode(torch.zeros(5, 4, 4, 4))) == 5 and sizes == [2, 2, 1]
