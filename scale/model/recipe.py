"""What a training run is made of: settings that are checked, read from TOML files, and written beside the run."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

import dansm
from dansm import BadInput

from ..base.files import replacing

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

RECIPES = Path(__file__).with_name("recipes")


def setting(part: str, text: str, default: Any = dataclasses.MISSING, *, least: float | None = None,
            most: float | None = None, even: bool = False, choices=(), empty: bool = False, free: bool = False):
    """A field of `Recipe`: the heading it stands under, what it is for, and what it may be.

    least, most  of a number, or of each number of several       even   only even numbers
    choices      the words that it may be                        empty  several numbers may be none at all
    free         may be another one when a run goes on
    """
    return dataclasses.field(default=default, metadata=dict(
        part=part, text=text, least=least, most=most, even=even, choices=tuple(choices), empty=empty, free=free))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of a training run, checked. BadInput for a value of the wrong kind or range; a list is taken for a
    tuple and a whole number for a fraction."""

    data: str = setting("Data", "cifar10, or the path of a folder or an archive of images, an lmdb, or latents")
    size: int = setting("Data", "make images squares of so many pixels; 0: as is", 0, least=0, most=4096)
    flip: bool | None = setting("Data", "mirror half of them, anew each epoch [images yes, latents no]", None)
    skip_unreadable: bool = setting("Data", "leave out images that cannot be read", False)
    cache: str = setting("Data", "folder that keeps the decoded images; several processes share them in any case, in "
                         "~/.cache/dansm/images if none is named", "", free=True)
    data_on_gpu: str = setting("Data", "keep the data in the GPU's memory; auto: where it takes half of it at most",
                            "auto", choices=("auto", "yes", "no"), free=True)

    network: str = setting("Network", "ncsnpp and ddpm are the paper's", "ncsnpp", choices=dansm.NETWORKS)
    width: int | None = setting("Network", "channels at the first level", None, least=4, even=True)
    multipliers: tuple[int, ...] | None = setting("Network", "of the width, one a level", None, least=1)
    blocks: int | None = setting("Network", "residual blocks a level", None, least=1)
    attention_at: tuple[int, ...] | None = setting("Network", "sizes at which there is attention", None, least=1,
                                                   empty=True)
    dropout: float | None = setting("Network", "share of activations dropped", None, least=0, most=1)

    flow: str = setting("Flow and matching", "what the network learns", "rectified", choices=dansm.FLOWS)
    times: str = setting("Flow and matching", "how the times t to train at are distributed", "uniform",
                         choices=dansm.TIMES)
    target: str = setting("Flow and matching", "what a diffusion's network predicts", "noise",
                          choices=dansm.TARGETS)
    method: str = setting("Flow and matching", "how noises are paired with samples, greedy from a pool as in the paper",
                          "greedy", choices=dansm.METHODS)
    match_size: int = setting("Flow and matching", "greedy: noises in the pool, 0 or 1 is vanilla training; "
                              "optimal: samples assigned at once; nearest: noises drawn for each", 10_000, least=0)
    cost: str = setting("Flow and matching", "what near means: squared distance, as in the paper, or −⟨x, z⟩",
                        "squared", choices=dansm.COSTS)
    match_scope: str = setting("Flow and matching", "a pool for each process, or one over all", "rank",
                               choices=("rank", "global"))
    tf32: bool = setting("Flow and matching", "match in tf32 on a GPU: quicker, as good in the mean", False)
    pool_dtype: str = setting("Flow and matching", "number type of the pool's noises; bf16 takes half the memory",
                              "fp32", choices=("fp32", "bf16"))

    batch: int = setting("Steps", "samples a step, over all processes together", 128, least=1)
    accumulate: int = setting("Steps", "parts a process cuts its share of the batch into", 1, least=1)
    lr: float = setting("Steps", "learning rate of Adam", 2e-4, least=1e-9, most=1e30)
    warmup: int = setting("Steps", "steps over which the learning rate rises", 0, least=0)
    clip: float = setting("Steps", "largest norm of the gradient", 1.0, least=1e-9, most=1e30)
    ema_decay: tuple[float, ...] = setting("Steps", "of each moving average; the first is sampled from", (0.9999,),
                                       least=0, most=1)
    precision: str = setting("Steps", "auto: bf16, on older GPUs fp16, on the CPU fp32", "auto",
                             choices=("auto", "bf16", "fp16", "fp32"))
    compile: bool = setting("Steps", "on a GPU, compile kernels: begins later, then faster", True, free=True)
    deterministic: bool = setting("Steps", "same result to the last bit, slower", False)

    steps: int = setting("Run", "training steps in all", 100_000, least=1, free=True)
    minutes: float = setting("Run", "stop this call after so many; 0: no limit", 0.0, least=0, free=True)
    save_minutes: float = setting("Run", "minutes between two checkpoints", 5.0, least=0, free=True)
    keep: int = setting("Run", "checkpoints kept", 3, least=1, free=True)
    log_steps: int = setting("Run", "steps between two lines of the log", 50, least=1, free=True)
    sample_steps: int = setting("Run", "steps from noise to image for the grids of samples", 20, least=1, free=True)
    seed: int = setting("Run", "same seed, same result on the same machine", 0, least=0, most=2**32 - 1)

    evaluate_every: int = setting("Evaluation", "training steps between two evaluations; 0: none; of "
                                  "latents none, they are judged afterwards: dansm evaluate --autoencoder", 0, least=0,
                                  free=True)
    evaluate_at: tuple[int, ...] = setting("Evaluation", "training steps after which to evaluate besides", (), least=1,
                                           empty=True, free=True)
    evaluate_steps: tuple[int, ...] = setting("Evaluation", "counts of steps from noise to image, a row each",
                                              (3, 5, 10), least=1, most=10_000, free=True)
    evaluate_count: int = setting("Evaluation", "images drawn for each row", 10_000, least=2, free=True)
    evaluate_measures: str = setting("Evaluation", "all, or the Fréchet distance alone, which is quicker", "all",
                                     choices=("all", "distance"), free=True)
    evaluate_features: str = setting("Evaluation", "inception, or another network as module:callable", "inception",
                                     free=True)
    inception_weights: str = setting("Evaluation", "file of its weights, where nothing can be downloaded", "",
                                     free=True)

    def __post_init__(self):
        for name in SETTINGS:
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        if self.accumulate > self.batch:
            raise BadInput(f"accumulate is {self.accumulate}: expected at most {self.batch}, the batch that it cuts")
        if self.target != "noise" and self.flow != "diffusion":
            raise BadInput(f"--target is {self.target}, with --flow {self.flow}: expected --flow diffusion; others say "
                           "velocities anyway")

    def network_settings(self, channels: int, size: int) -> dict:
        """What `dansm.UNet` takes for images (channels, size, size)."""
        own = {name: getattr(self, name) for name in ("width", "multipliers", "blocks", "attention_at", "dropout")}
        own = {name: value for name, value in own.items() if value is not None}
        return dict(channels=channels, size=size) | dansm.NETWORKS[self.network] | own

    def check_attention(self, net: dansm.UNet) -> None:
        """BadInput for attention at a size that no level of the network has, which would say nothing."""
        levels = [net.settings["size"] >> level for level in range(len(net.settings["multipliers"]))]
        if strange := set(self.attention_at or ()) - set(levels):
            raise BadInput(f"--attention-at has {min(strange)}: expected sizes that a level of the network has, of "
                           f"{', '.join(map(str, levels))}")


def make_flow(recipe: dict, pictures: bool, solver: str = "euler"):
    """The flow of a recipe for pictures or for latents; a diffusion of pixels knows that they are bounded."""
    if recipe["flow"] == "diffusion":
        target = recipe.get("target", "noise")  # older recipes have none
        return dansm.Diffusion(recipe["times"], target, bound=1.0 if pictures else None)
    return dansm.FLOWS[recipe["flow"]](recipe["times"], solver)


SETTINGS = {field.name: field for field in dataclasses.fields(Recipe)}
RENAMED = {"pool": "pool_dtype", "fast": "tf32", "decay": "ema_decay", "resident": "data_on_gpu"}
REMOVED = {"ages": "on CIFAR-10 pools side by side were level with one pool at four times the memory"}


def with_new_names(settings: dict) -> dict:
    """The settings of an earlier version's run by the names they have now."""
    return {RENAMED.get(name, name): value for name, value in settings.items()}


class Kind(NamedTuple):
    """Of a setting's value: bool, int, float or str; several of it; or none at all, where the network says it."""

    type: type
    several: bool
    optional: bool


@cache
def kind_of(name: str) -> Kind:
    wanted = get_type_hints(Recipe)[name]
    optional = NoneType in get_args(wanted)
    wanted = get_args(wanted)[0] if optional else wanted
    several = bool(get_args(wanted))
    return Kind(get_args(wanted)[0] if several else wanted, several, optional)


def checked(name: str, value, called: str | None = None):
    """`value` as the setting `name` keeps it. Raises BadInput if it cannot be that; `called` is what that names."""
    kind, rules = kind_of(name), SETTINGS[name].metadata
    if value is None and kind.optional:
        return None
    if kind.several and isinstance(value, list | tuple):
        values = [_checked_one(kind.type, rules, one) for one in value]
        if None not in values and (values or rules["empty"]):
            return tuple(values)
    elif not kind.several and (one := _checked_one(kind.type, rules, value)) is not None:
        return one
    raise BadInput(f"{called or name} is {_shown(value)}: expected {_expected(kind, rules)}")


def _checked_one(wanted, rules, value):
    """`value` as the type wanted, or None if it is not of that type or out of its range."""
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        return None
    if wanted is str:
        return value if value in (rules["choices"] or [value]) else None
    if wanted is bool:
        return value
    low, high = -math.inf if rules["least"] is None else rules["least"], rules["most"] or math.inf
    within = low <= value <= high and value not in (math.inf, -math.inf)
    return value if within and not (rules["even"] and value % 2) else None


def _expected(kind, rules) -> str:
    """The values that a setting may have, in words."""
    if rules["choices"]:
        return f"one of {', '.join(rules['choices'])}"
    words = {str: "a text", bool: "true or false", float: "a number",
             int: "an even whole number" if rules["even"] else "a whole number"}[kind.type]
    if rules["least"] is not None:
        words += f" of at least {rules['least']}" if rules["most"] is None else (
            f" from {rules['least']} to {rules['most']}")
    return f"one or more, each {words}" if kind.several else words


def parse_counts(option: str, text: str, at_least: int = 1, at_most: int = 2**63 - 1) -> list[int]:
    """3,5,10 → [3, 5, 10], each once, in their order: of an option that is no setting."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and at_least <= int(part) <= at_most for part in parts):
        within = f"of at least {at_least}" if at_most >= 2**63 - 1 else f"from {at_least} to {at_most:,}"
        raise BadInput(f"{option} is {text!r}: expected whole numbers {within}, parted by commas, as in 10,50")
    return list(dict.fromkeys(map(int, parts)))


def shown(value) -> str:
    """A value as it is given on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _shown(value) -> str:
    text = repr(value) if isinstance(value, str) else shown(value) or "empty"
    return text if len(text) < 80 else text[:80] + " …"


def names() -> dict[str, str]:
    """The recipes that come with DANSM: name → the first line of the file, which says what it is."""
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            for path in sorted(RECIPES.glob("*.toml"), key=lambda path: path.stem)}


def load(source: str, overrides: dict[str, object] | None = None) -> Recipe:
    """A recipe by its name, from a TOML file, or the default settings for data.

    source     the name of one that comes with DANSM (see `names`), the path of a .toml, or the data itself. A folder
               that is called like a recipe is meant by ./name
    overrides  settings that are put in the place of those
    Raises BadInput for a file that is missing or no TOML, an unknown setting (with the nearest known), a value of the
    wrong kind or range, and for a source that is neither a recipe nor there.
    """
    overrides = {_known(name, "--" + name): checked(name, value, "--" + name.replace("_", "-"))
                 for name, value in (overrides or {}).items()}
    if (settings := _settings_of(source)) is None:
        if source and not Path(source).exists():
            raise BadInput(f"{source} does not exist{_nearest(source, names())}: expected a recipe "
                           f"({', '.join(names())}), a .toml file of your own, or data: a folder of images")
        if overrides.get("data", source) != source:
            raise BadInput(f"--data is {overrides['data']}, and {source} is data too: expected one of them, or a "
                           "recipe")
        settings = {"data": source}
    settings |= overrides
    if "data" not in settings:
        raise BadInput(f"{source} does not say what data to train on: expected a line data = \"…\", or --data")
    return Recipe(**settings)


def _settings_of(source) -> dict | None:
    """The settings that a file gives, or None if `source` names no recipe."""
    if source in names():
        return read(RECIPES / f"{source}.toml")
    return read(Path(source)) if Path(source).suffix == ".toml" else None


def read(path: Path) -> dict:
    """The settings that a TOML file gives, checked; the others are not in it."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")  # paths may be of any bytes
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason = str(error).replace("at end of document", f"at line {text.count(chr(10)) + 1}, the end")
        raise BadInput(f"{path} is not TOML: {reason}; expected lines like lr = 0.0002") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}): expected a recipe, a .toml file") from error
    for name, value in settings.items():
        if isinstance(value, dict):
            raise BadInput(f"{path}: {name} is a table: expected settings without tables, lines like lr = 0.0002")
    return {_known(name, f"{path}: {name}"): checked(name, value, f"{path}: {name}")
            for name, value in settings.items()}


def _known(name, called) -> str:
    if name not in SETTINGS:
        near = _nearest(name, SETTINGS)
        raise BadInput(f"{called} is not a setting{near}: expected one that dansm train --help lists")
    return name


def _nearest(name, known) -> str:
    near = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.5)
    return f" (the nearest is {near[0]})" if near else ""


def write(recipe: Recipe, path: Path) -> None:
    """All settings as a TOML file that `load` reads back equal, put in place whole."""
    lines, part = [], None
    for name, field in SETTINGS.items():
        if field.metadata["part"] != part:
            part = field.metadata["part"]
            lines += ["", f"# {part}"]
        value = getattr(recipe, name)
        if value is not None:  # TOML has no word for it
            lines.append(f"{name} = {_toml(value)}")
    with replacing(path) as beside:
        beside.write_bytes("\n".join(["# All settings of this run", *lines, ""]).encode("utf-8", "surrogateescape"))


def _toml(value) -> str:
    """JSON's words are TOML's too, but for one character that TOML wants escaped."""
    return re.sub("\x7f", r"\\u007f", json.dumps(value, ensure_ascii=False))


def changed(old: dict, new: Recipe) -> list[str]:
    """What keeps a run of the settings `old` from going on with `new`, as "lr 0.0002 → 0.1".

    A setting that `old` lacks had its default value: there was no other when the run began.
    """
    differences = []
    for name, field in SETTINGS.items():
        if field.metadata["free"] or (name == "data" and name not in old):
            continue
        before, now = old.get(name, field.default), getattr(new, name)
        before = tuple(before) if isinstance(before, list) else before
        if before != now:
            differences.append(f"{name} {shown(before)} → {shown(now)}")
    return differences
