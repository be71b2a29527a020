"""The layers' kernels, in Triton's interpreter where there is no GPU: the numbers of plain torch, gradients and all."""

import copy
import math
import pickle
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from models import SMALL, awake

import dansm

pytest.importorskip("triton")
import triton
import triton.language as tl

from dansm.scale.model import fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
KINDS = pytest.mark.parametrize("biggan", [True, False])

# Relative to the number, and to the largest of all. The interpreter does not round to 16 bits but cuts off; on a GPU
# they go through a sigmoid of 11 bits.
ERROR = {
    torch.float32: (0, 1e-5),
    torch.float64: (0, 1e-5),
    torch.bfloat16: (2**-8, 2e-3) if ON_GPU else (2**-7, 1e-5),
}

LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels first": lambda x: x.contiguous(),
    "the first of a torch.cat": lambda x: _wider(x, [x, x.new_ones(len(x), 5, *x.shape[2:])])[:, : x.shape[1]],
    "the last of a torch.cat": lambda x: _wider(x, [x.new_ones(len(x), 3, *x.shape[2:]), x])[:, 3:],
    "a part of each image": lambda x: F.pad(x, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "every second image": lambda x: torch.stack([x, x.neg()], 1).flatten(0, 1)[::2],
    "the same for all pixels": lambda x: x[:, :, :1, :1].expand(x.shape),
    "one number": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


def _wider(x, parts):
    return torch.cat(parts, 1).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def many_rows(monkeypatch):
    """Images of more pixels than one program takes at once."""
    monkeypatch.setattr(fused, "TILE", 32)


def numbers(*shape, dtype=torch.float32, layout="channels last"):
    x = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    return LAYOUTS[layout](x) if len(shape) == 4 else x


def gradients(f, inputs, wanted):
    """Outputs of f, and the gradients of its inputs where those of its outputs are `wanted`; None: it is not used."""
    inputs = [x if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = f(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used, given = zip(*((y, dy) for y, dy in zip(outputs, wanted, strict=True) if dy is not None), strict=True)
    asked = [x for x in inputs if x is not None]
    found = torch.autograd.grad(used, asked, given, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(asked, found, strict=True))]


def check_against_plain(f, plain, inputs, wanted, dtype=torch.float32):
    """Numbers of dtype against the formula in float64 on the same numbers."""
    double = [x if x is None else x.detach().double() for x in inputs]
    expected = gradients(plain, double, [dy if dy is None else dy.double() for dy in wanted])
    for i, (actual, exact) in enumerate(zip(gradients(f, inputs, wanted), expected, strict=True)):
        assert actual.shape == exact.shape
        allowed = ERROR[actual.dtype][0] * exact.abs() + ERROR[dtype][1] * max(1.0, exact.abs().max().item())
        excess = ((actual.double() - exact).abs() - allowed).max().item()
        assert excess <= 0, f"number {i} of the outputs and gradients is wrong by {excess} more than allowed"


def norm(groups, silu=True, seeds=None, drop=0):
    return lambda x, shift, w, b: fused._Norm.apply(x, shift, w.expand(len(x), -1), b.expand(len(x), -1), seeds, groups,
                                                    1e-6, silu, drop)


def plain_norm(groups, silu=True, mask=1.0):
    def f(x, shift, w, b):
        h = F.group_norm(x if shift is None else x + shift[:, :, None, None], groups, w, b, eps=1e-6)
        return (F.silu(h) if silu else h) * mask, x.view_as(x)

    return f


def inputs_of_norm(n, channels, height, width, dtype=torch.float32, layout="channels last", shift=True):
    x = numbers(n, channels, height, width, dtype=dtype, layout=layout)
    return [x, 2 * numbers(n, channels, dtype=dtype) if shift else None, 1 + numbers(channels), numbers(channels)]


SIZES = [
    (2, 12, 3, 4, 4),  # images, channels, groups, height, width
    (1, 20, 5, 3, 7),
    (3, 24, 2, 5, 2),  # groups of 12, as 384 channels have
    (2, 36, 9, 5, 3),
    (1, 72, 6, 3, 3),  # more than the columns of a program
    (2, 14, 2, 1, 3),
    (2, 8, 2, 1, 1),
    (2, 1, 1, 5, 3),
    (1, 3, 3, 2, 1),
]
SIZES_AND_TYPES = list(zip(SIZES, cycle([torch.float32, torch.bfloat16]), strict=False))


# ------------------------------------------------------------------------------- norm


@pytest.mark.parametrize(("size", "dtype"), SIZES_AND_TYPES)
def test_the_norm_is_its_formula(size, dtype):
    check_norm(*size, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_norm_of_images_of_many_rows_is_its_formula(size, many_rows):
    check_norm(*size, torch.float32)


@pytest.mark.parametrize("pixels, channels, group, used", [
    (1024, 128, 4, 16), (256, 256, 8, 32), (256, 384, 12, 60), (64, 512, 16, 32), (64, 20, 20, 20), (16, 256, 8, 64)])
def test_a_program_of_the_norm_leaves_few_channels_idle(pixels, channels, group, used):
    rows, columns, taken = fused._tile_of(pixels, channels, group)
    assert taken == used and taken % group == 0 and rows * columns <= fused.TILE


def check_norm(n, channels, groups, height, width, dtype):
    inputs = inputs_of_norm(n, channels, height, width, dtype)
    wanted = numbers(n, channels, height, width, dtype=dtype), numbers(n, channels, height, width, dtype=dtype)
    check_against_plain(norm(groups), plain_norm(groups), inputs, wanted, dtype)


@pytest.mark.parametrize(("tile", "silu", "shift", "used"), [
    ("whole", True, True, "norm"), ("whole", True, False, "around"), ("whole", False, True, "both"),
    ("whole", False, False, "norm"), ("many rows", True, True, "both"), ("many rows", True, False, "norm"),
    ("many rows", False, True, "around"), ("many rows", False, False, "both")])
def test_the_norm_with_and_without_each_part(tile, silu, shift, used, request):
    if tile == "many rows":
        request.getfixturevalue("many_rows")
    inputs = inputs_of_norm(2, 12, 3, 5, shift=shift)
    wanted = [numbers(2, 12, 3, 5) if used in ("both", way) else None for way in ("norm", "around")]
    check_against_plain(norm(3, silu), plain_norm(3, silu), inputs, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_norm_takes_any_layout(layout):
    flat = layout in ("the same for all pixels", "one number")  # nothing to normalise there
    for shape in ((2, 12, 2, 3), (2, 4, 1, 1), (3, 1, 2, 3)):
        inputs = inputs_of_norm(*shape, layout="channels last" if flat else layout)
        wanted = numbers(*shape, layout=layout), numbers(*shape, layout=layout)
        groups = max(1, shape[1] // 4)
        check_against_plain(norm(groups), plain_norm(groups), inputs, wanted)


def test_the_norm_takes_a_part_of_wider_shifts():
    inputs = inputs_of_norm(3, 8, 2, 3)
    for wide in (numbers(3, 20)[:, 5:13], numbers(8, 3).T, numbers(1, 8).expand(3, 8)):
        inputs[1] = wide
        check_against_plain(norm(2), plain_norm(2), inputs, [numbers(3, 8, 2, 3), None])


def test_an_image_of_more_pixels_than_any_program_takes():
    inputs = inputs_of_norm(1, 4, 35, 31, shift=True)
    check_against_plain(norm(1), plain_norm(1), inputs, [numbers(1, 4, 35, 31), numbers(1, 4, 35, 31)])


def test_numbers_far_from_zero_are_normalised_as_well():
    inputs = inputs_of_norm(2, 8, 4, 4)
    inputs[0] += 100
    inputs[1] -= 70
    expected = plain_norm(2)(*(x.double() for x in inputs))[0]
    torch.testing.assert_close(norm(2)(*inputs)[0].double(), expected, rtol=1e-3, atol=1e-4)


def test_the_numbers_of_a_float64_network_are_taken_with_the_precision_of_float32():
    inputs = [x.double() for x in inputs_of_norm(2, 8, 2, 3)]
    check_against_plain(norm(2), plain_norm(2), inputs, [numbers(2, 8, 2, 3).double()] * 2)
    a, b, bias = numbers(2, 8, 2, 3).double(), numbers(2, 8, 2, 3).double(), numbers(8).double()
    check_against_plain(scaled_sum, plain_sum, [a, b, bias], [a])


@pytest.mark.skipif(ON_GPU, reason="there programs run in any order")
def test_no_program_writes_what_is_anothers(monkeypatch):
    """The interpreter runs them from the first on; here from the last on, so that what one writes too much stays."""
    from triton.runtime import interpreter

    def backwards(*ends):
        return reversed(range(*ends))

    inputs, wanted = inputs_of_norm(2, 72, 2, 3), [numbers(2, 72, 2, 3)] * 2
    expected = gradients(norm(6), inputs, wanted)
    monkeypatch.setattr(interpreter, "range", backwards, raising=False)
    for actual, exact in zip(gradients(norm(6), inputs, wanted), expected, strict=True):
        assert torch.equal(actual, exact)


@pytest.mark.skipif(not ON_GPU, reason="too slow in the interpreter")
def test_more_images_than_a_grid_is_high():
    inputs = inputs_of_norm(2**16 + 3, 4, 1, 2)
    check_against_plain(norm(1), plain_norm(1), inputs, [numbers(2**16 + 3, 4, 1, 2), None])


@pytest.mark.parametrize("frozen", ["x", "weights", "shift"])
def test_gradients_that_nobody_asks_for_take_nothing_from_the_others(frozen):
    inputs, asked = inputs_of_norm(2, 8, 2, 3), {"x": [1, 2, 3], "weights": [0, 1], "shift": [0, 2, 3]}[frozen]
    found = []
    for f, dtype in ((norm(2), torch.float32), (plain_norm(2), torch.float64)):
        given = [x.to(dtype).detach().requires_grad_(i in asked) for i, x in enumerate(inputs)]
        found.append(torch.autograd.grad(f(*given)[0].square().sum(), [given[i] for i in asked]))
    for actual, exact in zip(*found, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- sums, halving, doubling


def scaled_sum(a, b, bias):
    return fused._Sum.apply(a, b, bias.expand(fused.PROGRAMS, -1), 0.7, None)[0]


def plain_sum(a, b, bias):
    return (a + b + bias[:, None, None]) * 0.7


@pytest.mark.parametrize(("size", "dtype"), SIZES_AND_TYPES)
def test_the_sum_is_its_formula(size, dtype):
    n, channels, _, height, width = size
    a, b, dy = (numbers(n, channels, height, width, dtype=dtype) for _ in range(3))
    check_against_plain(scaled_sum, plain_sum, [a, b, numbers(channels)], [dy], dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_takes_any_layout(layout):
    for shape in ((2, 12, 3, 5), (2, 4, 1, 1), (3, 1, 2, 3), (1, 4, 5, 1), (2, 5, 1, 3)):
        a, b, dy = numbers(*shape, layout=layout), numbers(*shape), numbers(*shape, layout=layout)
        check_against_plain(scaled_sum, plain_sum, [a, b, numbers(shape[1])], [dy])
        check_against_plain(scaled_sum, plain_sum, [b, a, numbers(shape[1])], [dy])


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_the_sum_of_more_pixels_than_its_programs_take_at_once(monkeypatch, programs):
    """Of 1,500 channels a program takes four pixels at a time: nine times here."""
    monkeypatch.setattr(fused, "PROGRAMS", programs)
    a, b, dy = (numbers(3, 1500, 3, 4) for _ in range(3))
    check_against_plain(scaled_sum, plain_sum, [a, b, numbers(1500)], [dy])


def sum_twice(scale, place=None):
    return lambda a, b, bias: fused._Sum.apply(a, b, bias.expand(fused.PROGRAMS, -1), scale, place and place(a))


@pytest.mark.parametrize("scale", [0.7, 1.0])
@pytest.mark.parametrize("used", ["first", "second", "both"])
@pytest.mark.parametrize("layout", ["channels last", "the last of a torch.cat"])
def test_the_sum_twice_has_the_gradients_of_both(scale, used, layout):
    a, b = (numbers(3, 12, 3, 5) for _ in range(2))
    wanted = [numbers(3, 12, 3, 5, layout=layout) if used in ("both", which) else None for which in ("first", "second")]

    def plain(a, b, bias):
        y = (a + b + bias[:, None, None]) * scale
        return y, y.view_as(y)

    check_against_plain(sum_twice(scale), plain, [a, b, numbers(12)], wanted)


def test_a_sum_and_a_copy_go_to_their_places_next_to_each_other():
    joint = fused.Joint(20)
    like = numbers(2, 8, 3, 5)
    skip = fused._Place.apply(like, joint.last(like))
    a, b, bias = numbers(2, 12, 3, 5), numbers(2, 12, 3, 5, layout="the last of a torch.cat"), numbers(12)
    _, h = sum_twice(0.7, joint.first)(a, b, bias)
    both = fused._Join.apply(h, skip, joint)
    assert both.data_ptr() == h.data_ptr() and both.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(both, torch.cat([plain_sum(a, b, bias), like], 1))


def test_the_gradients_of_what_is_joined_are_its_parts():
    joint = fused.Joint(20)

    def joined(skip, a, b, bias):
        skip = fused._Place.apply(skip, joint.last(skip))
        return fused._Join.apply(sum_twice(0.7, joint.first)(a, b, bias)[1], skip, joint)

    check_against_plain(joined, lambda skip, *others: torch.cat([plain_sum(*others), skip], 1),
                        [numbers(2, 8, 3, 5), numbers(2, 12, 3, 5), numbers(2, 12, 3, 5), numbers(12)],
                        [numbers(2, 20, 3, 5)])


def test_the_two_of_a_sum_may_differ_in_type():
    a, b = numbers(2, 4, 2, 3), numbers(2, 4, 2, 3, dtype=torch.bfloat16)
    check_against_plain(scaled_sum, plain_sum, [a, b, numbers(4)], [numbers(2, 4, 2, 3)])


@pytest.mark.parametrize(("size", "dtype"), SIZES_AND_TYPES)
@pytest.mark.parametrize("layout", ["channels last", "channels first", "the last of a torch.cat"])
def test_doubling_and_halving_are_their_formulas(size, dtype, layout):
    n, channels, _, height, width = size
    small, large = (numbers(n, channels, k * height, k * width, dtype=dtype, layout=layout) for k in (1, 2))
    check_resampling(small, large, dtype)


def check_resampling(small, large, dtype=torch.float32):
    double, halve = fused.Double(scale_factor=2), fused.Halve(2)
    check_against_plain(double, lambda x: F.interpolate(x, scale_factor=2.0), [small], [large], dtype)
    check_against_plain(halve, lambda x: F.avg_pool2d(x, 2), [large], [small], dtype)


def test_resampling_more_pixels_than_a_program_takes():
    check_resampling(numbers(2, 1100, 3, 5), numbers(2, 1100, 6, 10))


@pytest.mark.parametrize("f", [lambda x: norm(2)(x, None, numbers(8), numbers(8))[0],
                               lambda x: scaled_sum(x, x, numbers(8)), fused.Double(scale_factor=2), fused.Halve(2)])
def test_gradients_of_gradients_are_refused(f):
    """Rather than left out without a word."""
    x = numbers(2, 8, 2, 4).requires_grad_()
    (dx,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@torch.no_grad()
def test_without_gradients_it_says_the_same():
    x, shift, w, b = inputs_of_norm(2, 8, 2, 4)
    for f, plain in ((norm(2), plain_norm(2)), (lambda x, *_: scaled_sum(x, x, w), lambda x, *_: plain_sum(x, x, w))):
        for actual, expected in zip(f(x, shift, w, b), plain(x, shift, w, b), strict=True):
            assert not actual.requires_grad
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- the network


DEEP = SMALL | dict(width=12, multipliers=(1, 2, 3), attention_at=(4, 2))


def two_networks(**settings):
    plain = awake(dansm.UNet(**settings)).to(DEVICE)
    return plain, fused.fuse(copy.deepcopy(plain))


def batch(n=2, size=8):
    return numbers(n, 2, size, size), torch.linspace(0, 999, n, device=DEVICE)


def loss_and_gradients(net, x, t, *labels):
    x = x.detach().requires_grad_()
    y = net(x, t, *labels)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return [y, x.grad, *(weight.grad for weight in net.parameters())]


def close(actual, expected, error=2e-4):
    assert (actual - expected).abs().max() <= error * expected.abs().max() + 1e-6


@pytest.mark.parametrize(("settings", "biggan"), [
    (SMALL, True), (SMALL, False), *(pytest.param(DEEP, kind, marks=pytest.mark.slow) for kind in (True, False))])
def test_the_fused_network_is_the_plain_one(settings, biggan):
    plain, net = two_networks(**settings, biggan=biggan)
    assert {type(layer).__module__ for layer in net.modules() if isinstance(layer, dansm.Norm)} == {fused.__name__}
    names = ["output", "x", *(name for name, _ in net.named_parameters())]
    found = [loss_and_gradients(one, *batch(n=3 if settings is SMALL else 1)) for one in _together(plain, net)]
    for name, expected, actual in zip(names, *found, strict=True):
        assert actual.shape == expected.shape, name
        close(actual, expected)


@pytest.mark.parametrize("label_dropout", [0.0, 0.5])
def test_the_fused_network_takes_labels_as_the_plain_one_does(label_dropout):
    plain, net = two_networks(**SMALL, classes=2, label_dropout=label_dropout)
    x, t = batch(n=3)
    labels = torch.tensor([1, 2, 0], device=DEVICE)
    found = [loss_and_gradients(one, x, t, labels) for one in _together(plain, net)]
    for expected, actual in zip(*found, strict=True):
        close(actual, expected)
    plain.eval()
    net.eval()
    for given in (None, labels):
        close(net(x, t, given), plain(x, t, given))


def _together(*nets):
    """The same random numbers for each."""
    for net in nets:
        torch.manual_seed(5)
        yield net


@pytest.mark.slow
@KINDS
def test_images_that_are_not_square(biggan):
    plain, net = two_networks(**SMALL, biggan=biggan)
    x, t = numbers(2, 2, 6, 10), torch.tensor([3.0, 800.0], device=DEVICE)
    with torch.no_grad():
        close(net(x, t), plain(x, t))


@pytest.mark.slow
@KINDS
def test_a_fused_network_loads_and_gives_the_same_weights(biggan):
    plain, net = two_networks(**SMALL, biggan=biggan)
    saved = net.state_dict()
    assert list(saved) == list(plain.state_dict()) and net.settings == plain.settings
    other = dansm.UNet(**net.settings).to(DEVICE)
    other.load_state_dict(saved)
    x, t = batch()
    with torch.no_grad():
        close(other(x, t), plain(x, t))


@pytest.mark.slow
def test_a_network_is_fused_once_and_copied_fused():
    _, net = two_networks(**SMALL | dict(dropout=0.3))
    x, t = batch()
    kinds = [type(layer) for layer in net.modules()]
    assert fused.fuse(net) is net and [type(layer) for layer in net.modules()] == kinds
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [type(layer) for layer in other.modules()] == kinds
        expected, actual = (one(x, t) for one in _together(net, other))
        assert torch.equal(actual, expected)


@pytest.mark.slow
def test_a_fused_network_drops_in_training_only():
    plain, net = two_networks(**SMALL | dict(dropout=0.5))
    x, t = batch()
    assert not torch.equal(net(x, t), net(x, t))
    with torch.no_grad():
        close(net.eval()(x, t), plain.eval()(x, t))
        assert torch.equal(net(x, t), net(x, t))


@pytest.mark.slow
@KINDS
def test_under_autocast_it_stays_near_the_float32_network(biggan):
    plain, net = two_networks(**SMALL, biggan=biggan)
    x, t = batch()
    expected = plain(x, t)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = net(x, t)
    close(actual.float(), expected, 0.05)
    actual.float().square().sum().backward()
    expected.square().sum().backward()
    for weight, exact in zip(net.parameters(), plain.parameters(), strict=True):
        assert weight.grad.dtype == weight.dtype
        assert (weight.grad - exact.grad).norm() <= 0.1 * exact.grad.norm() + 1e-3


# ------------------------------------------------------------------------------- dropout


@triton.jit
def _draw(out, seeds, at, drop, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + i, fused._kept(seeds, tl.load(at + i), drop))


def dropped(seeds, at, share=0.15):
    """1 where dropout with these seeds drops, 0 elsewhere. at: (count,), a power of two."""
    seeds = torch.tensor(seeds).to(DEVICE, torch.int32)
    at = torch.as_tensor(at, dtype=torch.int64, device=DEVICE)
    out = torch.empty(len(at), device=DEVICE)
    size = min(len(at), 2**10 if ON_GPU else 2**20)
    _draw[len(at) // size,](out, seeds, at, round(2**24 * share), size)
    return (out == 0).double()


def random_seeds(count):
    return torch.randint(-(2**31), 2**31, (count, 2), generator=torch.Generator().manual_seed(1)).tolist()


def alike(a, b, share=0.15):
    """The correlation of two masks, in its own standard deviations if they are independent."""
    return ((a - share) * (b - share)).mean().item() / (share * (1 - share)) * math.sqrt(a.numel())


MANY = 2**16


@pytest.mark.parametrize("share", [0.01, 0.15, 0.9])
def test_the_share_of_zeros_is_what_was_asked_for(share):
    for seeds in [*random_seeds(6), (0, 0), (-1, -1), (0, 1), (1, 0)]:
        count = dropped(seeds, torch.arange(MANY), share).sum().item()
        assert abs(count - MANY * share) < 4.5 * math.sqrt(MANY * share * (1 - share)), seeds


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_numbers_any_power_of_two_apart_are_dropped_independently(share):
    """Channels, pixels and images lie such distances apart, and weak hashes show there."""
    for seeds in random_seeds(3):
        first = dropped(seeds, torch.arange(MANY), share)
        for power in range(32):
            other = dropped(seeds, torch.arange(MANY) + 2**power, share)
            assert abs(alike(first, other, share)) < 5, (seeds, power)


@pytest.mark.slow
def test_numbers_any_distance_apart_are_dropped_independently():
    """All 2**19 distances at once: a mask's correlation with itself, by its Fourier transform."""
    count = 2**20
    for seeds in random_seeds(2):
        mask = dropped(seeds, torch.arange(count)) - 0.15
        power = torch.fft.rfft(mask, 2 * count).abs().square()
        found = torch.fft.irfft(power)[1 : count // 2] / (0.15 * 0.85 * count)
        assert found.abs().max() < 0.02  # of chance 0.005; the hash's own are below 0.01


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_seeds_that_differ_by_one_bit_give_other_masks(which):
    for seeds, bit in product(random_seeds(2), range(32)):
        other = list(seeds)
        other[which] = (other[which] ^ (1 << bit)) & 0xFFFFFFFF
        other[which] -= 2**32 if other[which] >= 2**31 else 0
        assert abs(alike(dropped(seeds, torch.arange(MANY)), dropped(other, torch.arange(MANY)))) < 5


@pytest.mark.slow
def test_masks_of_other_seeds_are_independent():
    masks = torch.stack([dropped(seeds, torch.arange(2**13)) for seeds in random_seeds(64)]) - 0.15
    found = masks @ masks.T / (0.15 * 0.85 * math.sqrt(2**13))
    assert found.fill_diagonal_(0).abs().max() < 5


@pytest.mark.slow
@pytest.mark.parametrize("apart", [1, 3, 128, 2**14])
def test_eight_numbers_together_are_dropped_as_eight_coins_fall(apart):
    """A χ² test of how many of eight are dropped, the eight `apart` one from the next: pairs alone do not tell."""
    share, runs = 0.5, 2**14
    start = torch.arange(runs) % apart + torch.arange(runs) // apart * 8 * apart
    for seeds in random_seeds(2):
        at = (start[:, None] + apart * torch.arange(8)).flatten()
        found = torch.bincount(dropped(seeds, at, share).view(runs, 8).sum(1).long().cpu(), minlength=9)
        expected = torch.tensor([math.comb(8, k) / 2**8 * runs for k in range(9)])
        assert ((found - expected).square() / expected).sum() < 40  # of 8 degrees of freedom: once in 300,000


def mask_of(shape, share=0.15, dtype=torch.float32, layer=None):
    """What the layer makes of numbers that are 1 after the norm."""
    layer = layer or ones(shape[1], share)
    return layer(torch.zeros(shape, dtype=dtype, device=DEVICE))


def ones(channels, share, silu=False):
    layer = fused.Norm(channels, silu=silu, dropout=share).to(DEVICE)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.ones_(layer.bias)
    return layer


def test_what_is_kept_is_scaled_and_every_channel_pixel_and_image_gets_its_share():
    y = mask_of((8, 24, 12, 16))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.85])
    zeros = (y == 0).double()
    for kept_dim in range(4):
        counts = zeros.sum([dim for dim in range(4) if dim != kept_dim])
        each = zeros.numel() / len(counts)
        found = (counts - 0.15 * each).square().sum() / (each * 0.15 * 0.85)
        assert abs(found - len(counts)) < 4.5 * math.sqrt(2 * len(counts))
        ahead, behind = zeros.narrow(kept_dim, 1, len(counts) - 1), zeros.narrow(kept_dim, 0, len(counts) - 1)
        assert abs(alike(ahead, behind)) < 4.5


def test_each_call_has_its_own_mask_and_a_seed_brings_them_back():
    layer = ones(24, 0.5)
    torch.manual_seed(3)
    masks = torch.stack([(mask_of((4, 24, 8, 8), layer=layer) == 0).double() for _ in range(8)])
    found = (masks.flatten(1) - 0.5) @ (masks.flatten(1) - 0.5).T / (0.25 * math.sqrt(masks[0].numel()))
    assert found.fill_diagonal_(0).abs().max() < 4.5
    torch.manual_seed(3)
    again = torch.stack([(mask_of((4, 24, 8, 8), layer=layer) == 0).double() for _ in range(8)])
    assert torch.equal(again, masks)


@pytest.mark.parametrize(("tile", "dtype", "silu"), [
    ("whole", torch.float32, True), ("whole", torch.bfloat16, False), ("many rows", torch.float32, False),
    pytest.param("many rows", torch.float32, True, marks=pytest.mark.slow)])
def test_the_mask_is_the_same_forward_and_backward_whatever_the_numbers(tile, dtype, silu, request):
    if tile == "many rows":
        request.getfixturevalue("many_rows")
    seeds, drop = torch.tensor([-5, 2**30], dtype=torch.int32, device=DEVICE), round(0.3 * 2**24)
    inputs = inputs_of_norm(3, 20, 3, 5, dtype)
    nothing = [torch.zeros_like(inputs[0], dtype=torch.float32), None, torch.zeros(20), torch.ones(20)]
    mask = norm(5, False, seeds, drop)(*(x if x is None else x.to(DEVICE) for x in nothing))[0].double()
    assert 0.2 < (mask == 0).double().mean() < 0.4
    at = torch.arange(1024)  # numbered as they lie in memory
    expected = dropped((-5, 2**30), at, 0.3)[: mask.numel()].view(3, 3, 5, 20).permute(0, 3, 1, 2)
    assert torch.equal((mask == 0).double(), expected)
    wanted = numbers(3, 20, 3, 5, dtype=dtype), numbers(3, 20, 3, 5, dtype=dtype)
    check_against_plain(norm(5, silu, seeds, drop), plain_norm(5, silu, mask), inputs, wanted, dtype)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 1.0), (1e-9, 1.0), (1.0, 0.0), (1 - 1e-9, 0.0)])
def test_nothing_or_all_may_be_dropped(share, kept):
    x = numbers(2, 8, 3, 3).requires_grad_()
    layer = ones(8, share)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, torch.full_like(y, kept)) and x.grad.isfinite().all()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, kept * 18))
