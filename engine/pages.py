"""Pages of the KV cache: which are free, which hold a prefix that other requests may use, and who uses them."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT = -1  # the parent of a first page


class PrefixPage:
    """A full page whose keys and values belong to known tokens behind a known prefix. num_users: sequences on it."""

    __slots__ = ("key", "num_users", "page")

    def __init__(self, page: int, key: tuple[int, bytes]) -> None:
        self.page = page
        self.key = key
        self.num_users = 0


class PagePool:
    """The pages of a replica, numbered alike on all its ranks.

    Full pages form a prefix tree (Zheng et al. 2023, arXiv 2312.07104): a page is found by the page before it and its
    own tokens. Whoever uses one uses all before it, so a page that nobody uses has nobody on the pages behind it. Those
    stay until their place is needed, the least recently used going first, and of one sequence its last page first.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._shared: dict[tuple[int, bytes], PrefixPage] = {}
        self._unused: OrderedDict[PrefixPage, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that nobody uses: free ones, and prefixes that are kept until their place is needed."""
        return len(self._free) + len(self._unused)

    @property
    def num_kept(self) -> int:
        """Pages that hold a prefix which nobody uses now."""
        return len(self._unused)

    def match(self, tokens: array[int], most: int) -> list[PrefixPage]:
        """The pages that hold the beginning of `tokens`, at most so many. They are not taken yet."""
        found: list[PrefixPage] = []
        parent, size = ROOT, self._page_size
        for index in range(most):
            page = self._shared.get((parent, tokens[index * size : (index + 1) * size].tobytes()))
            if page is None:
                break
            found.append(page)
            parent = page.page
        return found

    def num_unused(self, pages: Iterable[PrefixPage]) -> int:
        return sum(not page.num_users for page in pages)

    def use(self, pages: Iterable[PrefixPage]) -> None:
        """Takes pages that `match` found."""
        for page in pages:
            if not page.num_users:
                del self._unused[page]
            page.num_users += 1

    def allocate(self, count: int) -> list[int]:
        """So many of the available pages; kept prefixes give way."""
        while len(self._free) < count:
            evicted, _ = self._unused.popitem(last=False)
            del self._shared[evicted.key]
            self._free.append(evicted.page)
        return [self._free.pop() for _ in range(count)]

    def share(self, page: int, before: PrefixPage | None, tokens: array[int]) -> PrefixPage:
        """Lets others use a full page behind `before`. Returns what holds these tokens from now on, used by the caller:
        this page, or the one that another sequence shared before.
        """
        key = (ROOT if before is None else before.page, tokens.tobytes())
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = PrefixPage(page, key)
        elif not shared.num_users:
            del self._unused[shared]
        shared.num_users += 1
        return shared

    def release(self, shared: Sequence[PrefixPage], own: Iterable[int]) -> None:
        """Gives back all that a sequence used: its prefix, in order, and the pages that only it has."""
        for page in reversed(shared):
            page.num_users -= 1
            if not page.num_users:
                self._unused[page] = None
        self._free.extend(own)
