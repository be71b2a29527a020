"""Small autoencoders as files, and features of images that need no weights."""

import json

import torch
from safetensors.torch import save_file

from dansm.scale.data.autoencoder import FILES, original_name, random_autoencoder

SMALL = {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "sample_size": 16}


def original(weights, prefix="first_stage_model.", levels=3):
    """The weights as in Stable Diffusion's own files: its names, and attention by convolutions of one pixel."""
    one_pixel = {name for name, weight in weights.items() if "attentions" in name and weight.ndim == 2}
    return {prefix + original_name(name, levels): weight[:, :, None, None].clone() if name in one_pixel else weight
            for name, weight in weights.items()}


def as_ckpt(path, weights, **notes):
    others = {"model.diffusion_model.out.2.bias": torch.zeros(4), "first_stage_model.loss.logvar": torch.zeros(())}
    torch.save({"state_dict": {**others, **original(weights)}, "global_step": 470_000, **notes}, path)
    return path


def as_safetensors(path, weights, prefix="first_stage_model."):
    save_file({"cond_stage_model.x": torch.zeros(2), **original(weights, prefix)}, path)
    return path


def as_folder_of_diffusers(path, seed=3, **settings):
    """A folder with random weights and these settings."""
    made = random_autoencoder(SMALL, seed)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **made.settings, **settings}))
    save_file(made.weights, path / FILES[0])
    return path


def corners(images):
    """Features: the pixels of the upper left corner, (N, 12)."""
    return images[:, :, :2, :2].flatten(1).float() / 255
