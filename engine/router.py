"""Which replica serves a request: the one that has computed its beginning, unless others have much less to do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 64  # tokens whose keys and values are worth a detour
MOST_BLOCKS = 64  # of a prompt that are looked at
CAPACITY = 1 << 16  # beginnings remembered
SLACK = 4  # requests more that a replica with the beginning of a prompt may have than the one with the fewest


class Router:
    """Remembers which beginnings of prompts went to which replica."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._seen: OrderedDict[int, int] = OrderedDict()  # digest of a beginning -> replica, oldest first

    def route(self, prompt: Sequence[int], loads: Sequence[int]) -> int:
        """The replica for a prompt. loads: requests that each replica has now."""
        if self._num_replicas == 1:
            return 0
        digests = []
        digest = 0
        for start in range(0, min(len(prompt) // BLOCK, MOST_BLOCKS) * BLOCK, BLOCK):
            digest = hash((digest, *prompt[start : start + BLOCK]))
            digests.append(digest)
        least = min(range(self._num_replicas), key=lambda replica: loads[replica])
        known = next((self._seen[each] for each in reversed(digests) if each in self._seen), least)
        chosen = known if loads[known] <= loads[least] + SLACK else least
        for each in digests:
            self._seen[each] = chosen
            self._seen.move_to_end(each)
        while len(self._seen) > CAPACITY:
            self._seen.popitem(last=False)
        return chosen
