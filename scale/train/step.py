"""A training step as fast as a GPU goes: mixed precision, own kernels, several processes, and one CUDA graph, as the
2,000 launches of forward and backward take Python 120 ms and the GPU 50. The loop is `dansm.train`."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import dansm

from ..base.launch import compiling_ahead
from ..base.machine import number_type
from ..base.processes import ranks
from ..model.recipe import Recipe
from ..model.sampling import fused, weights_in
from .exchange import Exchange, take_weights_of_first

if TYPE_CHECKING:
    from .adam import OnePass  # which needs Triton

WARM_UP = 3  # steps before a graph is captured, by torch's advice


class FastTraining(dansm.Training):
    """`dansm.Training` by a recipe: precision in `dtype`, accumulation, warm-up, several processes, `averages` of which
    the first is `average`. If `compiled`, layers run as Triton kernels, and the step as a CUDA graph.

    Several processes begin with the weights of the first. Take states from `state_dict`: the optimizer's own counts of
    steps are late between steps, see `OnePass`.
    """

    def __init__(self, net: dansm.UNet, recipe: Recipe, device: torch.device):
        self.recipe = recipe
        self.device = device
        self.dtype = number_type(recipe.precision, device)
        net = net.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
        self.compiled = recipe.compile and fused(net)
        if ranks()[1] > 1:
            take_weights_of_first(net)
        super().__init__(net, recipe.lr, recipe.ema_decay[0], recipe.clip)
        self.averages = [self.average, *(copy.deepcopy(self.average) for _ in recipe.ema_decay[1:])]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.copies = self._copies_of_weights()
        self.exchange = self._exchange()
        self.one_pass = self.dtype == torch.bfloat16 and bool(self.copies) and recipe.accumulate == 1
        self.updates: OnePass | None = None  # for the gradients where they lie now, if `one_pass`
        self.graph = None

    def _copies_of_weights(self) -> dict[str, Tensor]:
        """The weights of products by name, in the type of the products, to be converted all at once: autocast takes 500
        launches."""
        if not self.compiled:
            return {}
        return {name: weight.requires_grad_() for name, weight in weights_in(self.dtype, self.net).items()}

    def _exchange(self) -> Exchange | None:
        """The exchange of gradients with other processes, of the copies in their type. Those of a batch in parts are
        sums in float32."""
        if ranks()[1] == 1:
            return None
        copies = {} if self.recipe.accumulate > 1 else self.copies
        return Exchange(copies.get(name, weight) for name, weight in self.net.named_parameters())

    def gradients(self, flow, x: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute the gradients for pairs x, z: (B, C, H, W) of these labels (B,), and return the loss, on the device.
        Labels in pinned memory are copied without synchronising."""
        if not self.compiled:
            self.optimizer.zero_grad()
            return self._backward(flow, x, z, labels if labels is None else labels.to(x.device, non_blocking=True))
        if self.graph is None or self.x.shape != x.shape:
            self._capture(flow, x, z, labels)
        self.x.copy_(x)
        self.z.copy_(z)
        if labels is not None:
            self.labels.copy_(labels, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()

    def _backward(self, flow, x: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        """Add the gradients of a batch, part after part, and return its loss. Processes exchange them once. With
        `one_pass`, those of the copies stay where they are, and `factor` is what clipping multiplies them by."""
        self._forget_updates()
        whole = self._through_copies() if self.copies else self.net
        loss = torch.zeros((), device=x.device)
        parts, processes = self.recipe.accumulate, ranks()[1]
        chunks = x.chunk(parts), z.chunk(parts), [None] * parts if labels is None else labels.chunk(parts)
        for x_part, z_part, labels_part in zip(*chunks, strict=True):
            net = whole if labels_part is None else partial(whole, labels=labels_part)
            with self.exchange.during() if self.exchange and parts == 1 else nullcontext():
                with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    part = flow.loss(net, x_part, z_part) * (len(x_part) / len(x) / processes)  # their sum is the mean
                self.scaler.scale(part).backward()
            loss.add_(part.detach(), alpha=processes)
            if self.copies and not self.one_pass:
                self._take_gradients_of_copies()
        if self.exchange and parts > 1:
            self.exchange.now()
        if self.one_pass:
            self.factor = clip_factor(self._gradients(), self.clip)
        return loss

    def _gradients(self) -> list[Tensor]:
        """The gradients of all weights, of the copies where there are some."""
        return [self.copies.get(name, weight).grad for name, weight in self.net.named_parameters()]

    def _through_copies(self) -> Callable[..., Tensor]:
        """The network by fresh copies of its weights."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.copies.values()), [self.net.get_parameter(name) for name in self.copies])
        for weight in self.copies.values():
            weight.grad = None
        return lambda x, t, labels=None: torch.func.functional_call(self.net, self.copies, (x, t, labels))

    def _take_gradients_of_copies(self) -> None:
        """Add the gradients of the copies to those of the weights, in float32."""
        weights = [self.net.get_parameter(name) for name in self.copies]
        gradients = [torch.empty_like(weight) for weight in weights]
        torch._foreach_copy_(gradients, [weight.grad for weight in self.copies.values()])
        if weights[0].grad is not None:
            torch._foreach_add_(gradients, [weight.grad for weight in weights])
        for weight, gradient, copied in zip(weights, gradients, self.copies.values(), strict=True):
            weight.grad = gradient
            copied.grad = None

    def compile_ahead(self) -> None:
        """Have the kernels for a batch of the recipe compiled, while the run goes on to its first one."""
        if not self.compiled:
            return
        x = torch.zeros(self.recipe.batch // ranks()[1], *self.net.shape, device=self.device)
        labels = torch.zeros(len(x), dtype=torch.long, device=self.device) if self.net.classes else None
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self._compile(dansm.RectifiedFlow(), x, x, labels, wait=False)

    def _compile(self, flow, x: Tensor, z: Tensor, labels: Tensor | None, wait: bool) -> None:
        """Have the kernels for such a batch compiled: nothing else comes of it."""
        with compiling_ahead(self.device, wait):
            self._backward(flow, x, z, labels)
            if self.one_pass:
                self._new_updates()(self.factor, 0.0)
        for weight in (*self.net.parameters(), *self.copies.values()):
            weight.grad = None

    def _capture(self, flow, x: Tensor, z: Tensor, labels: Tensor | None) -> None:
        """Record forward and backward for batches of this shape. A resumed run records again, so the random numbers are
        put back."""
        self.x = x.clone()
        self.z = z.clone()
        self.labels = labels if labels is None else labels.to(self.device, copy=True)
        random = torch.cuda.get_rng_state(self.device)
        self._compile(flow, self.x, self.z, self.labels, wait=True)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.optimizer.zero_grad()
                self._backward(flow, self.x, self.z, self.labels)
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.optimizer.zero_grad()  # so that the graph writes gradients and adds to none
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads bring the next batches
            self.loss = self._backward(flow, self.x, self.z, self.labels)
        torch.cuda.set_rng_state(random, self.device)

    def update(self) -> None:
        """Raise the learning rate by the recipe's warm-up, clip the gradients, take a step of Adam, and move the
        averages after it, in this order."""
        rise = min(1.0, (self.step + 1) / max(1, self.recipe.warmup))
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.recipe.lr * rise
        self.step += 1
        if self.one_pass:
            self.updates = self.updates or self._new_updates()
            share = 1 - min(self.recipe.ema_decay[0], (1 + self.step) / (10 + self.step))  # as dansm.update_ema
            self.updates(self.factor, share)
        else:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        first = 1 if self.one_pass else 0  # the pass has moved that one
        for decay, average in list(zip(self.recipe.ema_decay, self.averages, strict=True))[first:]:
            dansm.update_ema(average, self.net, decay, self.step)

    def _new_updates(self) -> "OnePass":
        from .adam import OnePass

        weights, averages = (list(net.parameters()) for net in (self.net, self.average))
        return OnePass(self.optimizer, weights, self._gradients(), averages)

    def _forget_updates(self) -> None:
        """Forget where gradients lie, as new ones come to other places."""
        if self.updates:
            self.updates.settle()
            self.updates = None

    def state_dict(self) -> dict:
        self._forget_updates()
        averages = [{"decay": decay, "weights": average.state_dict()}
                    for decay, average in zip(self.recipe.ema_decay, self.averages, strict=True)]
        return {"step": self.step, "net": self.net.state_dict(), "averages": averages,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = None
        self.step = state["step"]
        self.net.load_state_dict(state["net"])
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, moments in self.optimizer.state.items():  # saved with channels last or not, as that device has them
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(weight).copy_(moments[name])
        self.scaler.load_state_dict(state["scaler"])


def clip_factor(gradients: list[Tensor], clip: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies gradients by, on their device."""
    groups = {gradient.dtype: [other for other in gradients if other.dtype == gradient.dtype] for gradient in gradients}
    norms = [norm for group in groups.values() for norm in torch._foreach_norm(group, 2, torch.float32)]
    return (clip / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
