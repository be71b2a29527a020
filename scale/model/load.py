"""Trained models, read from the folder of a run, a checkpoint or an export."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dansm import BadInput, Diffusion, RectifiedFlow, UNet

from ..base.text import counted, shorten
from ..data.autoencoder import Decoder, read_autoencoder
from . import checkpoint
from .recipe import make_flow
from .sampling import UNGUIDED, Guidance, check_interval, check_steps, labels_in_turn, parse_guidance, sampler

DESCRIBED = ("dansm", "network", "flow", "times", "step", "decay", "data", "recipe", "latents", "images")


class Model(NamedTuple):
    """A trained network, ready to sample from.

    path     as it was given
    label    its name in figures and tables
    net      the averaged network: (B, C, H, W) and times (B,) → (B, C, H, W)
    flow     how to sample from it
    about    "file" it was read from, "step", "decay" of the average, "recipe", "network" (settings of UNet), "flow",
             "times", "data" it was trained on, "images" (their count), "latents" (see `latents.known_of`), and
             "classes" (their names) if it was trained with labels
    decoder  turns its latents into images; None for a model of images, and until `with_decoder` adds one
    guidance  of its samples
    """

    path: Path
    label: str
    net: UNet | Callable[[Tensor, Tensor], Tensor]
    flow: RectifiedFlow | Diffusion
    about: dict
    decoder: Decoder | None = None
    guidance: Guidance = UNGUIDED

    @property
    def classes(self) -> list[str]:
        """The names of its classes; empty for a network without labels."""
        return self.about.get("classes", [])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        network = self.about["network"]
        size = network["size"]
        return network["channels"], *(size if isinstance(size, list | tuple) else (size, size))

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of its images, which are its samples or are decoded from them."""
        times = self.decoder.autoencoder.shrinks if self.decoder else 1
        return self.shape[1] * times, self.shape[2] * times

    @property
    def draws_images(self) -> bool:
        """Whether its samples are images, not latents."""
        return self.about["latents"] is None

    @property
    def decode(self) -> Callable | None:
        """What `sample_images` decodes its samples with."""
        return self.decoder.decode if self.decoder else None

    def classes_of(self, names: str | None) -> list[int]:
        """The numbers of the classes that --class names, by comma-separated names or numbers; None: of all classes.
        Where names are numbers, as those of ImageNet, they alone count. BadInput for a class that does not exist."""
        if names is None:
            return list(range(len(self.classes)))
        if not self.classes:
            raise BadInput(f"--class is {names}, and {self.path} was trained without labels: expected no --class")
        numbers = {name: number for number, name in enumerate(self.classes)}
        hint = ""
        if not all(name.isdigit() for name in self.classes):
            numbers = {str(number): number for number in range(len(self.classes))} | numbers
            hint = f", or a number from 0 to {len(self.classes) - 1}"
        parts = [names] if names in numbers else [part.strip() for part in names.split(",")]
        if unknown := [part for part in parts if part not in numbers]:
            raise BadInput(f"--class is {unknown[0]!r}: expected one of "
                           f"{shorten(', '.join(self.classes), 300)}{hint}")
        return [numbers[part] for part in parts]

    def labels_of(self, images: Sequence[int]) -> Tensor | None:
        """The labels (len(images),) of images by their numbers, all classes in turn; None without classes."""
        return labels_in_turn(images, range(len(self.classes))) if self.classes else None

    def with_guidance(self, guidance: Guidance) -> Self:
        """This model with that guidance, which its label names. BadInput for one that it was not trained for."""
        if guidance.weight == 1:
            return self
        if not self.classes:
            raise BadInput(f"--guidance is {guidance.weight:g}, and {self.path} was trained without labels: expected "
                           "no --guidance")
        if not self.about["network"]["label_dropout"]:
            raise BadInput(f"--guidance is {guidance.weight:g}, and {self.path} was trained with --label-dropout 0, "
                           "never without a label: expected --guidance 1")
        label = f"{self.label}, guidance {guidance.weight:g}"
        if guidance.interval != UNGUIDED.interval:
            label += " from {:g} to {:g}".format(*guidance.interval)
        return self._replace(guidance=guidance, label=label)

    def on(self, device: torch.device, precision: str = "auto") -> Self:
        """This model with its network on the device, in that precision, through the kernels if there are any."""
        return self._replace(net=sampler(self.net.to(device), device, precision))

    def with_decoder(self, file: Path | None, device: torch.device, precision: str,
                     memory: float | None = None) -> Self:
        """This model with the --autoencoder in `file`, which decodes its latents in `memory` gigabytes. BadInput if a
        model of latents gets none or another than its data's, or a model of images gets one."""
        channels = counted(self.shape[0], "channel")
        if self.draws_images:
            if file is None:
                return self
            raise BadInput(f"--autoencoder is {file}, and {self.path} draws images of {channels}: expected none")
        if file is None:
            raise BadInput(f"{self.path} draws latents of {channels}, which are no images: expected a model of images, "
                           "or --autoencoder to decode them")
        autoencoder = read_autoencoder(file)
        if autoencoder.channels != self.shape[0]:
            raise BadInput(f"{self.path} draws latents of {channels}, {file} decodes {autoencoder.channels}: expected "
                           "the autoencoder of its data")
        autoencoder.check(self.about["latents"], f"{self.path} draws")
        return self._replace(decoder=Decoder(autoencoder, device, precision, memory))

    def described(self) -> dict:
        """What is written into the JSON next to a figure."""
        described = {"label": self.label, "file": str(self.about["file"]), "flow": self.about["flow"],
                     "trained_steps": self.about["step"], "decay": self.about["decay"], "recipe": self.about["recipe"]}
        return described | self.guided_by()

    def guided_by(self) -> dict:
        """Weight and interval of its guidance, as results keep them; empty for a network without labels."""
        weight, interval = self.guidance
        return {"guidance": weight, "guidance_interval": "{:g},{:g}".format(*interval)} if self.classes else {}


def load_models(paths: list[Path], steps: list[int], *, solver: str = "euler", labels: list[str] | None = None,
                guidance: str = "1", interval: str = "0,1") -> list[Model]:
    """The models of several runs' folders, checkpoints or exports, their networks on the CPU, each once for every
    weight of `guidance` (see `parse_guidance`). BadInput if one cannot be sampled so, or in these counts of steps. None
    for `labels` takes the names of folders or files."""
    labels = labels or labels_by_path(paths)
    if len(labels) != len(paths):
        raise BadInput(f"--name is given {counted(len(labels), 'time')} for {counted(len(paths), 'model')}: expected "
                       "once for each, or not at all")
    models = [load_model(path, solver, label) for path, label in zip(paths, labels, strict=True)]
    for model, count in product(models, steps):
        check_steps("--steps", count, type(model.flow))
    guided = [model.with_guidance(weight) for model, weight in product(models, parse_guidance(guidance, interval))]
    for model, count in product(guided, steps):
        check_interval(model.guidance, model.flow, count)
    return guided


def classes_of(models: list[Model]) -> list[str]:
    """The names of the classes of all models that have some. BadInput where they differ."""
    first, *others = [model for model in models if model.classes] or [None]
    if other := next((model for model in others if model.classes != first.classes), None):
        raise BadInput(f"{first.path} and {other.path} have different classes: expected a call for each")
    return first.classes if first else []


def labels_by_path(paths: Iterable[Path]) -> list[str]:
    """A name for each path: a run's folder's, a checkpoint's folder's or an export's. Where several would have the same
    name, the paths themselves."""
    resolved = [Path(path).resolve() for path in paths]
    names = [path.parent.name if checkpoint.NAME.fullmatch(path.name) else path.stem for path in resolved]
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def load_model(path: Path, solver: str = "euler", label: str | None = None) -> Model:
    """The model in `path`, its network on the CPU: a run's folder, of which the newest checkpoint that can be read is
    taken, a checkpoint, or an export. Raises BadInput."""
    weights, about = read_average(path)
    net, flow = build(weights, about, solver)
    if isinstance(flow, Diffusion) and solver != "euler":
        raise BadInput(f"--solver is {solver}: {path} is a diffusion, which is sampled by DDIM; expected none")
    return Model(path, label or labels_by_path([path])[0], net.eval(), flow, about)


def build(weights: dict[str, Tensor], about: dict, solver: str = "euler") -> tuple[UNet, RectifiedFlow | Diffusion]:
    """The network with these weights, and its flow. Raises BadInput for weights that are not that network's."""
    with checkpoint.reading(about["file"]):
        net = UNet(**about["network"])
        net.load_state_dict(weights)
        if len(about.get("classes", [])) != net.classes:
            raise BadInput(f"it names {counted(len(about.get('classes', [])), 'class')} for a network of {net.classes}")
        return net, make_flow(about["recipe"], about["latents"] is None, solver)


def read_average(path: Path, average: int = 0) -> tuple[dict[str, Tensor], dict]:
    """The averaged weights in `path`, of average number `average`, and what `Model` has as "about"."""
    if path.suffix == ".safetensors" and not path.is_dir():
        return _read_export(path)
    if not path.is_dir():
        state = checkpoint.load(path)
    elif newest := checkpoint.load_newest(path):
        path, state = newest
    else:
        raise BadInput(f"{path} holds no checkpoint: expected the folder that a dansm train wrote into")
    with checkpoint.reading(path):
        averages, recipe = state["training"]["averages"], state["recipe"]
        if average >= len(averages):
            decays = ", ".join(f"{number}: decay {other['decay']}" for number, other in enumerate(averages))
            raise BadInput(f"--average is {average}: {path} holds {decays}; expected one of these numbers")
        about = {name: state[name] for name in ("dansm", "network", "data", "recipe", "latents", "images")}
        about |= {"file": path, "flow": recipe["flow"], "times": recipe["times"], "step": state["training"]["step"],
                  "decay": averages[average]["decay"]}
        if state.get("classes"):
            about["classes"] = state["classes"]
        return averages[average]["weights"], about


def read_initial(init: str) -> tuple[dict[str, Tensor], dict]:
    """`read_average` of what --init names, as refusals say."""
    try:
        return read_average(Path(init))
    except BadInput as error:
        raise BadInput(f"--init: {error}") from error


def _read_export(path: Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors import SafetensorError, safe_open

    with checkpoint.reading(path):
        try:
            file = safe_open(path, "pt")
        except SafetensorError as error:
            raise BadInput(str(error)) from error
        with file:
            about = {name: json.loads(file.metadata()[name]) for name in DESCRIBED}
            if about["dansm"] != checkpoint.VERSION:
                raise BadInput(f"it is of version {about['dansm']!r:.20}, not {checkpoint.VERSION}")
            if "classes" in file.metadata():
                about["classes"] = json.loads(file.metadata()["classes"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    return weights, {"file": path, **about}
