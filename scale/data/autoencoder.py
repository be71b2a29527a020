"""Stable Diffusion's autoencoder: images to latents an eighth as wide, and back.

The network is diffusers' AutoencoderKL. Its weights are read from local files, without running code in a pickle.
"""

import copy
import hashlib
import json
import pickle
import warnings
import zipfile
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dansm import BadInput

from ..base.machine import free_memory, lacks_memory, number_type
from ..base.text import shorten
from .pixels import from_uint8, to_uint8

# Stable Diffusion's, versions 1 and 2
SETTINGS = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 256, "scaling_factor": 0.18215}
EXPECTED = ("expected a diffusers folder (config.json and .safetensors, or with these in vae/), or a .safetensors or "
            ".ckpt with keys first_stage_model.…")
FILES = [f"diffusion_pytorch_model{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin")]
# in diffusers' first folders → now
OLDER_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class Autoencoder:
    """An AutoencoderKL in the memory of the CPU, and how latents are scaled to be trained on.

    factor, shift  latents are trained on as (encoded − shift) · factor
    channels       of a latent
    shrinks        pixels of an image, in width and in height, for each number of a latent
    """

    def __init__(self, path: Path, network: nn.Module):
        self.path, self.network = path, network.requires_grad_(False).eval()
        self.factor = network.config.scaling_factor
        self.shift = network.config.shift_factor or 0.0
        self.channels = network.config.latent_channels
        self.shrinks = 2 ** (len(network.config.block_out_channels) - 1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all weights as float32: the same whatever kind of file they came from."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(weight.float().contiguous().numpy())
        return digest.hexdigest()

    @property
    def identity(self) -> dict:
        """What the index of latents says of the autoencoder that made them."""
        return {"autoencoder": self.digest, "factor": self.factor, "shift": self.shift}

    def check(self, known: dict, whose: str) -> None:
        """BadInput if latents of which this is known, see `latents.known_of`, are those of another autoencoder.
        whose: who holds or draws them."""
        for name, value in self.identity.items() if known else ():
            if known.get(name, value) != value:
                raise BadInput(f"{whose} latents made with {name} {str(known[name])[:12]}, {self.path} has "
                               f"{str(value)[:12]}: expected the same autoencoder")


class _Half:
    """A copy of one half of the network on a device.

    precision  as for training; auto: bf16 on a GPU, fp32 on the CPU
    memory     gigabytes to decode in; None: a quarter of what the device has free
    """

    parts: tuple[str, str]

    def __init__(self, autoencoder: Autoencoder, device: torch.device, precision: str = "auto",
                 memory: float | None = None):
        self.autoencoder, self.device, self.memory = autoencoder, device, memory
        self.dtype = number_type(precision, device)
        self.precision = str(self.dtype).removeprefix("torch.")
        self.batch = 64 if device.type == "cuda" else 8  # more would be no faster
        parts = [getattr(autoencoder.network, name) for name in self.parts]
        net = nn.Sequential(*(part for part in parts if part is not None))  # the settings may leave quant_conv out
        self.net = copy.deepcopy(net).to(device, self.dtype)  # as it is: torch's group norm is slow with channels last


class Encoder(_Half):
    """The encoder alone, on a device: images to latents."""

    parts = "encoder", "quant_conv"

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the latents of images, as they are trained on. uint8 (B, 3, H, W), H and W multiples
        of `shrinks` → (B, 2C, h, w) float32, on the device. Some may be NaN: the caller knows the images' names."""
        x = from_uint8(images.to(self.device, non_blocking=True))
        mean, log_variance = self.net(x.to(self.dtype)).float().chunk(2, 1)
        factor = self.autoencoder.factor
        clamped = log_variance.clamp(-30.0, 20.0)  # as AutoencoderKL itself does
        log_variance = clamped + 2 * torch.tensor(factor).abs().log().item()
        return torch.cat([(mean - self.autoencoder.shift) * factor, log_variance], 1)


class Decoder(_Half):
    """The decoder alone, on a device: latents to images."""

    parts = "post_quant_conv", "decoder"

    @torch.no_grad()
    def decode(self, latents: Tensor, first: int = 0) -> Tensor:
        """Latents times the factor → images, as many at a time as `fits` allows. (B, C, h, w) float → uint8
        (B, 3, H, W), on the device.

        Raises BadInput for NaN; `first` is the number of latents[0].
        """
        batch = self.fits(max(latents.shape[2:]))
        return torch.cat([self.decode_at_once(part, first + number * batch)
                          for number, part in enumerate(latents.split(batch))])

    @torch.no_grad()
    def decode_at_once(self, latents: Tensor, first: int = 0) -> Tensor:
        """Do the same as `decode`, in one part however large."""
        latents = latents.to(self.device, non_blocking=True).float()
        encoded = latents / self.autoencoder.factor + self.autoencoder.shift
        images = self.net(encoded.to(self.dtype)).float()
        _check_finite(latents, first, "holds NaN or infinite numbers: expected finite ones")
        _check_finite(images, first, f"decodes to NaN in {self.precision}: expected finite images, which --precision "
                                     "fp32 may give")
        return to_uint8(images)

    def fits(self, size: int) -> int:
        """How many latents of `size` numbers square can be decoded at a time within the memory, at least one.

        About seven of the largest tensor that one becomes are there at once, in a residual block.
        """
        widths = self.autoencoder.network.config.block_out_channels
        largest = widths[min(1, len(widths) - 1)] * (size * self.autoencoder.shrinks) ** 2
        memory = free_memory(self.device) / 4 if self.memory is None else 1e9 * self.memory
        return int(max(1, min(self.batch, memory / (7 * largest * self.dtype.itemsize))))


def _check_finite(x: Tensor, first: int, problem: str) -> None:
    """BadInput naming the first latent of which x (B, ...) is not finite. first: the number of x[0]."""
    wrong = (~x.isfinite().flatten(1).all(1)).nonzero()
    if len(wrong):
        raise BadInput(f"latent {first + wrong[0].item()} {problem}")


def random_autoencoder(settings: dict | None = None, seed: int = 0) -> Autoencoder:
    """One with untrained weights, for measurements and tests: as large as Stable Diffusion's, or of these settings."""
    torch.manual_seed(seed)
    return Autoencoder(Path("random weights"), _new_network(settings or {}))


def _new_network(settings: dict) -> nn.Module:
    """An AutoencoderKL of these settings. What they leave open is as in Stable Diffusion's."""
    from diffusers import AutoencoderKL

    settings = {**SETTINGS, **settings}
    levels = len(settings["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL.from_config({**blocks, **settings})


def read_autoencoder(path: Path) -> Autoencoder:
    """The autoencoder in a diffusers folder, or in one file with the names that Stable Diffusion's authors gave.

    Its settings are those of a config.json next to the weights, or Stable Diffusion's. Raises BadInput for a path that
    holds none, for a pickle with code in it, and for weights that are missing or of another shape.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    folder = path / "vae" if (path / "vae").is_dir() else path
    file = next((folder / name for name in FILES if (folder / name).is_file()), path)
    config = file.with_name("config.json")
    try:
        weights = _read_weights(file)
        settings = json.loads(config.read_text()) if config.exists() else SETTINGS
        if settings.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise ValueError(f"config.json describes {settings['_class_name']}")
        with torch.device("meta"):
            network = _new_network(settings)
        if any(".resnets." in name for name in weights):
            for older, newer in OLDER_NAMES.items():
                weights = {name.replace(older, newer): weight for name, weight in weights.items()}
        else:
            levels = len(network.config.block_out_channels)
            if any(f"decoder.up.{levels}." in name for name in weights):  # diffusers would leave it out and say nothing
                raise ValueError(f"its decoder has more than {levels} levels")
            weights = convert_ldm_vae_checkpoint(weights, network.config)
        network.load_state_dict(weights, assign=True)
    except pickle.UnpicklingError as error:
        raise BadInput(f"{file} holds more than tensors and plain values, which may be code and is not run: expected "
                       "weights alone, as in a .safetensors") from error
    except Exception as error:  # each format and each part of the network has its own kinds
        if lacks_memory(error):
            raise
        reason = shorten(" ".join(str(error).split()), 300)
        raise BadInput(f"{file} cannot be read as an autoencoder ({reason}): {EXPECTED}") from error
    return Autoencoder(path, network)


def _read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        return load_file(file)
    note = object, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # in some files, needed for nothing
    with torch.serialization.safe_globals([note]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped = zipfile.is_zipfile(file)  # files of a very old torch are none and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    return content.get("state_dict", content)
