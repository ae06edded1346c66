"""Counted memory and FLOPs of a piece of work: the same on every machine, whatever else runs there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def peak_allocated(work: Callable[[], Any]) -> int:
    """Most bytes that the work holds at once beyond what was held before: every allocation of torch is counted.

    CPU: from the profiler's record of the allocator, scratch of kernels that goes through it included.
    CUDA: the allocator's own peak.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def flops(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and attention of the work, as torch's own counter counts them (full square)."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
