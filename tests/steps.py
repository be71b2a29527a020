"""Runs of one step each, in the process of a test or in another. It stands apart, as a new process imports it."""

import copy
from unittest import mock

import torch
import torch.distributed as group
from support import CPU, TINY

import dansm
from dansm.scale.model.recipe import Recipe
from dansm.scale.train import exchange, step
from dansm.scale.train.step import FastTraining

STEADY = TINY | dict(dropout=0.0)


def started(net, **settings):
    """A run by a recipe of those settings, at its beginning."""
    return FastTraining(copy.deepcopy(net), Recipe("images", **{"batch": 8, "lr": 0.01, **settings}), CPU)


def through_copies(net, **settings):
    """A run that trains through copies of its weights, as on a GPU, but without kernels and CUDA graph."""
    with mock.patch.object(step, "fused", lambda net: True):
        run = started(net, **settings)
    run.compiled = False
    return run


def network(**settings):
    return dansm.UNet(channels=1, size=8, **settings)


def batches(count):
    """Pairs (x, z) of eight samples each, one for a step."""
    return [tuple(pair) for pair in torch.randn(count, 2, 8, 1, 8, 8)]


def gradients_of_one(rank, folder, name, settings):
    """The loss and the gradients of a batch; or of the half that is one of two processes' part, and saved."""
    torch.set_num_threads(1)
    exchange.BYTES = 2**10  # several are sent
    if rank is not None:
        group.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = network(**STEADY | dict(attention_at=(8,)), classes=3, label_dropout=0.0)
    for weight in net.parameters():  # the last layers are zeros, and most gradients with them
        torch.nn.init.uniform_(weight, -0.2, 0.2)
    run = through_copies(net, **settings)
    x, z = batches(1)[0]
    labels = torch.tensor([0, 0, 1, 2, 1, 1, 2, 0])
    half = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    torch.manual_seed(1)
    loss = run._backward(SteadyFlow(), x[half], z[half], labels[half])
    gradients = run._gradients() if run.one_pass else [weight.grad for weight in run.net.parameters()]
    saved = [loss, *(gradient.float().contiguous() for gradient in gradients)]
    if rank is not None:
        torch.save(saved, f"{folder}/{name}-{rank}.pt")
        group.barrier()  # gloo aborts a process at times whose group ends while another is at work
        group.destroy_process_group()
    return saved


def weights_at_the_start(rank, folder):
    """Begin one of two runs, each with weights of its own, and save what they are then."""
    torch.set_num_threads(1)
    group.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(rank)
    net = network(**STEADY)
    net.register_buffer("count", torch.tensor(rank))
    if rank:
        net = net.to(memory_format=torch.channels_last)
    before = copy.deepcopy(net.state_dict())
    run = started(net, ema_decay=[0.9, 0.3])
    torch.save([before, *(net.state_dict() for net in (run.net, *run.averages))], f"{folder}/{rank}.pt")
    group.barrier()
    group.destroy_process_group()


class SteadyFlow(dansm.RectifiedFlow):
    """The same time for all samples, so that parts of a batch have what the whole has."""

    def loss(self, net, x, z):
        t = torch.full((len(x),), 0.4)
        v = net(torch.lerp(z, x, 0.4), 999 * t)
        return (v - (x - z)).square().mean()
