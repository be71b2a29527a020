"""Small autoencoders as files, and features of images that need no weights."""

import json
import re

import torch
from safetensors.torch import save_file

from dansm.scale.data.autoencoder import FILES, SETTINGS, random_autoencoder

SMALL = {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "sample_size": 16}
ORIGINAL_NAMES = [
    ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"),
    ("to_k", "k"), ("to_v", "v"), ("down_blocks", "down"), ("resnets", "block"), ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")]


def original_name(name, levels):
    """The name that Stable Diffusion's authors gave to a weight of diffusers; they count the decoder's levels from
    the finest, diffusers from the coarsest."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    for diffusers, original in ORIGINAL_NAMES:
        name = name.replace(diffusers, original)
    return name


def original(weights, prefix="first_stage_model.", levels=3):
    """The weights as in Stable Diffusion's own files: its names, and attention by convolutions of one pixel."""
    one_pixel = {name for name, weight in weights.items() if "attentions" in name and weight.ndim == 2}
    return {prefix + original_name(name, levels): weight[:, :, None, None].clone() if name in one_pixel else weight
            for name, weight in weights.items()}


def write_settings(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"_class_name": "AutoencoderKL", **SETTINGS, **SMALL, **settings}
    (folder / "config.json").write_text(json.dumps(settings))


def as_ckpt(path, weights, notes=None, **settings):
    """One file, as Stable Diffusion comes, in a folder of its own with the settings of a small autoencoder."""
    write_settings(path.with_suffix(""), **settings)
    path = path.with_suffix("") / path.name
    others = {"model.diffusion_model.out.2.bias": torch.zeros(4), "first_stage_model.loss.logvar": torch.zeros(())}
    torch.save({"state_dict": {**others, **original(weights)}, "global_step": 470_000, **(notes or {})}, path)
    return path


def random_ckpt(path, seed, **settings):
    return as_ckpt(path, random_autoencoder({**SMALL, **settings}, seed).network.state_dict(), **settings)


def as_safetensors(path, weights, prefix="first_stage_model."):
    write_settings(path.parent)
    save_file({"cond_stage_model.x": torch.zeros(2), **original(weights, prefix)}, path)
    return path


def as_folder_of_diffusers(path, seed=3, **settings):
    """A folder with random weights and these settings."""
    write_settings(path, **settings)
    save_file(random_autoencoder(SMALL, seed).network.state_dict(), path / FILES[0])
    return path


def corners(images):
    """Features: the pixels of the upper left corner, (N, 12)."""
    return images[:, :, :2, :2].flatten(1).float() / 255
