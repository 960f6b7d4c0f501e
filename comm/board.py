"""Where each rank of a group waits, told to the others only when a wait takes long."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A store that does not answer, its host being gone or cut off, must not hold up the error that is about to be raised.
_READ_LIMIT_S = 3.0


# One operation of a rank: its name, its number, the other rank of a send or recv, and the bytes of its tensor. A plain
# tuple, since one is made for every operation.
Call = tuple[str, int, int | None, int]


class RankStatus(NamedTuple):
    """What a rank published last. num_started: collectives it had started. waiting: whether it still waited there."""

    num_started: int
    op: str
    seq: int
    peer: int | None
    waiting: bool

    def __str__(self) -> str:
        where = f"{self.op} #{self.seq}" + ("" if self.peer is None else f" with rank {self.peer}")
        return f"waiting in {where}" if self.waiting else f"last seen waiting in {where}, no longer waiting there"


class WaitBoard:
    """This rank's notice on the group's store, and the reading of the others'.

    On the fast path it costs two attribute writes: a thread looks in every `tick_s` seconds and publishes a wait that
    it meets twice, so one that has lasted between one and two ticks.
    """

    def __init__(self, store: Store | None, rank: int, size: int, tick_s: float) -> None:
        self.waiting: Call | None = None
        self.num_started = 0
        self.num_arrived: int | None = None  # where that is fewer than were started: a GPU lags behind its thread
        self._store = store
        self._rank = rank
        self._size = size
        self._tick_s = tick_s
        self._closed = threading.Event()
        if store is not None:
            threading.Thread(target=self._watch, name=f"phalanx-waits-{rank}", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def read_others(self) -> dict[int, RankStatus]:
        """What the others published, once those that began to wait just before this call have had time to.

        Empty where the store does not answer.
        """
        if self._store is None:
            return {}
        time.sleep(2.2 * self._tick_s)
        found: dict[int, RankStatus] = {}
        reader = threading.Thread(target=self._read_into, args=(self._store, found), daemon=True)
        reader.start()
        reader.join(_READ_LIMIT_S)
        return dict(found)

    def _read_into(self, store: Store, found: dict[int, RankStatus]) -> None:
        try:
            for rank in range(self._size):
                if rank != self._rank and store.check([_key(rank)]):
                    found[rank] = RankStatus(*json.loads(store.get(_key(rank))))
        except RuntimeError:
            return  # the store is gone: what was read so far is what is known

    def _watch(self) -> None:
        assert self._store is not None
        seen: Call | None = None
        published: Call | None = None
        while not self._closed.wait(self._tick_s):
            now = self.waiting
            try:
                if published is not None and now is not published:
                    self._publish(self._store, published, waiting=False)
                    published = None
                if now is not None and now is seen and now is not published:
                    self._publish(self._store, now, waiting=True)
                    published = now
            except RuntimeError:
                return  # the store is gone, and with it the readers of this board
            seen = now

    def _publish(self, store: Store, call: Call, *, waiting: bool) -> None:
        num_arrived = self.num_started if self.num_arrived is None else self.num_arrived
        store.set(_key(self._rank), json.dumps((num_arrived, *call[:3], waiting)))


def _key(rank: int) -> str:
    return f"waiting/{rank}"
