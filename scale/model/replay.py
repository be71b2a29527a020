"""A network's calls as CUDA graphs: to launch the layers of one call takes Python tens of milliseconds."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..base.launch import on
from ..base.text import warn

MOST = 4  # graphs of one network: calls with and without guidance, and the last batch of both
PADDED = 0.75  # least share of a graph's batch that a smaller batch fills to be computed by it


class Replayed:
    """A network on a GPU, called as it is. Where a shape comes again its layers are recorded as a CUDA graph.

        predict = Replayed(net)
        predict(x, t, labels)       # x: (B, C, H, W), t: (B,), labels: (B,) or None → (B, C, H, W), one device

    A sample's result must not depend on others of its batch, and the network may not be moved.
    The graphs share one memory, which is freed with this object. Where none can be recorded, a warning says so once.
    """

    def __init__(self, net: Callable[..., Tensor]):
        self.net = net
        self.recordings: dict[tuple, Recording] = {}
        self.called = set()
        self.pool = None  # the graphs' memory
        self.records = True

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        inputs = [x, t] if labels is None else [x, t, labels]
        with on(x.device):
            recording = self._recording_for(inputs)
            return recording(inputs) if recording else self.net(x, t, labels)

    def _recording_for(self, inputs: list[Tensor]) -> "Recording | None":
        """What computes these inputs: a graph of this batch or one little larger. None in the first call for a batch,
        which compiles kernels and chooses algorithms."""
        kind = tuple((part.shape[1:], part.dtype) for part in inputs)
        batch = len(inputs[0])
        fitting = [size for other, size in self.recordings if other == kind and PADDED * size <= batch <= size]
        if fitting:
            return self.recordings[kind, min(fitting)]
        if (kind, batch) in self.called and self.records and len(self.recordings) < MOST:
            return self._record(kind, inputs)
        self.called.add((kind, batch))
        return None

    def _record(self, kind: tuple, inputs: list[Tensor]) -> "Recording | None":
        """Record and keep a graph for inputs, (B, ...) each, of this kind: their shapes without B, and types. None,
        then and in later calls, where it cannot be recorded."""
        try:
            recording = Recording(self.net, inputs, self.pool)
        except Exception as error:  # a layer that waits for the GPU, too little memory, an old driver
            warn(f"the network's layers are launched one by one, more slowly: {error!r}")
            self.records = False
            return None
        self.pool = recording.graph.pool()
        self.recordings[kind, len(inputs[0])] = recording
        return recording


class Recording:
    """One call of a network, recorded for a batch of `inputs`, each (B, ...), in the memory `pool` or in its own."""

    def __init__(self, net: Callable[..., Tensor], inputs: list[Tensor], pool: tuple | None):
        self.inputs = [part.clone() for part in inputs]
        self.graph, self.output = capture(lambda: net(*self.inputs), pool)

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        """The network's result for inputs of up to B samples; the others keep what they were."""
        batch = len(inputs[0])
        for own, given in zip(self.inputs, inputs, strict=True):
            own[:batch].copy_(given)
        self.graph.replay()
        return self.output[:batch].clone()


def capture(work: Callable[[], Tensor], pool: tuple | None) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    """A CUDA graph of what `work` launches, and its result, which each replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads use the GPU meanwhile
        output = work()
    return graph, output
