"""Recorded calls of a network: which calls are recorded, what they compute, and what is done where none can be."""

import pytest
import torch
from models import SMALLEST, awake
from support import CPU

import dansm
from dansm.scale.model import replay, sampling
from dansm.scale.model.replay import Replayed
from dansm.scale.model.sampling import Guidance, labels_in_turn, sample_images, sampler

CLASSES = 3


class FakeGraph:
    """What a CUDA graph does, on a CPU: it computes from what is in its inputs and overwrites its result."""

    def __init__(self, work):
        self.work = work
        self.output = work()
        self.replays = 0

    def pool(self):
        return 1, 2

    def replay(self):
        self.output.copy_(self.work())
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are recorded, and the memories that they were given."""
    recorded = []

    def capture(work, pool):
        graph = FakeGraph(work)
        recorded.append((graph, pool))
        return graph, graph.output

    monkeypatch.setattr(replay, "capture", capture)
    return recorded


@pytest.fixture
def net():
    return awake(dansm.UNet(**SMALLEST, classes=CLASSES)).eval()


def inputs(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 1, 4, 4, generator=generator), torch.full((batch,), 30.0 + seed),
            torch.arange(batch) % CLASSES)


def test_the_second_call_of_a_batch_is_recorded_and_later_ones_replay_it(net, graphs):
    predict = Replayed(net)
    for seed, recorded, replays in ((0, 0, 0), (1, 1, 1), (2, 1, 2), (3, 1, 3)):
        assert torch.allclose(predict(*inputs(4, seed)), net(*inputs(4, seed)), atol=1e-6)
        assert len(graphs) == recorded and sum(graph.replays for graph, _ in graphs) == replays


def test_a_result_stays_when_the_next_call_overwrites_what_the_graph_writes(net, graphs):
    predict = Replayed(net)
    predict(*inputs(4))
    first = predict(*inputs(4, 1))
    before = first.clone()
    predict(*inputs(4, 2))
    assert torch.equal(first, before) and graphs[0][0].replays == 2


def test_a_batch_a_little_smaller_is_computed_by_the_same_graph_and_a_smaller_one_by_its_own(net, graphs):
    predict = Replayed(net)
    for batch in (8, 8, 6, 7, 5, 5, 9, 9):
        assert torch.allclose(predict(*inputs(batch, batch)), net(*inputs(batch, batch)), atol=1e-6)
    assert [len(graph.output) for graph, _ in graphs] == [8, 5, 9]
    assert [pool for _, pool in graphs] == [None, (1, 2), (1, 2)]  # one memory
    assert [graph.replays for graph, _ in graphs] == [3, 1, 1]


def test_other_shapes_and_calls_without_labels_have_graphs_of_their_own(net, graphs):
    predict = Replayed(net)
    x, t, labels = inputs(4)
    for _ in range(2):
        predict(x, t, labels)
        assert torch.allclose(predict(x, t), net(x, t), atol=1e-6)
        predict(x.repeat(1, 1, 2, 2), t, labels)
    assert len(graphs) == 3


def test_no_more_than_a_few_graphs_are_kept(net, graphs):
    predict = Replayed(net)
    for batch in (1, 2, 4, 8, 16, 32):
        for seed in range(2):
            assert torch.allclose(predict(*inputs(batch, seed)), net(*inputs(batch, seed)), atol=1e-6)
    assert len(graphs) == replay.MOST


def test_where_nothing_can_be_recorded_the_layers_are_launched_after_one_warning(net, monkeypatch):
    def refuse(work, pool):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "capture", refuse)
    predict = Replayed(net)
    predict(*inputs(4))
    with pytest.warns(UserWarning, match="not permitted") as warned:
        for batch in (4, 4, 2, 2, 2):
            assert torch.allclose(predict(*inputs(batch)), net(*inputs(batch)), atol=1e-6)
    assert [warning.filename for warning in warned] == [__file__]


def test_a_sampler_records_its_calls_on_a_gpu_unless_it_is_not_to_compile(net, monkeypatch):
    recorded = []

    class Noted(Replayed):
        def __init__(self, predict):
            recorded.append(self)
            super().__init__(predict)

    monkeypatch.setattr(sampling, "Replayed", Noted)
    gpu = torch.device("cuda")  # which need not exist before a call
    network = sampler(net, gpu, "fp32")
    assert recorded == [network] and network.classes == CLASSES
    sampler(net, gpu, "fp32", compile=False)
    sampler(net, CPU, "fp32")
    assert len(recorded) == 1


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3), Guidance(3, (0.3, 1))])
@pytest.mark.parametrize("flow", [dansm.RectifiedFlow(solver="heun"), dansm.Diffusion()])
def test_samples_are_those_of_a_network_that_is_not_recorded(net, graphs, flow, guidance):
    predict = Replayed(sampler(net, CPU))
    predict.classes = CLASSES
    labels = labels_in_turn(range(11), range(CLASSES))
    drawn, expected = (torch.cat(list(sample_images(network, flow, range(11), (1, 4, 4), 4, batch=4, labels=labels,
                                                    guidance=guidance))) for network in (predict, sampler(net, CPU)))
    assert (drawn.int() - expected.int()).abs().max() <= 1  # last bits depend on the batch
    assert graphs and sum(graph.replays for graph, _ in graphs) >= 8


def test_weights_converted_once_predict_what_autocast_does_to_the_bit(net):
    x, t, labels = inputs(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = net(x, t, labels).float()
    assert torch.equal(sampler(net, CPU, "bf16")(x, t, labels), expected)
    assert not torch.equal(sampler(net, CPU, "fp32")(x, t, labels), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2, (0.3, 1))])
def test_on_a_gpu_graphs_compute_what_launched_layers_do(precision, guidance, monkeypatch):
    """To the bit, as the kernels of a batch are the same; 5 images of 37 are computed in a batch of their own."""
    device, labels = torch.device("cuda"), labels_in_turn(range(37), range(CLASSES)).cuda()
    net = awake(dansm.UNet(channels=3, size=16, width=32, multipliers=(1, 2), blocks=1, attention_at=(8,),
                           dropout=0.1, classes=CLASSES)).eval().to(device)

    def drawn():
        network = sampler(net, device, precision)
        images = sample_images(network, dansm.RectifiedFlow(), range(37), (3, 16, 16), 5, batch=16, device=device,
                               labels=labels, guidance=guidance)
        return torch.cat(list(images)), network

    recorded, network = drawn()
    assert network.recordings and network.records
    monkeypatch.setattr(sampling, "Replayed", lambda predict: predict)
    launched, _ = drawn()
    assert torch.equal(recorded, launched)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_memory_of_graphs_is_given_back_with_the_sampler():
    device = torch.device("cuda")
    net = awake(dansm.UNet(channels=3, size=16, width=32, multipliers=(1, 2), blocks=1, attention_at=())).eval()
    before = torch.cuda.memory_allocated(device)
    network = sampler(net.to(device), device)
    x, t = torch.randn(64, 3, 16, 16, device=device), torch.full((64,), 500.0, device=device)
    for _ in range(3):
        network(x, t)
    assert network.recordings
    del network, x, t
    net.cpu()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated(device) <= before + 2**24  # what cuBLAS keeps
