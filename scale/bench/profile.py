"""What a training step is made of: the milliseconds of its GPU kernels, by kind of work."""

import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice

import torch

from dansm import BadInput

PROFILED = 8  # steps: every eighth batch of 250 draws a part of the next pool
REST = "everything else"
NOTES = "Optimizer.", "ProfilerStep"  # begin the names of spans that are no kernels
# Names of kernels hold those of others: the first that fits counts. A triton kernel's name may end in its types.
KINDS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in [
    ("norm, SiLU and dropout", r"^_(forward|backward)(_\d\w*)?$|group_?norm|rowwisemoments|gammabeta"),
    ("sums and resampling", r"^_(sum|sum_backward|halve|double)(_\d\w*)?$|upsample|avg_pool"),
    ("matching", r"^_(shortlist|choose|hand_out)(_\d\w*)?$|normal_and_transform"),
    ("attention", r"sdpa|flash|fmha|attention|softmax"),
    ("casts and copies", r"nchwtonhwc|nhwctonchw|multi_tensor_apply.*copy"),
    ("convolution, weight gradient", r"wgrad"),
    ("convolution, input gradient", r"dgrad"),
    ("convolution, forward", r"fprop|implicit_gemm|convol|conv2d|cudnn"),
    ("matching", r"sgemm|gemm_f32f32_f32f32"),  # no other product of a step is in float32
    ("concatenation", r"catarray"),
    ("optimizer and averages", r"fusedoptimizer|adam|multi_tensor_apply|lerp"),
    ("matrix products", r"nvjet|gemm|gemv|cutlass|cublas"),
    ("reductions", r"reduce"),
    ("casts and copies", r"copy|memcpy|memset|fill"),
]]


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel of this name does."""
    return next((kind for kind, pattern in KINDS if pattern.search(kernel)), REST)


def profile(case: str, moments: Iterator) -> Iterator[dict]:
    """A row for each kind of work and for the 25 longest kernels, the longest first: milliseconds of one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as listen

    for name, value in ("DISABLE_CUPTI_LAZY_REINIT", "1"), ("TEARDOWN_CUPTI", "0"):
        os.environ.setdefault(name, value)  # listening to a graph a second time is an error of CUDA else
    for steps_heard in (1, PROFILED):  # the first time is not counted: it loses kernels while it begins
        with listen(activities=[ProfilerActivity.CUDA]) as heard:
            deque(islice(moments, steps_heard), maxlen=0)
            torch.cuda.synchronize()
    kinds, longest, calls = Counter(), Counter(), Counter()
    for event in heard.events():
        note = getattr(event, "is_user_annotation", False) or event.name.startswith(NOTES)
        if event.device_type == torch.autograd.DeviceType.CUDA and not note:
            ms = event.time_range.elapsed_us() / 1000 / PROFILED
            kinds[kind_of(event.name)] += ms
            longest[event.name] += ms
            calls[event.name] += 1
    if not kinds:
        raise BadInput("the profiler saw no kernel: expected a torch with CUPTI, and the right to profile")
    for kind, ms in kinds.most_common():
        yield {"part": "profile", "case": case, "kind": kind, "ms": round(ms, 3),
               "share": round(ms / sum(kinds.values()), 4)}
    for name, ms in longest.most_common(25):
        yield {"part": "kernels", "case": case, "kernel": name[:200], "kind": kind_of(name), "ms": round(ms, 4),
               "calls": round(calls[name] / PROFILED, 2)}
