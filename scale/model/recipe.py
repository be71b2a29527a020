"""Recipes: the settings of a training run. Those that come with the project are in recipes/; here settings are checked,
read from TOML and written next to the run."""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dansm
from dansm import BadInput

from ..base.files import replacing
from ..base.text import shorten
from ..data.folder import in_braces

RECIPES = Path(__file__).with_name("recipes")
FLOWS = {"rectified": dansm.RectifiedFlow, "diffusion": dansm.Diffusion}
AUTO = "auto"  # a value that a run replaces before it begins, see `train.auto`
COMPARING = "greedy", "optimal", "nearest"  # methods that choose among noises
NEED_LABELS = "label_dropout", "match_labels"  # else they have no effect
RENAMED = {"pool": "pool_dtype", "fast": "tf32", "decay": "ema_decay", "resident": "data_on_gpu",
           "ages": ""}  # which was removed


def setting(part: str, text: str, default: Any = dataclasses.MISSING, *, least: float = 0, most: float = math.inf,
            choices: Iterable[str] = (), empty: bool = False, free: bool = False, methods: Iterable[str] = (),
            auto: bool = False, example: str = ""):
    """A field of `Recipe` with its heading, its help and what it may be: a number from least to most, one of the
    choices, an empty list, "auto". What is free may change when a run resumes; without one of the methods it has no
    effect. example: of a list, for messages."""
    rules = dict(part=part, text=text, least=least, most=most, choices=tuple(choices), empty=empty, free=free,
                 methods=tuple(methods), auto=auto, example=example)
    return dataclasses.field(default=default, metadata=rules)


in_data = partial(setting, "Data")
in_network = partial(setting, "Network")
in_flow = partial(setting, "Flow and matching")
in_steps = partial(setting, "Steps")
in_run = partial(setting, "Run")
in_evaluation = partial(setting, "Evaluation", free=True)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of a training run. BadInput for a value that `checked` refuses."""

    data: str = in_data("cifar10, or the path of a folder or archive of images, an lmdb, or latents")
    size: int = in_data("resize images to squares of this many pixels; 0: as they are", 0, most=4096)
    background: str = in_data("colour under transparent pixels of images, by name or as #rrggbb", "white")
    channels: int = in_data("1 makes images grey, 3 coloured; 0: grey if all of them are", 0, most=3, free=True)
    flip: bool | None = in_data("mirror a random half of the images in each epoch [images yes, latents no]", None)
    skip_unreadable: bool = in_data("leave out images that cannot be read", False)
    cache: str = in_data("folder that keeps the decoded images; several processes share them in any case, in "
                         "~/.cache/dansm/images if none is named", "", free=True)
    data_on_gpu: str = in_data("keep the data in the GPU's memory; auto: if it takes at most half of it", "auto",
                               choices=("auto", "yes", "no"), free=True)
    labels: str = in_data("for a network that draws by class: none, auto, folders (the first folder of each image), or "
                          "a .npy file of whole numbers; auto: cifar10's own, those of dansm encode, a labels.npy next "
                          "to the data, the .cls of WebDataset's shards, or folders", "none", free=True)

    network: str = in_network("ncsnpp and ddpm are the paper's. auto: tiny on a CPU, on a GPU small for at most 64 "
                              "pixels a side, else ddpm", AUTO, choices=(AUTO, *dansm.NETWORKS))
    width: int | None = in_network("channels at the first level, an even number", None, least=4)
    multipliers: tuple[int, ...] | None = in_network("of the width, one for each level", None, least=1,
                                                     example="1,2,2")
    blocks: int | None = in_network("residual blocks at each level", None, least=1)
    attention_at: tuple[int, ...] | None = in_network("sizes with attention (longer side)", None, least=1, empty=True,
                                                      example="16,8")
    dropout: float | None = in_network("share of activations dropped", None, most=1)
    init: str = in_network("begin with the averaged weights of this run, checkpoint or export, of the same network; a "
                           "run that is resumed does not read it", "", free=True)
    label_dropout: float = in_network("share of the labels that training leaves out, for guidance", 0.1, most=1)

    flow: str = in_flow("what the network learns", "rectified", choices=FLOWS)
    times: str = in_flow("distribution of the training times t", "uniform", choices=dansm.TIMES)
    target: str = in_flow("what a diffusion's network predicts", "noise", choices=dansm.TARGETS)
    method: str = in_flow("how noises are paired with samples; the paper's is greedy", "greedy", choices=dansm.METHODS)
    match_size: int | str = in_flow("greedy: noises in the pool, 0 or 1 gives random pairs, auto a pool that the "
                                    "training empties ten times or more; optimal: samples assigned together; nearest: "
                                    "noises drawn for each sample", AUTO, methods=COMPARING, auto=True)
    grid: tuple[int, ...] = in_flow("greedy: match only the sums over so many blocks along the last axes, as 8,8, in a "
                                    "fraction of the memory; empty: match whole noises", (), least=1, empty=True,
                                    methods=["greedy"], example="8,8")
    part: int = in_flow("semidiscrete: samples that share a plan, at most", 100_000, least=1, methods=["semidiscrete"])
    couple_error: float = in_flow("semidiscrete: by how much (rms) the samples' shares of the noises may be off", 0.1,
                                  least=0.001, most=1, methods=["semidiscrete"])
    memory: float | None = in_flow("semidiscrete: gigabytes that the coupling takes at most [half of what the device "
                                   "has free]", None, least=1e-6, free=True, methods=["semidiscrete"])
    cost: str = in_flow("what is near: squared distance, as in the paper, inner product, or inner product and a price "
                        "on each noise that many samples would like", "priced", choices=("priced", *dansm.COSTS),
                        methods=COMPARING)
    match_labels: str = in_flow("with labels: match each class within itself, by a pool of its own", "yes",
                                choices=("yes", "no"))
    match_scope: str = in_flow("a pool for each process, or one over all", "rank", choices=("rank", "global"))
    tf32: bool = in_flow("match in tf32 on a GPU: faster, as good on average", False)
    pool_dtype: str = in_flow("number type of the noises; bf16 takes half the memory", "fp32", choices=("fp32", "bf16"))

    batch: int = in_steps("samples in a step, over all processes together", 128, least=1)
    accumulate: int = in_steps("parts into which a process cuts its share of the batch", 1, least=1)
    lr: float = in_steps("learning rate of Adam", 2e-4, least=1e-9, most=1e30)
    warmup: int = in_steps("steps over which the learning rate rises", 0)
    clip: float = in_steps("largest norm of the gradient", 1.0, least=1e-9, most=1e30)
    ema_decay: tuple[float, ...] = in_steps("of each moving average; samples come from the first", (0.9999,), most=1,
                                           example="0.9999,0.999")
    precision: str = in_steps("auto: bf16, on older GPUs fp16, on the CPU fp32", "auto",
                              choices=("auto", "bf16", "fp16", "fp32"))
    compile: bool = in_steps("on a GPU, compile kernels: a later start, then faster steps", True, free=True)
    deterministic: bool = in_steps("same result to the last bit, slower", False)

    steps: int = in_run("training steps in all", 100_000, least=1, free=True)
    minutes: float = in_run("stop this call after this many minutes; 0: no limit", 0.0, most=10**9, free=True)
    save_minutes: float = in_run("minutes between two checkpoints", 5.0, most=10**9, free=True)
    keep: int = in_run("checkpoints kept", 3, least=1, free=True)
    log_steps: int = in_run("steps between two lines of the log", 50, least=1, free=True)
    sample_steps: int = in_run("steps from noise to image for the grids of samples", 20, least=1, free=True)
    seed: int = in_run("same seed, same result on the same machine", 0, most=2**32 - 1)

    evaluate_every: int = in_evaluation("training steps between two evaluations; 0: none. Latents are evaluated after "
                                        "training, by dansm evaluate --autoencoder", 0)
    evaluate_at: tuple[int, ...] = in_evaluation("further steps after which to evaluate", (), least=1, empty=True,
                                                example="1000,5000")
    evaluate_steps: tuple[int, ...] = in_evaluation("counts of steps from noise to image, a row for each", (3, 5, 10),
                                                    least=1, most=10_000, example="3,5,10")
    evaluate_count: int = in_evaluation("images drawn for each row", 10_000, least=2)
    evaluate_measures: str = in_evaluation("all, or the Fréchet distance alone, which is faster", "all",
                                           choices=("all", "distance"))
    evaluate_features: str = in_evaluation("inception, efficientnet-lite0, or any network as module:callable",
                                           "inception")
    inception_weights: str = in_evaluation("file with its weights, if they cannot be downloaded", "")

    def __post_init__(self):
        for name in SETTINGS:
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        if self.target != "noise" and self.flow != "diffusion":
            raise BadInput(f"--target {self.target} needs --flow diffusion: a rectified flow predicts the velocity")

    def network_settings(self, channels: int, size: int | tuple[int, int]) -> dict:
        """The arguments of `dansm.UNet` for images of that size: height and width, or one number for squares."""
        given = {name: getattr(self, name) for name in ("width", "multipliers", "blocks", "attention_at", "dropout")}
        given = {name: value for name, value in given.items() if value is not None}
        return dict(channels=channels, size=size) | dansm.NETWORKS[self.network] | given


def make_flow(recipe: dict, of_images: bool, solver: str = "euler") -> dansm.RectifiedFlow | dansm.Diffusion:
    """The flow of a recipe, for images or for latents. A diffusion of images knows that pixels are bounded."""
    if recipe["flow"] == "diffusion":
        return dansm.Diffusion(recipe["times"], recipe["target"], bound=1.0 if of_images else None)
    return FLOWS[recipe["flow"]](recipe["times"], solver)


# ------------ Values --------------------------------------------------------------------------------------------------


def _rules(field: dataclasses.Field) -> SimpleNamespace:
    """What `setting` was given, and by the field's type: kind (bool, int, float or str), several (a tuple of these),
    optional (or None, which leaves it to the network or the data)."""
    hint = str(field.type)  # such as "tuple[int, ...] | None"
    kind = next(kind for kind in (bool, int, float, str) if kind.__name__ in hint)
    return SimpleNamespace(kind=kind, several="tuple" in hint, optional="None" in hint, default=field.default,
                           **field.metadata)


SETTINGS = {field.name: _rules(field) for field in dataclasses.fields(Recipe)}


def checked(name: str, value, called: str | None = None):
    """`value` as the setting `name` keeps it, such as a tuple for a list, a float for a whole number. Numbers may be
    text, as on the command line, with commas between several. BadInput, by the name `called`, for any other value."""
    rules = SETTINGS[name]
    if (value is None and rules.optional) or (rules.auto and isinstance(value, str) and value == AUTO):
        return value
    if isinstance(value, str) and rules.kind in (int, float):
        parts = value.split(",") if value else []
        with suppress(ValueError):
            value = list(map(rules.kind, parts)) if rules.several else rules.kind(value)
    is_list = isinstance(value, list | tuple)
    values = value if is_list else [value]
    if is_list == rules.several and (values or rules.empty) and all(_is_allowed(part, rules) for part in values):
        return tuple(map(rules.kind, values)) if rules.several else rules.kind(value)
    given = repr(value) if isinstance(value, str) else shown(value) or "empty"
    raise BadInput(f"{called or name} is {shorten(given, 80)}: expected {_expected(rules)}")


def _is_allowed(value, rules: SimpleNamespace) -> bool:
    if type(value) is not rules.kind and not (rules.kind is float and type(value) is int):
        return False
    if rules.kind is str:
        return not rules.choices or value in rules.choices
    return rules.least <= value <= rules.most


def _expected(rules: SimpleNamespace) -> str:
    if rules.choices:
        return f"one of {', '.join(rules.choices)}"
    words = {str: "a text", bool: "true or false", float: "a number", int: "a whole number"}[rules.kind]
    if rules.kind in (int, float):
        words += f" of at least {rules.least}" if rules.most == math.inf else f" from {rules.least} to {rules.most}"
    words = f"{AUTO}, or {words}" if rules.auto else words
    if not rules.several:
        return words
    return f"one or more, each {words}, as in {rules.example}" + (", or '' for none" if rules.empty else "")


def shown(value) -> str:
    """A value as it is given on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def parse_counts(option: str, text: str, at_least: int = 1, at_most: int = 10**9) -> list[int]:
    """The numbers of an option that is no setting, each once and in their order: 3,5,10 → [3, 5, 10]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and at_least <= int(part) <= at_most for part in parts):
        raise BadInput(f"{option} is {text!r}: expected comma-separated whole numbers from {at_least} to {at_most:,}, "
                       "as in 10,50")
    return list(dict.fromkeys(map(int, parts)))


def check_without_labels(recipe: Recipe, reason: str, given: Collection[str] | None = None) -> None:
    """BadInput if a setting is `given` that has an effect with labels alone, of which there are none for this `reason`.
    None takes settings that differ from their default as given."""
    if given is None:
        given = [name for name in NEED_LABELS if getattr(recipe, name) != SETTINGS[name].default]
    for name in NEED_LABELS:
        if name in given:
            raise BadInput(f"{as_option(name)} is {shown(getattr(recipe, name))}, and {reason}: expected labels, or no "
                           f"{as_option(name)}")


# ------------ Files ---------------------------------------------------------------------------------------------------


def names() -> dict[str, str]:
    """The recipes that come with DANSM: name → the first line of its file, which describes it."""
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            for path in sorted(RECIPES.glob("*.toml"), key=lambda path: path.stem)}


def load(source: str, overrides: dict[str, object] | None = None) -> Recipe:
    """The recipe that comes with DANSM under the name `source` or lies in the TOML file `source`, or, where `source` is
    data, the default settings for it. A folder that is called like a recipe is meant by ./name. `overrides` replaces
    settings. BadInput for a source that does not exist or cannot be read, an unknown setting, a wrong value."""
    overrides = _checked_all(overrides or {})
    if source in names():
        settings = read(RECIPES / f"{source}.toml")
    elif Path(source).suffix == ".toml":
        settings = read(Path(source))
    elif source and not Path(source).exists() and not in_braces(Path(source)):
        raise BadInput(f"{source} does not exist{_nearest(source, names())}: expected a recipe ({', '.join(names())}), "
                       "a .toml file of your own, or data: a folder of images")
    elif overrides.get("data", source) != source:
        raise BadInput(f"--data is {overrides['data']}, and {source} is data too: expected one of them, or a recipe")
    else:
        settings = {"data": source}
    settings |= overrides
    if "data" not in settings:
        raise BadInput(f"{source} does not name the data to train on: expected a line data = \"…\", or --data")
    return Recipe(**settings)


def read(path: Path) -> dict:
    """The settings that a TOML file gives, checked."""
    try:
        settings = tomllib.loads(path.read_bytes().decode("utf-8-sig", "surrogateescape"))  # paths may be of any bytes
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise BadInput(f"{path} cannot be read ({error}): expected a recipe, in lines like lr = 0.0002") from error
    return _checked_all(settings, path)


def _checked_all(settings: dict, file: Path | None = None) -> dict:
    """The settings of a file, or of options, as a recipe keeps them. BadInput for names of earlier versions, all in one
    line, for a name that is no setting, and for a wrong value."""
    called = str if file else as_option
    where = f"{file}: " if file else ""
    if former := [what_became_of(called(name), called(new)) for name, new in RENAMED.items() if name in settings]:
        raise BadInput(where + "; ".join(former))
    for name in settings:
        if name not in SETTINGS:
            raise BadInput(f"{where}{called(name)} is not a setting{_nearest(name, SETTINGS)}: expected one that dansm "
                           "train --help lists")
    return {name: checked(name, value, where + called(name)) for name, value in settings.items()}


def as_option(name: str) -> str:
    return "--" + name.replace("_", "-") if name else ""


def what_became_of(name: str, new: str) -> str:
    """What to tell who gives a name of an earlier version; `new` is empty for one that was removed."""
    return f"{name} is now {new}" if new else f"{name} was removed: delete it"


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, 1, cutoff=0.5)
    return f" (the nearest is {near[0]})" if near else ""


def write(recipe: Recipe, path: Path) -> None:
    """Write all settings as a TOML file that `load` reads back equal."""
    lines = ["# All settings of this run"]
    for part, settings in groupby(SETTINGS, lambda name: SETTINGS[name].part):
        lines += ["", f"# {part}"]
        for name in settings:
            value = getattr(recipe, name)
            if value is not None:  # which TOML cannot express
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")  # else JSON's texts are TOML's
                lines.append(f"{name} = {text}")
    with replacing(path) as partial:
        partial.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))


def changed(old: dict, new: Recipe) -> list[str]:
    """What keeps a run of the settings `old` from resuming with `new`, as "lr 0.0002 → 0.1". A setting that `old` lacks
    had its default value: there was no other when the run began."""
    differences = []
    for name, rules in SETTINGS.items():
        before, now = shown(old.get(name, rules.default)), shown(getattr(new, name))
        if before != now and not rules.free:
            differences.append(f"{name} {before} → {now}")
    return differences
