"""dansm proof: does matching pay?"""

from pathlib import Path
from typing import Annotated

import typer

from dansm import check_choice

from ..base.files import make_folder
from ..base.machine import pick_device
from .options import Device, InceptionWeights, command_app

app = command_app()


@app.command()
def proof(
    data: Annotated[str, typer.Option(help="images, as for dansm train")] = "cifar10",
    only: Annotated[str | None, typer.Option(
        help="comma-separated run names, prior (tests the noises) or rates (times each run, with nothing else on the "
             "device); an unknown name prints the list", show_default="all but rates")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="end this call after so many; 0: when all is done")] = 0.0,
    work: Annotated[Path | None, typer.Option(help="folder of the runs", show_default="runs in --out")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps the decoded images")] = None,
    features: Annotated[str, typer.Option(help="inception makes the distances standard FIDs")] = "efficientnet-lite0",
    inception_weights: InceptionWeights = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="folder of the tables, which are added to, and the figures")] = (
        Path("runs/proof")),
) -> None:
    """Does matching pay? Equal runs, paired in many ways; adds what is missing to the tables in --out."""
    from ..studies.proof import Call, prove
    from ..studies.proof_runs import RUNS

    names = [*RUNS, "prior"] if only is None else only.split(",")
    for name in names:
        check_choice("--only", name, [*RUNS, "prior", "rates"])
    settings = {"evaluate_features": features, "inception_weights": str(inception_weights or ""),
                "cache": str(cache or "")}
    prove(Call(data, make_folder(out), work or out / "runs", pick_device(device), settings), names, minutes)
