"""How many pages a rank that is loaded and warm has room for."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.engine.memory_book import mib
from phalanx.errors import PhalanxError


def page_size_on(device_type: str) -> int:
    """Tokens in a page, where nobody says: on GPUs whole tiles of keys, which Hopper's prefill fetches by TMA."""
    return 64 if device_type == "cuda" else 16


def pages_within(free_bytes: int, share: float, bytes_per_page: int) -> int:
    """Pages that fit into `share` of `free_bytes`; 0 where there is less than nothing."""
    return int(max(0, free_bytes) * share) // bytes_per_page


def num_pages_for(
    free_bytes: int,
    share: float,
    bytes_per_page: int,
    limit_pages: int,
    *,
    least_pages: int = 1,
    fitting: Sequence[str] = (),
) -> int:
    """Pages of a KV cache that takes `share` of `free_bytes`, at most `limit_pages`.

    Raises PhalanxError with the figures where they are fewer than `least_pages`. fitting: what to do then.
    """
    num_pages = pages_within(free_bytes, share, bytes_per_page)
    if num_pages < least_pages:
        remedies = fitting or ("use more ranks or stages",)
        raise PhalanxError(
            f"no room for the KV cache: {mib(free_bytes)} are free beside weights and work, engine.kv_cache_share "
            f"{share:g} of them holds {num_pages} pages of {bytes_per_page} bytes, and at least {least_pages} are "
            f"needed, {mib(least_pages * bytes_per_page)}; what would fit: {'; or '.join(remedies)}"
        )
    return min(num_pages, limit_pages)
