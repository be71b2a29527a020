"""Labels and guidance: what the network is asked for, and that images depend on their numbers alone."""

import pytest
import torch
from models import SMALLEST, awake
from PIL import Image
from support import CPU

import dansm
from dansm.scale.model.sampling import (
    UNGUIDED,
    Guidance,
    guided,
    labels_in_turn,
    operations_per_image,
    sample_images,
    sampler,
    save_grid,
    times_of,
)

CLASSES = 3
FLOWS = [dansm.RectifiedFlow(), dansm.RectifiedFlow(solver="heun"), dansm.Diffusion()]


class Asked:
    """A network that predicts 1, 2, 3 for its labels and 10 for none, and keeps what it was asked."""

    classes = CLASSES

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels):
        assert len(x) == len(t) == len(labels)
        self.calls.append((x, t, labels))
        value = torch.tensor([1.0, 2.0, 3.0, 10.0])[labels]
        return value[:, None].expand(x.shape)


@pytest.fixture
def network():
    """A network with labels, as a flow samples from it."""
    return sampler(awake(dansm.UNet(**SMALLEST, classes=CLASSES)).eval(), CPU)


def drawn(network, images, flow=FLOWS[0], **settings):
    return torch.cat(list(sample_images(network, flow, images, (1, 4, 4), 3, **settings)))


# ------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("weight", [0, 0.5, 2, 7])
def test_guidance_asks_once_for_both_halves_and_goes_on_from_none_over_the_label(weight):
    net, x, labels = Asked(), torch.randn(2, 4), torch.tensor([0, 2])
    v = guided(net, labels, Guidance(weight), FLOWS[0], 3)(x, torch.full((2,), 5.0))
    assert v[:, 0].tolist() == [10 + weight * (1 - 10), 10 + weight * (3 - 10)]
    ((both, times, asked),) = net.calls
    assert torch.equal(both, torch.cat([x, x])) and times.tolist() == [5] * 4
    assert asked.tolist() == [0, 2, CLASSES, CLASSES]


def test_without_guidance_only_the_labels_are_asked_for_and_without_labels_nothing_changes():
    net, x = Asked(), torch.randn(2, 4)
    v = guided(net, torch.tensor([0, 2]), UNGUIDED, FLOWS[0], 3)(x, torch.zeros(2))
    assert v[:, 0].tolist() == [1, 3] and net.calls[0][2].tolist() == [0, 2] and len(net.calls) == 1
    assert guided(net, None, UNGUIDED, FLOWS[0], 3) is net


@pytest.mark.parametrize(("flow", "steps", "times"), [
    (FLOWS[0], 5, [0, 0.2, 0.4, 0.6, 0.8]), (FLOWS[1], 2, [0, 0.5, 0.5, 1]), (FLOWS[2], 4, [0.25, 0.5, 0.75, 1]),
    (FLOWS[2], 3, [0.334, 0.667, 1])])
def test_times_run_from_noise_to_data_whatever_the_flow(flow, steps, times):
    assert times_of(flow, steps) == times


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("interval", [(0, 1), (0.25, 0.75), (0.5, 0.5), (0.1, 0.2)])
def test_guidance_holds_within_its_interval_for_every_sample_that_is_drawn(flow, interval):
    net = Asked()
    network = guided(net, torch.tensor([0, 2]), Guidance(2, interval), flow, 4)
    expected = [4 if interval[0] <= t <= interval[1] else 2 for t in times_of(flow, 4)]
    for _ in range(2):
        flow.sample(network, torch.randn(2, 4), 4)
        assert [len(x) for x, *_ in net.calls] == expected
        net.calls.clear()


# ------------------------------------------------------------------------------- images


def test_labels_in_turn_follow_the_images_numbers():
    assert labels_in_turn(range(5, 9), [4, 0, 7]).tolist() == [7, 4, 0, 7]
    assert labels_in_turn([3, 3], range(2)).tolist() == [1, 1]


@pytest.mark.parametrize("guidance", [UNGUIDED, Guidance(3), Guidance(3, (0.3, 1))])
def test_an_image_is_that_of_its_number_and_its_label_in_any_batch(network, guidance):
    labels = labels_in_turn(range(9), range(CLASSES))
    many = drawn(network, range(9), labels=labels, guidance=guidance, batch=9)
    few = drawn(network, range(9), labels=labels, guidance=guidance, batch=4)
    alone = drawn(network, [8], labels=torch.tensor([2]), guidance=guidance)
    assert (many.int() - few.int()).abs().max() <= 1  # last bits depend on the batch
    assert (many[8:].int() - alone.int()).abs().max() <= 1
    assert (many.int() - drawn(network, range(9), labels=labels.flip(0), guidance=guidance).int()).abs().max() > 1


def test_a_weight_of_1_is_the_label_and_of_0_is_none(network):
    labels = labels_in_turn(range(6), range(CLASSES))
    plain, none = drawn(network, range(6), labels=labels), drawn(network, range(6))
    assert torch.equal(plain, drawn(network, range(6), labels=labels, guidance=Guidance(2, (0.4, 0.5))))
    assert (none.int() - drawn(network, range(6), labels=labels, guidance=Guidance(0)).int()).abs().max() <= 1
    assert not torch.equal(plain, none)
    assert not torch.equal(plain, drawn(network, range(6), labels=labels, guidance=Guidance(2)))


def test_a_grid_is_about_square_or_has_the_columns_that_it_is_told(tmp_path):
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    for columns, size in ((None, (3 * 10 + 2, 3 * 10 + 2)), (2, (2 * 10 + 2, 4 * 10 + 2))):
        save_grid(images, tmp_path / "grid.png", columns=columns)
        assert Image.open(tmp_path / "grid.png").size == size


@pytest.mark.parametrize("settings", [dict(channels=4, size=32, width=128, multipliers=(1, 2, 2, 2), classes=10),
                                      dict(channels=3, size=[16, 24], width=64, multipliers=(1, 2), biggan=False,
                                           attention_at=(24, 12))])
def test_operations_are_those_that_torch_counts(settings):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = dansm.UNet(**settings).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, *net.shape), torch.empty(1))
    random = torch.get_rng_state()
    assert operations_per_image(net.settings) == 3 * counter.get_total_flops() > 0
    assert torch.equal(torch.get_rng_state(), random)

