"""The network and its training loop: sizes from the paper, formulas written out."""

import io
import math

import pytest
import torch
from torch import nn

from dansm import NETWORKS, Attention, BadInput, Diffusion, RectifiedFlow, ResBlock, Training, UNet, train

SMALL = dict(channels=2, size=8, width=8, multipliers=(1, 2), blocks=1, attention_at=(4,), dropout=0.0)
KINDS = pytest.mark.parametrize("biggan", [True, False])


def awake(net):
    """No weight at zero: at its start the network is blind to most of its own weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return net


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [("ncsnpp", 4, 61_806_724), ("ddpm", 4, 35_748_612), ("ddpm", 3, 35_746_307)],
)
def test_the_papers_networks_have_its_number_of_parameters(name, channels, parameters):
    with torch.device("meta"):  # counted, not drawn
        net = UNet(channels, **NETWORKS[name])
    assert sum(weight.numel() for weight in net.parameters()) == parameters


@KINDS
@pytest.mark.parametrize("settings", [SMALL, SMALL | dict(multipliers=(1, 1, 2), blocks=2, attention_at=(8, 2))])
def test_images_come_out_as_they_went_in(biggan, settings):
    net = awake(UNet(**settings, biggan=biggan))
    x = torch.randn(3, 2, 8, 8)
    assert net(x, torch.tensor([0.0, 500.0, 999.0])).shape == x.shape


@KINDS
def test_a_new_network_says_zero(biggan):
    net = UNet(**SMALL, biggan=biggan)
    assert torch.equal(net(torch.randn(2, 2, 8, 8), torch.rand(2)), torch.zeros(2, 2, 8, 8))


@KINDS
def test_every_weight_gets_a_gradient(biggan):
    net = awake(UNet(**SMALL, biggan=biggan))
    net(torch.randn(3, 2, 8, 8), 999 * torch.rand(3)).square().sum().backward()
    for name, weight in net.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


@KINDS
def test_an_image_does_not_see_the_others_of_its_batch(biggan):
    net = awake(UNet(**SMALL, biggan=biggan)).eval()
    x, t = torch.randn(4, 2, 8, 8), torch.tensor([1.0, 200.0, 500.0, 999.0])
    together = net(x, t)
    for i in range(4):
        torch.testing.assert_close(net(x[i : i + 1], t[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-4)


@KINDS
def test_the_network_tells_the_times_apart(biggan):
    net = awake(UNet(**SMALL, biggan=biggan)).eval()
    x = torch.randn(1, 2, 8, 8)
    outputs = torch.cat([net(x, torch.tensor([t])) for t in (0.0, 1.0, 500.0, 999.0)])
    assert torch.pdist(outputs.flatten(1)).min() > 1e-4


@KINDS
def test_its_settings_build_the_same_network(biggan):
    net = awake(UNet(**SMALL | dict(dropout=0.2, biggan=biggan))).eval()
    file = io.BytesIO()
    torch.save({"settings": net.settings, "net": net.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = UNet(**saved["settings"]).eval()
    other.load_state_dict(saved["net"])
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 700.0])
    assert torch.equal(other(x, t), net(x, t))
    assert other.settings == net.settings
    assert [m.p for m in other.modules() if isinstance(m, nn.Dropout)] == [
        m.p for m in net.modules() if isinstance(m, nn.Dropout)
    ]


def test_dropout_acts_in_training_only():
    net = awake(UNet(**SMALL | dict(dropout=0.5)))
    x, t = torch.randn(2, 2, 8, 8), torch.zeros(2)
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize("size", [(8, 12), [12, 8], (4, 4), 8])
@pytest.mark.parametrize("biggan", [False, True])
def test_a_network_takes_height_and_width(size, biggan):
    net = UNet(2, size, width=8, multipliers=(1, 2, 1), blocks=1, attention_at=(6, 2), biggan=biggan)
    sides = [size, size] if isinstance(size, int) else list(size)
    assert net.shape == (2, *sides)
    assert net.settings["size"] == (sides[0] if sides[0] == sides[1] else sides)
    assert net(torch.randn(3, *net.shape), torch.ones(3)).shape == (3, *net.shape)
    assert UNet(**net.settings).shape == net.shape


@pytest.mark.parametrize("size", [(8, 6), (6, 8), (8,), (8, 8, 8), (), (8, 0), (8, 2.5), "88"])
def test_heights_and_widths_that_no_network_has_are_refused(size):
    with pytest.raises(BadInput, match="size is"):
        UNet(2, size, width=8, multipliers=(1, 1, 1))


@pytest.mark.parametrize(("size", "multipliers"), [(30, (1, 2, 2)), (7, (1, 2)), (12, (1, 1, 1, 1))])
def test_a_size_that_cannot_be_halved_often_enough_is_refused(size, multipliers):
    with pytest.raises(BadInput, match=f"size is {size}.*multiples of {2 ** (len(multipliers) - 1)}"):
        UNet(**SMALL | dict(size=size, multipliers=multipliers))


@pytest.mark.parametrize(("name", "value"), [("channels", 0), ("channels", -1), ("multipliers", (0, 1)),
                                             ("multipliers", (1.5,)), ("dropout", 2), ("dropout", -0.1),
                                             ("blocks", 1.5), ("size", "8"), ("width", 8.5)])
def test_sizes_that_no_network_has_are_refused(name, value):
    with pytest.raises(BadInput, match=f"{name} is"):
        UNet(**SMALL | {name: value})


def test_whole_numbers_of_another_type_are_taken():
    settings = SMALL | dict(width=8.0, blocks=torch.tensor(1), multipliers=[1, 2.0])
    assert UNet(**settings).settings["multipliers"] == [1, 2]


@pytest.mark.parametrize("width", [0, 1, 2, 3, 5, 7, 129])
def test_a_width_below_4_or_odd_is_refused(width):
    with pytest.raises(BadInput, match=f"width is {width}"):
        UNet(**SMALL | dict(width=width))


@pytest.mark.parametrize("width", [4, 6, 36, 48, 200])
def test_every_other_width_splits_into_equal_groups(width):
    net = awake(UNet(**SMALL | dict(width=width)))
    assert net(torch.zeros(1, 2, 8, 8), torch.zeros(1)).isfinite().all()
    for layer in net.modules():
        if isinstance(layer, nn.GroupNorm):
            assert layer.num_channels % layer.num_groups == 0
            assert layer.num_groups <= 32 and layer.num_channels >= 4 * layer.num_groups


def test_attention_is_the_softmax_of_scaled_products():
    layer = awake(Attention(8, scale=0.5))
    x = torch.randn(2, 8, 3, 5)
    h = nn.functional.group_norm(x, 2, layer.norm.weight, layer.norm.bias, eps=1e-6)
    weight, bias = layer.qkv.weight[:, :, 0, 0], layer.qkv.bias
    expected = torch.empty_like(x)
    for b in range(2):
        pixels = h[b].reshape(8, 15)
        q, k, v = (weight @ pixels + bias[:, None]).split(8)
        out = torch.zeros(8, 15)
        for i in range(15):
            scores = torch.stack([q[:, i] @ k[:, j] for j in range(15)]) / math.sqrt(8)
            share = scores.exp() / scores.exp().sum()
            out[:, i] = v @ share
        out = layer.out.weight[:, :, 0, 0] @ out + layer.out.bias[:, None]
        expected[b] = (x[b] + out.view(8, 3, 5)) * 0.5
    torch.testing.assert_close(layer(x, None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resample", ["", "up", "down"])
def test_a_residual_block_is_its_formula(resample):
    """Resampled on both branches, after the first norm; the time, through SiLU already, is added between."""
    layer = awake(ResBlock(8, 12, 5, dropout=0.0, scale=0.5, resample=resample))
    x, time = torch.randn(2, 8, 4, 6), torch.randn(2, 5)

    def normed(h, norm):
        return nn.functional.group_norm(h, h.shape[1] // 4, norm.weight, norm.bias, eps=1e-6)

    def resized(h):
        if resample == "up":
            return h[:, :, [0, 0, 1, 1, 2, 2, 3, 3]][:, :, :, [i // 2 for i in range(12)]]
        if resample == "down":
            return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        return h

    def swish(h):
        return h / (1 + (-h).exp())

    h = nn.functional.conv2d(resized(swish(normed(x, layer.norm1))), layer.conv1.weight, layer.conv1.bias, padding=1)
    h = h + (time @ layer.time.weight.T + layer.time.bias)[:, :, None, None]
    h = nn.functional.conv2d(swish(normed(h, layer.norm2)), layer.conv2.weight, layer.conv2.bias, padding=1)
    skip = torch.einsum("oc,bchw->bohw", layer.skip.weight[:, :, 0, 0], resized(x)) + layer.skip.bias[:, None, None]
    torch.testing.assert_close(layer(x, time), (skip + h) * 0.5, rtol=1e-4, atol=1e-4)


@KINDS
def test_every_sum_is_scaled_in_ncsnpp_and_none_in_ddpm(biggan):
    net = UNet(**SMALL, biggan=biggan)
    scales = {layer.scale for layer in net.modules() if isinstance(layer, ResBlock | Attention)}
    assert scales == {math.sqrt(0.5) if biggan else 1.0}


@KINDS
def test_attention_stands_where_the_settings_say_and_in_the_middle(biggan):
    """BigGAN: one for each block down and one a level up; DDPM: one for each block, down and up."""

    def attentions(*sizes):
        net = UNet(**SMALL | dict(blocks=2, attention_at=sizes, biggan=biggan))
        return sum(isinstance(layer, Attention) for layer in net.modules())

    a_level = 2 + (1 if biggan else 3)
    assert attentions() == 1
    assert attentions(4) == attentions(8) == 1 + a_level
    assert attentions(4, 8) == 1 + 2 * a_level


def test_on_the_way_up_ncsnpp_looks_around_after_the_last_block_of_a_level():
    """As Song et al. do: before the image is doubled, not at the level's beginning."""
    net = UNet(**SMALL | dict(blocks=2, attention_at=(4,)))
    assert [any(isinstance(layer, Attention) for layer in chain) for chain in net.up] == [0, 0, 1, 0, 0, 0]


def test_the_time_embedding_spans_wavelengths_from_2_pi_to_20000_pi():
    net = UNet(**SMALL)
    waves = net._waves(torch.tensor([0.0, 37.0]))
    expected = [wave(37 / 10_000 ** (i / 3)) for wave in (math.sin, math.cos) for i in range(4)]
    assert waves[0].tolist() == [0] * 4 + [1] * 4
    assert waves[1].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("flow", [RectifiedFlow(), Diffusion()], ids=["rectified", "diffusion"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_type_can_be_trained_and_sampled(flow, dtype):
    net, x = UNet(**SMALL).to(dtype), torch.randn(2, 2, 8, 8, dtype=dtype)
    flow.loss(net, x, x).backward()
    assert flow.sample(net, x, 2).dtype == dtype


# ------------------------------------------------------------------------------- training


class Line(nn.Module):
    """The smallest network: one matrix, and the time."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x, t):
        return x @ self.weight + self.bias * (t / 999)[:, None]


def endless_pairs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield 2 + 0.1 * torch.randn(32, 3, generator=generator), torch.randn(32, 3, generator=generator)


def take(count, losses):
    return torch.stack([loss for _, loss in zip(range(count), losses, strict=False)])


def test_the_loss_falls():
    run = Training(awake(UNet(**SMALL)), lr=2e-3)
    x = torch.ones(16, 2, 8, 8)
    losses = take(40, train(run, RectifiedFlow(), ((x, torch.randn_like(x)) for _ in range(40))))
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()
    assert run.step == 40 and not losses.requires_grad


def test_the_average_follows_the_formula_with_its_warm_up():
    run = Training(Line(), lr=0.05, decay=0.7)
    average = [weight.detach().clone() for weight in run.net.parameters()]
    for n, _ in zip(range(1, 41), train(run, RectifiedFlow(), endless_pairs()), strict=False):
        decay = min(0.7, (1 + n) / (10 + n))  # reaches 0.7 at n = 20
        for kept, weight, actual in zip(average, run.net.parameters(), run.average.parameters(), strict=True):
            kept.mul_(decay).add_((1 - decay) * weight.detach())
            torch.testing.assert_close(actual, kept)
    assert not any(weight.requires_grad for weight in run.average.parameters())
    assert not run.average.training and run.net.training


def test_training_has_its_dropout_whatever_state_the_network_came_in():
    run = Training(awake(UNet(**SMALL | dict(dropout=0.5))).eval())
    batch = torch.ones(2, 2, 8, 8), torch.zeros(2, 2, 8, 8)
    take(1, train(run, RectifiedFlow(), [batch]))
    assert run.net.training and not run.average.training


def test_a_step_is_adams_on_the_clipped_gradient():
    """Gradients of norm 1 at most, so the first moment is 0.1 × a vector of norm 1."""
    for clip in (1.0, 0.01):
        run = Training(Line(), lr=0.05, clip=clip)
        take(1, train(run, RectifiedFlow(), endless_pairs()))
        moments = [state["exp_avg"] / (1 - 0.9) for state in run.optimizer.state.values()]
        assert torch.cat([m.flatten() for m in moments]).norm().item() == pytest.approx(clip, rel=1e-3)


def test_a_small_gradient_is_not_clipped():
    run, flow = Training(Line()), RectifiedFlow()
    x, z = next(endless_pairs())
    x = z + 1e-3 * x  # the target x − z is tiny, and so is the gradient
    torch.manual_seed(3)
    gradients = torch.autograd.grad(flow.loss(run.net, x, z), list(run.net.parameters()))
    assert sum(g.square().sum() for g in gradients) < 1
    torch.manual_seed(3)
    take(1, train(run, flow, [(x, z)]))
    for g, weight in zip(gradients, run.net.parameters(), strict=True):
        torch.testing.assert_close(run.optimizer.state[weight]["exp_avg"], 0.1 * g)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_labels_of_any_whole_type_are_taken(dtype):
    net, x, t = awake(UNet(**SMALL, classes=3)).eval(), torch.randn(4, 2, 8, 8), torch.rand(4)
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.equal(net(x, t, labels.to(dtype)), net(x, t, labels))
    torch.testing.assert_close(net(x, t, labels)[3:], net(x[3:], t[3:]))  # 3 is "none"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("labels", "said"), [
    (torch.tensor([0, 1, 4]), "from 0 to 4"), (torch.tensor([0, -1, 2]), "from -1 to 2"), (torch.zeros(3), "float32"),
    (torch.tensor([0, 1]), r"\(2,\)"), ([0, 1, 2], "list")])
def test_labels_that_the_network_does_not_know_are_refused(labels, said, training):
    net = UNet(**SMALL, classes=3).train(training)
    with pytest.raises(BadInput, match=rf"the labels are .*{said}.*expected a tensor \(3,\) of whole numbers from 0"):
        net(torch.zeros(3, 2, 8, 8), torch.zeros(3), labels)


def test_labels_for_a_network_without_classes_and_the_reverse_are_refused():
    x, z = torch.randn(2, 4, 2, 8, 8)
    with pytest.raises(BadInput, match="the network has no classes: expected"):
        next(train(Training(UNet(**SMALL)), RectifiedFlow(), [(x, z, torch.zeros(4, dtype=torch.int64))]))
    with pytest.raises(BadInput, match="the labels are missing: expected a tensor"):
        next(train(Training(UNet(**SMALL, classes=3)), RectifiedFlow(), [(x, z)]))


def test_adam_has_the_settings_of_the_paper():
    (group,) = Training(Line(), lr=1e-4).optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.9, 0.999), 1e-8, 0)


def test_training_takes_no_pair_more_than_it_was_asked_for():
    taken = []
    source = (taken.append(i) or (torch.randn(2, 3), torch.randn(2, 3)) for i in range(9))
    losses = train(Training(Line()), RectifiedFlow(), source)
    next(losses), next(losses)
    assert taken == [0, 1]
