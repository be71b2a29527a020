"""Stable Diffusion's autoencoder: images to latents an eighth as wide, and back.

The network is diffusers' AutoencoderKL; its weights are read here, from a diffusers folder or from one file with the
names that Stable Diffusion's authors gave them, with no network connection and without running code in a pickle.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dansm import BadInput

from ..base.machine import free_memory, lacks_memory, number_type
from .pixels import from_uint8, to_uint8

# Stable Diffusion's, versions 1 and 2; a file of weights says nothing of it but by their shapes
SETTINGS = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 256, "scaling_factor": 0.18215}
EXPECTED = ("expected a diffusers folder (config.json and .safetensors, or with these in vae/), or a .safetensors or "
            ".ckpt with keys first_stage_model.…")
PREFIXES = "first_stage_model.", "vae.", ""  # of the keys in a file, where it holds more than the autoencoder
PARTS = "encoder.", "decoder.", "quant_conv.", "post_quant_conv."
FILES = [f"diffusion_pytorch_model{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin")]
LARGEST = 8, 64  # batch on a CPU, and on a GPU
LOG_VARIANCES = -30.0, 20.0  # what AutoencoderKL itself cuts them to


@dataclass(frozen=True)
class Autoencoder:
    """Weights in the memory of the CPU, by diffusers' names, and what it takes to make a network of them."""

    path: Path
    settings: dict  # of AutoencoderKL
    weights: dict[str, Tensor]

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
        """By what latents tell whose they are, as their index has it."""
        return {"autoencoder": self.digest, "factor": self.factor, "shift": self.shift}

    @property
    def factor(self) -> float:
        return self.settings.get("scaling_factor") or SETTINGS["scaling_factor"]

    @property
    def shift(self) -> float:
        return self.settings.get("shift_factor") or 0.0

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.settings["latent_channels"]

    @property
    def shrinks(self) -> int:
        """How many pixels of an image a latent has one for, in width and in height."""
        return 2 ** (len(self.settings["block_out_channels"]) - 1)

    def check(self, known: dict, whose: str) -> None:
        """BadInput if latents of which so much is known, see `latents.known_of`, are those of another autoencoder.
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
        """Mean and log-variance of the latents of images, times the factor. uint8 (B, 3, H, W) → (B, 2C, h, w) float32,
        on the device. Some may be NaN: whoever knows the images' names looks for that."""
        height, width = images.shape[2:]
        if height % self.autoencoder.shrinks or width % self.autoencoder.shrinks:
            raise BadInput(f"images are {width}×{height} pixels: expected a multiple of {self.autoencoder.shrinks}")
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
        """Latents times the factor → images, as many at a time as `fits` says. (B, C, h, w) float → uint8
        (B, 3, H, W), on the device.

        Raises BadInput for latents of another shape, and for NaN, of which `first` is the number of latents[0].
        """
        if latents.ndim != 4 or latents.shape[1] != self.autoencoder.channels:
            raise BadInput(f"latents are {tuple(latents.shape)}, and {self.autoencoder.path} decodes "
                           f"{self.autoencoder.channels} channels: expected (B, {self.autoencoder.channels}, h, w)")
        batch = self.fits(max(latents.shape[2:]))
        return torch.cat([self.decode_at_once(part, first + number * batch)
                          for number, part in enumerate(latents.split(batch))])

    @torch.no_grad()
    def decode_at_once(self, latents: Tensor, first: int = 0) -> Tensor:
        """As `decode`, in one part however large."""
        latents = latents.to(self.device, non_blocking=True).float()
        images = self._run(self.autoencoder.unscaled(latents))
        if wrong := _not_finite(latents):
            raise BadInput(f"latent {first + wrong[0]} holds NaN or infinite numbers: expected finite ones")
        if wrong := _not_finite(images):
            raise BadInput(f"latent {first + wrong[0]} decodes to NaN in {self.dtype}".replace("torch.", "")
                           + ": expected finite images; --precision fp32 may give them")
        return to_uint8(images)

    def fits(self, size: int) -> int:
        """How many latents of `size` numbers square can be decoded at a time within the memory, at least one. More than
        LARGEST would be no faster.

        About seven of the largest tensor that one becomes are there at once: the branch that is kept, the norm's
        float32 copy, what goes into a convolution, what comes out, and what it works in.
        """
        widths = self.autoencoder.settings["block_out_channels"]
        largest = widths[min(1, len(widths) - 1)] * (size * self.autoencoder.shrinks) ** 2
        memory = free_memory(self.device) / 4 if self.memory is None else 1e9 * self.memory
        return int(max(1, min(LARGEST[self.device.type != "cpu"], memory / (7 * largest * self.dtype.itemsize))))


def _not_finite(batch: Tensor) -> list[int]:
    """The numbers of those in the batch that are not finite."""
    if torch.isfinite(batch.sum()):  # one number to wait for, not the whole batch
        return []
    return (~torch.isfinite(batch).flatten(1).all(1)).nonzero().flatten().tolist()


# ------------------------------------------------------------------------------- the network


def _diffusers_network():
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise BadInput(f"the autoencoder needs diffusers, which is missing ({error}): expected it installed (pip "
                       "install 'dansm[latent]')") from error
    return AutoencoderKL


def _new_network(settings: dict, path: Path | None = None) -> nn.Module:
    """An AutoencoderKL by its settings; BadInput naming the file they are from if it cannot be made."""
    network = _diffusers_network()
    levels = len(settings["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    try:
        return network.from_config({**blocks, **settings})
    except Exception as error:  # whatever its parts raise for sizes that do not fit
        raise BadInput(f"{path} describes an autoencoder that cannot be made ({error}): {EXPECTED}") from error


def _network_of(autoencoder: Autoencoder, parts: tuple[str, str]) -> nn.Sequential:
    """Two parts of the network, one after the other, with the very weights; the rest takes no memory."""
    with torch.device("meta"):
        whole = _new_network(autoencoder.settings, autoencoder.path)
    modules = []
    for name in parts:
        if (module := getattr(whole, name)) is None:  # a file's settings may leave quant_conv out
            continue
        begin = f"{name}."
        module.load_state_dict({key.removeprefix(begin): weight for key, weight in autoencoder.weights.items()
                                if key.startswith(begin)}, assign=True)
        modules.append(module)
    return nn.Sequential(*modules).requires_grad_(False).eval()


def random_autoencoder(settings: dict | None = None, seed: int = 0) -> Autoencoder:
    """One with untrained weights, for measurements and tests: as large as Stable Diffusion's, or of these settings."""
    torch.manual_seed(seed)
    settings = {**SETTINGS, **(settings or {})}
    return Autoencoder(Path("random weights"), settings, _new_network(settings).state_dict())


# ------------------------------------------------------------------------------- reading its weights


def read_autoencoder(path: Path) -> Autoencoder:
    """The autoencoder in a diffusers folder, or in one file. Raises BadInput for what is none, for a pickle with code
    in it, and for one with weights missing, of another shape or not finite, naming them."""
    if not path.exists():
        raise BadInput(f"{path} does not exist: {EXPECTED}")
    settings, file = _find(path)
    found = _read_file(file)
    if settings is None:
        settings = _settings_by_shapes(found, file)
    return Autoencoder(path, settings, _by_diffusers_names(found, settings, file))


def _find(path: Path) -> tuple[dict | None, Path]:
    """The settings that lie beside the weights, if any, and the file of weights."""
    folder = next((each for each in (path, path / "vae", path.parent) if (each / "config.json").is_file()), None)
    if path.is_dir():
        if folder in (None, path.parent):
            raise BadInput(f"{path} holds no config.json, nor does vae/ in it: {EXPECTED}")
        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if file is None:
            raise BadInput(f"{folder} holds no {FILES[0]}: {EXPECTED}")
        return _read_settings(folder / "config.json"), file
    if folder is not None and path.name in FILES:
        return _read_settings(folder / "config.json"), path
    return None, path


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
    """The weights in `file` that may be an autoencoder's, by their names there without what is before all of them."""
    weights = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    for prefix in PREFIXES:
        begins = tuple(prefix + part for part in PARTS)
        if any(name.startswith(begins[:2]) for name in weights):
            return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(begins)}
    raise BadInput(f"{file} holds no autoencoder, none of its {len(weights):,} keys begins with first_stage_model.: "
                   f"{EXPECTED}")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    begins = tuple(prefix + part for prefix in PREFIXES for part in PARTS)
    try:
        with safe_open(file, "pt") as content:
            names = content.keys()  # it is no dict
            return {name: content.get_tensor(name) if name.startswith(begins) else None for name in names}
    except Exception as error:  # its own kind, and the system's
        raise BadInput(f"{file} cannot be read as safetensors ({_line(error)}): expected a whole file") from error


class _Inert:
    """Stands for a class that checkpoints of Stable Diffusion name among their notes, and that is not needed."""


def _read_pickle(file: Path) -> dict[str, Tensor]:
    notes = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
    try:
        with torch.serialization.safe_globals(notes), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # of a torch so old that its files cannot be mapped, or none at all
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(f"{file} holds more than tensors and plain values, which may be code and is not run: expected "
                       "weights alone, as in a .safetensors") from error
    except Exception as error:
        if lacks_memory(error):
            raise
        raise BadInput(f"{file} cannot be read as weights ({_line(error)}): {EXPECTED}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: weight for name, weight in content.items() if isinstance(weight, Tensor)}


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _settings_by_shapes(found: dict[str, Tensor], file: Path) -> dict:
    """SETTINGS with the sizes that the weights show: as large as any of them needs, so that what a partial file lacks
    is missed by its name."""
    if any(re.match(r"encoder\.down_blocks|decoder\.up_blocks", name) for name in found):
        raise BadInput(f"{file} has diffusers' names, and no config.json beside it: expected its folder")
    known, widths = SETTINGS["block_out_channels"], []
    for level in range(_levels(found) or len(known)):
        one = re.compile(rf"(encoder\.down|decoder\.up)\.{level}\.block\.\d+\.conv")
        shown = [len(weight) for name, weight in found.items() if one.match(name) and weight.ndim]
        widths.append(shown[0] if shown else known[min(level, len(known) - 1)])
    down, up = _counted(r"encoder\.down\.\d+\.block", found), _counted(r"decoder\.up\.\d+\.block", found)
    layers = max(down, up - 1) if down or up else SETTINGS["layers_per_block"]  # the decoder has one more
    quantized = found.get("post_quant_conv.bias")
    latent = SETTINGS["latent_channels"] if quantized is None else len(quantized)
    return {**SETTINGS, "block_out_channels": tuple(widths), "layers_per_block": layers, "latent_channels": latent}


def _levels(found: dict[str, Tensor]) -> int:
    """How many levels either half shows; an encoder's level that is halved has one below it."""
    halved = _counted(r"encoder\.down(?=\.\d+\.downsample)", found)
    return max(halved + 1 if halved else 0, _counted(r"encoder\.down", found), _counted(r"decoder\.up", found))


def _counted(begin: str, found: dict[str, Tensor]) -> int:
    """One more than the largest number that follows `begin` in a name, 0 where none does."""
    return 1 + max((int(match[1]) for name in found if (match := re.match(rf"(?:{begin})\.(\d+)\.", name))), default=-1)


def _by_diffusers_names(found: dict[str, Tensor], settings: dict, file: Path) -> dict[str, Tensor]:
    """The weights of a network of these settings, or BadInput if they are not all there, as they should be."""
    with torch.device("meta"):
        expected = _new_network(settings, file).state_dict()
    levels = len(settings["block_out_channels"])
    namings = {True: lambda name: name, False: lambda name: original_name(name, levels)}
    naming = namings[any(".resnets." in name for name in found)]
    weights, missing, unlike, unused = {}, [], [], set(found)
    for name, like in expected.items():
        key = next((each for each in (naming(name), _older_name(naming(name))) if each in found), naming(name))
        weight = found.get(key)
        unused.discard(key)
        if weight is None:
            missing.append(key)
        elif _flat(weight, like).shape != like.shape:
            unlike.append(f"{key} {tuple(weight.shape)}, not {tuple(like.shape)}")
        else:
            weights[name] = _flat(weight, like)
    _check_all_there(file, len(expected), missing, unlike, sorted(unused))
    for name, weight in weights.items():
        if not torch.isfinite(weight.float().sum()):
            raise BadInput(f"{file} holds NaN or infinite numbers in {naming(name)}: expected finite weights")
    return weights


def _flat(weight: Tensor, like: Tensor) -> Tensor:
    """The attention's convolutions of one pixel are matrices in diffusers."""
    one_pixel = weight.ndim > like.ndim == 2 and weight.shape[2:].numel() == 1
    return weight.flatten(1) if one_pixel else weight


def _check_all_there(file, expected, missing, unlike, unused):
    for wrong, what in (missing, "lacks"), (unlike, "holds other shapes in"), (unused, "has more than"):
        if wrong:
            of = "the" if wrong is unused else f"{len(wrong):,} of the"
            some = ", ".join(wrong[:3]) + ", …" * (len(wrong) > 3)
            raise BadInput(f"{file} {what} {of} autoencoder's {expected:,} keys ({some}): expected a whole autoencoder "
                           "of Stable Diffusion, and no other")


def original_name(name: str, levels: int) -> str:
    """What Stable Diffusion's authors called the weight that diffusers calls `name`; they count the decoder's levels
    from the finest, diffusers from the coarsest."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    for ours, theirs in ORIGINAL_NAMES:
        name = name.replace(ours, theirs)
    return name


ORIGINAL_NAMES = [
    ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"),
    ("to_k", "k"), ("to_v", "v"), ("down_blocks", "down"), ("resnets", "block"), ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")]
OLDER_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # in diffusers' first folders


def _older_name(name: str) -> str:
    for now, then in OLDER_NAMES.items():
        name = name.replace(f".{now}.", f".{then}.")
    return name
