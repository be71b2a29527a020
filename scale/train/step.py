"""One training step as fast as a GPU goes: mixed precision, kernels of our own, one graph, several processes.

The loop is `dansm.train`; what stands here are the two halves of its step. On a GPU, forward and backward of a 61.8 M
network are some 2,000 launches, which take Python 120 ms and the GPU 50: so they are captured once as a CUDA graph and
launched as one from then on.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from datetime import timedelta

import torch
from torch import Tensor, nn

import dansm

from ..base.machine import number_type
from ..base.processes import ranks
from ..model.recipe import Recipe
from ..model.sampling import fused

PATIENCE = timedelta(days=1)  # while the first process downloads, hashes or measures all images, the others wait
WARM_UP = 3, 11  # calls before a graph is captured, alone and with other processes: torch's advice


class FastTraining(dansm.Training):
    """`dansm.Training` by a recipe: precision, averages, accumulation, warm-up, compilation; on one process of several
    if torch.distributed is set up.

    averages    one for each decay of the recipe; the first is `average`
    compiled    whether the network's layers go through kernels of ours, and its step through a graph
    """

    def __init__(self, net: dansm.UNet, recipe: Recipe, device: torch.device):
        self.recipe, self.device, self.dtype = recipe, device, number_type(recipe.precision, device)
        net = net.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
        self.compiled = recipe.compile and fused(net)
        super().__init__(net, recipe.lr, recipe.ema_decay[0], recipe.clip)
        self.averages = [self.average, *(copy.deepcopy(self.average) for _ in recipe.ema_decay[1:])]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.parallel = data_parallel(net, device)
        self.copies = self._copies_of_weights()
        self.graph = None

    def _copies_of_weights(self) -> dict[str, Tensor]:
        """Of the weights of products, in the type of the products, by their names. Autocast converts every weight and
        every gradient by itself, some 500 launches; of these all are converted at once. None where gradients are added
        up or exchanged, which float32 is for."""
        if not self.compiled or self.dtype == torch.float32 or self.parallel is not self.net or (
                self.recipe.accumulate > 1):
            return {}
        return {name: weight.detach().to(self.dtype).requires_grad_()
                for name, weight in self.net.named_parameters() if weight.ndim > 1}

    def gradients(self, flow, x: Tensor, z: Tensor) -> Tensor:
        if not self.compiled or not self.net.training:
            self.optimizer.zero_grad()
            return self._backward(flow, x, z)
        if self.graph is None or self.x.shape != x.shape:
            self._capture(flow, x, z)
        self.x.copy_(x), self.z.copy_(z)
        self.graph.replay()
        return self.loss.clone()

    def _backward(self, flow, x, z):
        """The batch in parts one after the other; processes exchange the gradients of the last, which hold all."""
        if self.copies:
            return self._backward_through_copies(flow, x, z)
        loss = torch.zeros((), device=x.device)
        parts = self.recipe.accumulate
        for number, (x_, z_) in enumerate(zip(x.chunk(parts), z.chunk(parts), strict=True), 1):
            alone = self.parallel is not self.net and number < parts
            with self.parallel.no_sync() if alone else nullcontext():
                with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    part = flow.loss(self.parallel, x_, z_) * (len(x_) / len(x))
                self.scaler.scale(part).backward()
            loss += part.detach()
        return loss

    def _backward_through_copies(self, flow, x, z):
        copies, weights = list(self.copies.values()), [self.net.get_parameter(name) for name in self.copies]
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)
        for one in copies:
            one.grad = None
        with torch.autocast(x.device.type, self.dtype):
            loss = flow.loss(self._through_copies, x, z)
        self.scaler.scale(loss).backward()
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        torch._foreach_copy_([weight.grad for weight in weights], [one.grad for one in copies])
        return loss.detach()

    def _through_copies(self, x, t):
        return torch.func.functional_call(self.net, self.copies, (x, t))

    def _capture(self, flow, x, z):
        """Record forward and backward for batches of this shape. It leaves the random numbers as they were, so that a
        run that is resumed, and records anew, draws what it would have drawn."""
        from ..base.launch import compiling_ahead

        self.x, self.z = x.clone(), z.clone()
        random = torch.cuda.get_rng_state(self.device)
        with compiling_ahead(self.device):
            self._backward(flow, self.x, self.z)
        beside = torch.cuda.Stream(self.device)
        beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP[self.parallel is not self.net]):
                self.optimizer.zero_grad()
                self._backward(flow, self.x, self.z)
        torch.cuda.current_stream(self.device).wait_stream(beside)
        self.optimizer.zero_grad()  # so that the graph writes gradients and adds to none
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads bring the next batches
            self.loss = self._backward(flow, self.x, self.z)
        torch.cuda.set_rng_state(random, self.device)

    def update(self) -> None:
        rise = min(1.0, (self.step + 1) / max(1, self.recipe.warmup))
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.recipe.lr * rise
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        for decay, average in zip(self.recipe.ema_decay, self.averages, strict=True):
            dansm.update_ema(average, self.net, decay, self.step)

    def state_dict(self) -> dict:
        averages = [{"decay": decay, "weights": average.state_dict()}
                    for decay, average in zip(self.recipe.ema_decay, self.averages, strict=True)]
        return {"step": self.step, "net": self.net.state_dict(), "averages": averages,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.net.load_state_dict(state["net"])
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


# ---------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------


def data_parallel(net: nn.Module, device: torch.device) -> nn.Module:
    """The network whose gradients are the mean over all processes; the network itself where there is one process."""
    if ranks()[1] == 1:
        return net
    beside = torch.cuda.Stream(device) if device.type == "cuda" else None  # as a captured graph wants it
    with torch.cuda.stream(beside) if beside else nullcontext():
        return nn.parallel.DistributedDataParallel(net, device_ids=[device] if beside else None,
                                                   gradient_as_bucket_view=True)


# ---------------------------------------------------------------------------------------------------
# How much of the GPU is used
# ---------------------------------------------------------------------------------------------------

# dense bf16 (V100, T4: fp16) operations a second that the maker states, in 1e12; a longer name goes before a shorter
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312,
         "A40": 150, "A10": 125, "L40": 181, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "V100": 125,
         "T4": 65}


