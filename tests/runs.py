"""What tests of training runs share."""

import itertools
import math
import os

import pytest
import torch
from models import awake
from support import files_of, log_of, same, state_of

import dansm
from dansm.scale.data import read
from dansm.scale.evaluate import measures
from dansm.scale.train import evaluation
from dansm.scale.train import run as training
from dansm.scale.train.watch import Watch


def at_step(number, act, monkeypatch):
    """Let `act` have the loss of the step of that number in this call, and return what it makes of it."""
    loss, calls = dansm.RectifiedFlow.loss, itertools.count(1)

    def acting(*arguments):
        value = loss(*arguments)
        return act(value) if next(calls) == number else value

    monkeypatch.setattr(dansm.RectifiedFlow, "loss", acting)


def same_run(one, other):
    """Whether two folders hold the same run to the last bit, all but its seconds: newest checkpoint and log."""
    states = [{**state_of(out), "seconds": 0} for out in (one, other)]
    return same(*states) and losses_of(one) == losses_of(other)


def losses_of(out):
    """What a log tells of the training, without the times."""
    names = "step", "images", "loss", "loss_mean", "distance", "distance_random"
    return [[line[name] for name in names] for line in log_of(out) if "loss" in line]


def contents_of(folder):
    return {name: (folder / name).read_bytes() for name in files_of(folder) if (folder / name).is_file()}


def wake_networks(monkeypatch):
    """Let networks depend on their labels from the first step on."""
    begin = dansm.UNet.__init__

    def begin_awake(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        awake(self)

    monkeypatch.setattr(dansm.UNet, "__init__", begin_awake)


# ------------------------------------------------------------------------------- hooks of `in_processes`


def keep_pairs(rank, folder):
    """Write what each process trains on, and the averaged network that it ends with, to `folder`."""
    pairs, fit = Watch.pairs, training.fit

    def kept(self, *arguments):
        for number, pair in enumerate(pairs(self, *arguments)):
            torch.save(pair, folder / f"pair-{number}-{rank}.pt")
            yield pair

    def fitted(*arguments, **settings):
        summary, net, flow = fit(*arguments, **settings)
        torch.save(net.state_dict(), folder / f"average-{rank}.pt")
        return summary, net, flow

    Watch.pairs, training.fit = kept, fitted


def nan_in_the_second_process(rank, folder):
    if rank == 1:
        at_step(7, lambda loss: loss * math.nan, pytest.MonkeyPatch())


def count_decoded(rank, folder):
    """Leave a file for each image that this process decodes."""
    read_image = read.read_image

    def counted(path, *arguments):
        (folder / f"decoded-{rank}-{path.name}").touch()
        return read_image(path, *arguments)

    read.read_image = counted


def restarted_on_the_second_node(rank, folder):
    os.environ |= {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": str(rank)}


def awake_with_own_cache(rank, folder):
    evaluation.CACHE = folder / "cache"
    measures.SUBSETS = 3
    wake_networks(pytest.MonkeyPatch())
