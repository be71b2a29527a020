"""The same weights on several processes at first, and their gradients summed while others are being computed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as group
from torch import Tensor, nn

BYTES = 2**24  # sent together: fewer wait long for the network's start, more make the last ones late


@torch.no_grad()
def take_weights_of_first(net: nn.Module) -> None:
    """Replace weights and buffers by those of the first process. Every process must call it, with the same network."""
    for tensor in (*net.parameters(), *net.buffers()):
        whole = tensor.detach().contiguous()  # channels may be last on one process only
        group.broadcast(whole, 0)
        tensor.copy_(whole)


class Exchange:
    """Sums the gradients of `leaves` over all processes, in the type that they have.

    Gradients that have arrived are sent together, in the order in which backward passes bring them; all processes have
    the same order, as they run the same network. Works inside a CUDA graph too.
    """

    def __init__(self, leaves: Iterable[Tensor]):
        self.leaves = list(leaves)
        self.open = False
        self.arrived = defaultdict(list)  # by type: leaves with gradients that are not sent yet
        self.sent = []
        for leaf in self.leaves:
            leaf.register_post_accumulate_grad_hook(self._arrive)

    @contextmanager
    def during(self) -> Iterator[None]:
        """Send the gradients of the backward pass inside as they come; after it they are the sums. Each leaf's is then
        a part of a larger tensor. Leaves without a gradient keep none if that is so on all processes."""
        self.open = True
        try:
            yield
            for leaves in self.arrived.values():
                self._send(leaves)
            for work in self.sent:
                work.wait()
        finally:  # after an error too, so that a later backward pass sends its own gradients only
            self.open = False
            self.arrived.clear()
            self.sent.clear()

    def now(self) -> None:
        """Sum the gradients that are there."""
        with self.during():
            for leaf in self.leaves:
                if leaf.grad is not None:
                    self._arrive(leaf)

    def _arrive(self, leaf: Tensor) -> None:
        """Note that the leaf has its gradient, and send those that wait once they are BYTES together. Outside `during`
        it does nothing."""
        if not self.open:
            return
        waiting = self.arrived[leaf.dtype]
        waiting.append(leaf)
        if sum(other.nbytes for other in waiting) >= BYTES:
            self._send(waiting)

    @torch.no_grad()
    def _send(self, leaves: list[Tensor]) -> None:
        """Begin to sum the gradients of these leaves, and empty the list."""
        if not leaves:
            return
        gradients = [leaf.grad for leaf in leaves]
        together = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients))
        parts = together.split([gradient.numel() for gradient in gradients])
        parts = [part.as_strided(gradient.shape, gradient.stride(), part.storage_offset())  # channels may be last
                 for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(parts, gradients)
        for leaf, part in zip(leaves, parts, strict=True):
            leaf.grad = part
        self.sent.append(group.all_reduce(together, async_op=True))
        leaves.clear()
