"""Networks that do something without training, and what a training would save of them."""

import torch

import dansm

SMALL = dict(channels=2, size=8, width=8, multipliers=(1, 2), blocks=1, attention_at=(4,), dropout=0.0)
SMALLEST = dict(channels=1, size=4, width=4, multipliers=(1,), blocks=1, attention_at=(), dropout=0.0)


def awake(net):
    """No weight at zero: at its start the network is blind to most of its own weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return net


def state_to_save(net=None, *, step=7, decays=(0.9999,), recipe=None, **parts):
    """The state of a run of this network (by default the smallest one): average number i has its weights plus i."""
    net = net or awake(dansm.UNet(**SMALLEST))
    run = dansm.Training(net)
    averages = [{"decay": decay, "weights": {name: weight + i for name, weight in net.state_dict().items()}}
                for i, decay in enumerate(decays)]
    pool = dansm.NoisePool(5, net.shape, seed=0)
    pool(torch.randn(3, *net.shape))
    recipe = {"data": "digits", "flow": "rectified", "times": "uniform", "target": "noise"} | (recipe or {})
    training = {"net": net.state_dict(), "optimizer": run.optimizer.state_dict(), "step": step, "averages": averages}
    ranks = [{"pool": pool.state_dict(), "random": {"cpu": torch.get_rng_state()}}]
    return {"network": net.settings, "recipe": recipe, "data": "digits", "images": 24, "latents": None,
            "training": training, "ranks": ranks} | parts
