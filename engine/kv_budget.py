"""How many pages a rank that is loaded and warm has room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phalanx.engine.host_memory import host_memory
from phalanx.errors import PhalanxError

if TYPE_CHECKING:
    import torch


def pages_within(free_bytes: int, share: float, bytes_per_page: int) -> int:
    """Pages that fit into `share` of `free_bytes`; 0 where there is less than nothing."""
    return int(max(0, free_bytes) * share) // bytes_per_page


def num_pages_for(free_bytes: int, share: float, bytes_per_page: int, limit_pages: int, *, least_pages: int = 1) -> int:
    """Pages of a KV cache that takes `share` of `free_bytes`, at most `limit_pages`.

    Raises PhalanxError with the figures where they are fewer than `least_pages`.
    """
    num_pages = pages_within(free_bytes, share, bytes_per_page)
    if num_pages < least_pages:
        raise PhalanxError(
            f"no room for the KV cache: {_mib(free_bytes)} are free beside weights and work, engine.kv_cache_share "
            f"{share:g} of them holds {num_pages} pages of {bytes_per_page} bytes, and at least {least_pages} are "
            f"needed, {_mib(least_pages * bytes_per_page)}; use more ranks or stages, a smaller model.max_length or "
            "engine.max_batch_tokens, or a larger engine.kv_cache_share"
        )
    return min(num_pages, limit_pages)


def free_device_bytes(device: torch.device) -> int:
    """Bytes of `device` that a rank's pages may be cut from, after a warm-up of its largest step.

    CPU: what is free of the machine or container. CUDA: what the driver has free and what PyTorch keeps unused, less
    what the warm-up had in use at its peak above what is held now, because every step needs that again; reset the
    peak (`torch.cuda.reset_peak_memory_stats`) before the warm-up. Raises PhalanxError where a system does not tell.
    """
    if device.type == "cuda":
        import torch

        driver_free, _ = torch.cuda.mem_get_info(device)
        return driver_free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    free_bytes = host_memory().free_bytes
    if free_bytes is None:
        raise PhalanxError(
            "this system does not say how much memory is free, so the KV cache cannot be sized by it; give "
            "engine.kv_cache a size, such as 1GiB"
        )
    return free_bytes


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
