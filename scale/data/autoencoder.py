"""Stable Diffusion's autoencoder: images to latents an eighth as wide, and back.

The network is diffusers' AutoencoderKL; its weights are read here, from a diffusers folder or from one file with the
names that Stable Diffusion's authors gave them, with no network connection and without running code in a pickle.
"""

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from dansm import BadInput

from ..base.machine import free_memory, lacks_memory, number_type
from ..base.text import shorten
from .pixels import from_uint8, to_uint8

# Stable Diffusion's, versions 1 and 2; a file of weights shows them only by its shapes
SETTINGS = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 256, "scaling_factor": 0.18215}
EXPECTED = ("expected a diffusers folder (config.json and .safetensors, or with these in vae/), or a .safetensors or "
            ".ckpt with keys first_stage_model.…")
PREFIXES = "first_stage_model.", "vae.", ""  # of the keys in a file, where it holds more than the autoencoder
PARTS = "encoder.", "decoder.", "quant_conv.", "post_quant_conv."
FILES = [f"diffusion_pytorch_model{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin")]
BATCH = {"cuda": 64, "cpu": 8}  # images encoded or decoded together, by device; more would be no faster
LOG_VARIANCES = -30.0, 20.0  # AutoencoderKL itself cuts them to these


class Autoencoder:
    """Weights in the memory of the CPU, by diffusers' names, and the settings of an AutoencoderKL to use them in.

    factor, shift  latents are trained on as (encoded − shift) · factor
    channels       of a latent
    shrinks        pixels of an image, in width and in height, for each number of a latent
    """

    def __init__(self, path: Path, settings: dict, weights: dict[str, Tensor]):
        self.path, self.settings, self.weights = path, settings, weights
        self.factor = settings.get("scaling_factor") or SETTINGS["scaling_factor"]
        self.shift = settings.get("shift_factor") or 0.0
        self.channels = settings["latent_channels"]
        self.shrinks = 2 ** (len(settings["block_out_channels"]) - 1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all weights as float32: the same whatever kind of file they came from."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            digest.update(f"{name} {tuple(self.weights[name].shape)}\n".encode())
            digest.update(self.weights[name].float().contiguous().numpy())
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

    def scaled(self, moments: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, h, w) as the encoder gives them → those of latents as they are trained on."""
        mean, log_variance = moments.chunk(2, 1)
        spread = log_variance.clamp(*LOG_VARIANCES) + 2 * torch.tensor(self.factor).abs().log().item()
        return torch.cat([(mean - self.shift) * self.factor, spread], 1)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as they are trained on → as the decoder takes them."""
        return latents / self.factor + self.shift


class _Half:
    """One half of the network, alone on a device. precision: as for training; auto: bf16 on a GPU, fp32 on the CPU."""

    parts: tuple[str, str]

    def __init__(self, autoencoder: Autoencoder, device: torch.device, precision: str = "auto"):
        self.autoencoder, self.device, self.dtype = autoencoder, device, number_type(precision, device)
        self.precision = str(self.dtype).removeprefix("torch.")
        self.batch = BATCH.get(device.type, 8)
        self.layout = torch.contiguous_format  # channels last is slower: torch's group norm knows no such layout
        net = _network_of(autoencoder, self.parts)
        self.net = net.to(device, self.dtype, memory_format=self.layout)

    def _run(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.dtype, memory_format=self.layout)).float()


class Encoder(_Half):
    """The encoder alone, on a device: images to latents."""

    parts = "encoder", "quant_conv"

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the latents of images, times the factor. uint8 (B, 3, H, W), H and W multiples of
        `shrinks` → (B, 2C, h, w) float32, on the device. Some may be NaN: the caller knows the images' names."""
        x = from_uint8(images.to(self.device, non_blocking=True))
        return self.autoencoder.scaled(self._run(x))


class Decoder(_Half):
    """The decoder alone, on a device: latents to images, within `memory` gigabytes; None for a quarter of what the
    device has free."""

    parts = "post_quant_conv", "decoder"

    def __init__(self, autoencoder: Autoencoder, device: torch.device, precision: str = "auto",
                 memory: float | None = None):
        super().__init__(autoencoder, device, precision)
        self.memory = memory

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
        images = self._run(self.autoencoder.unscaled(latents))
        for batch, problem in (latents, "holds NaN or infinite numbers: expected finite ones"), (
                images, f"decodes to NaN in {self.precision}: expected finite images; --precision fp32 may give them"):
            if not torch.isfinite(batch.sum()):  # one number to wait for, not the whole batch
                wrong = (~torch.isfinite(batch).flatten(1).all(1)).nonzero()
                if len(wrong):
                    raise BadInput(f"latent {first + wrong[0].item()} {problem}")
        return to_uint8(images)

    def fits(self, size: int) -> int:
        """How many latents of `size` numbers square can be decoded at a time within the memory, at least one.

        About seven of the largest tensor that one becomes are there at once: the branch that is kept, the norm's
        float32 copy, what goes into a convolution, what comes out, and what it works in.
        """
        widths = self.autoencoder.settings["block_out_channels"]
        largest = widths[min(1, len(widths) - 1)] * (size * self.autoencoder.shrinks) ** 2
        memory = free_memory(self.device) / 4 if self.memory is None else 1e9 * self.memory
        return int(max(1, min(self.batch, memory / (7 * largest * self.dtype.itemsize))))


# ------------------------------------------------------------------------------- the network


def _new_network(settings: dict, path: Path | None = None) -> nn.Module:
    """An AutoencoderKL by its settings; BadInput naming the file they are from if it cannot be made."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise BadInput(f"the autoencoder needs diffusers, which is missing ({error}): expected it installed (pip "
                       "install 'dansm[latent]')") from error
    levels = len(settings["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    try:
        return AutoencoderKL.from_config({**blocks, **settings})
    except Exception as error:  # its parts raise many kinds for sizes that do not fit
        raise BadInput(f"{path} describes an autoencoder that cannot be made ({error}): {EXPECTED}") from error


def _network_of(autoencoder: Autoencoder, parts: tuple[str, str]) -> nn.Sequential:
    """Two parts of the network, one after the other, with the very weights; the rest takes no memory."""
    with torch.device("meta"):
        whole = _new_network(autoencoder.settings, autoencoder.path)
    modules = []
    for name in parts:
        module = getattr(whole, name)
        if module is None:  # the settings may leave quant_conv out
            continue
        module.load_state_dict({key.removeprefix(f"{name}."): weight for key, weight in autoencoder.weights.items()
                                if key.startswith(f"{name}.")}, assign=True)
        modules.append(module)
    return nn.Sequential(*modules).requires_grad_(False).eval()


def random_autoencoder(settings: dict | None = None, seed: int = 0) -> Autoencoder:
    """One with untrained weights, for measurements and tests: as large as Stable Diffusion's, or of these settings."""
    torch.manual_seed(seed)
    settings = {**SETTINGS, **(settings or {})}
    return Autoencoder(Path("random weights"), settings, _new_network(settings).state_dict())


# ------------------------------------------------------------------------------- reading its weights


def read_autoencoder(path: Path) -> Autoencoder:
    """The autoencoder in a diffusers folder, or in one file. Raises BadInput for a path that holds none, for a pickle
    with code in it, and for weights that are missing, of another shape or not finite, naming them."""
    if not path.exists():
        raise BadInput(f"{path} does not exist: {EXPECTED}")
    settings, file = _find(path)
    weights = _read_file(file)
    settings = settings or _settings_by_shapes(weights, file)
    return Autoencoder(path, settings, _by_diffusers_names(weights, settings, file))


def _find(path: Path) -> tuple[dict | None, Path]:
    """The settings next to the weights, if any, and the file of weights."""
    if not path.is_dir():
        config = path.with_name("config.json")
        described = path.name in FILES and config.is_file()
        return (_read_settings(config) if described else None), path
    folder = next((folder for folder in (path, path / "vae") if (folder / "config.json").is_file()), None)
    if folder is None:
        raise BadInput(f"{path} holds no config.json, nor does vae/ in it: {EXPECTED}")
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise BadInput(f"{folder} holds no {FILES[0]}: {EXPECTED}")
    return _read_settings(folder / "config.json"), file


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text())
        kind = settings.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} cannot be read as settings: {EXPECTED}") from error
    if kind != "AutoencoderKL":
        raise BadInput(f"{path} describes {kind}: expected AutoencoderKL")
    return {**SETTINGS, **{name: value for name, value in settings.items() if not name.startswith("_")}}


def _read_file(file: Path) -> dict[str, Tensor]:
    """The weights in `file` that may be an autoencoder's, by their names there without the prefix of all of them."""
    weights = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    for prefix in PREFIXES:
        begins = tuple(prefix + part for part in PARTS)
        if any(name.startswith(begins[:2]) for name in weights):
            return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(begins)}
    raise BadInput(f"{file} holds no autoencoder, none of its {len(weights):,} keys begins with first_stage_model.: "
                   f"{EXPECTED}")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:  # its own kind, and the system's
        raise BadInput(f"{file} cannot be read as safetensors ({shorten(str(error), 100)}): expected a whole file"
                       ) from error


class _Inert:
    """Stands for a class that checkpoints of Stable Diffusion name among their notes, and that is not needed."""


def _read_pickle(file: Path) -> dict[str, Tensor]:
    notes = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
    mapped = zipfile.is_zipfile(file)  # files of a very old torch are none and cannot be mapped
    try:
        with torch.serialization.safe_globals(notes), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise BadInput(f"{file} holds more than tensors and plain values, which may be code and is not run: expected "
                       "weights alone, as in a .safetensors") from error
    except Exception as error:
        if lacks_memory(error):
            raise
        raise BadInput(f"{file} cannot be read as weights ({shorten(str(error), 100)}): {EXPECTED}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: weight for name, weight in content.items() if isinstance(weight, Tensor)}


def _settings_by_shapes(weights: dict[str, Tensor], file: Path) -> dict:
    """SETTINGS with the sizes of the larger half, so that the other is refused for what it lacks."""
    if any(name.startswith(("encoder.down_blocks", "decoder.up_blocks")) for name in weights):
        raise BadInput(f"{file} has diffusers' names, and no config.json next to it: expected its folder")

    def widths(key: str) -> list[int]:
        """Sizes of the biases key 0, key 1 and so on, as far as there are any."""
        names = takewhile(weights.__contains__, map(key.format, count()))
        return [weights[name].numel() for name in names]

    levels = max(widths("encoder.down.{}.block.0.conv1.bias"), widths("decoder.up.{}.block.0.conv1.bias"), key=len)
    layers = len(widths("encoder.down.0.block.{}.conv1.bias"))
    layers = max(layers, len(widths("decoder.up.0.block.{}.conv1.bias")) - 1)  # the decoder has one more
    bias = weights.get("post_quant_conv.bias")
    channels = SETTINGS["latent_channels"] if bias is None else bias.numel()
    if not levels:
        return SETTINGS
    return {**SETTINGS, "block_out_channels": tuple(levels), "layers_per_block": layers, "latent_channels": channels}


def _by_diffusers_names(found: dict[str, Tensor], settings: dict, file: Path) -> dict[str, Tensor]:
    """The weights of a network of these settings, or BadInput if they are not all there, as they should be."""
    with torch.device("meta"):
        expected = _new_network(settings, file).state_dict()
    keys = _keys_of(expected, found, len(settings["block_out_channels"]))

    def refuse(what: str, wrong: list[str]) -> None:
        if wrong:
            raise BadInput(f"{file} {what}, {len(wrong):,} where an autoencoder of this size has {len(expected):,} "
                           f"({shorten(', '.join(wrong), 200)}): expected Stable Diffusion's, whole")

    refuse("lacks weights", [key for key in keys.values() if key not in found])
    weights = {name: _flat(found[key], expected[name]) for name, key in keys.items()}
    refuse("holds weights of other shapes", [
        f"{keys[name]} {tuple(found[keys[name]].shape)}, not {tuple(expected[name].shape)}"
        for name, weight in weights.items() if weight.shape != expected[name].shape])
    refuse("holds other weights too", sorted(found.keys() - keys.values()))
    for name, weight in weights.items():
        if not torch.isfinite(weight.float().sum()):
            raise BadInput(f"{file} holds NaN or infinite numbers in {keys[name]}: expected finite weights")
    return weights


def _flat(weight: Tensor, like: Tensor) -> Tensor:
    """The attention's convolutions of one pixel are matrices in diffusers."""
    one_pixel = weight.ndim > like.ndim == 2 and weight.shape[2:].numel() == 1
    return weight.flatten(1) if one_pixel else weight


ORIGINAL_NAMES = [
    ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"),
    ("to_k", "k"), ("to_v", "v"), ("down_blocks", "down"), ("resnets", "block"), ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")]
OLDER_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # in diffusers' first folders


def _keys_of(expected: Iterable[str], found: dict[str, Tensor], levels: int) -> dict[str, str]:
    """The key in a file for each of diffusers' names."""
    if not any(".resnets." in name for name in found):
        return {name: original_name(name, levels) for name in expected}
    return {name: name if name in found or older_name(name) not in found else older_name(name) for name in expected}


def original_name(name: str, levels: int) -> str:
    """The name that Stable Diffusion's authors gave to a weight of diffusers; they count the decoder's levels from
    the finest, diffusers from the coarsest."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    for diffusers, original in ORIGINAL_NAMES:
        name = name.replace(diffusers, original)
    return name


def older_name(name: str) -> str:
    for now, then in OLDER_NAMES.items():
        name = name.replace(f".{now}.", f".{then}.")
    return name
