"""Where each rank of a group is, told to the others only when it stays there, and whom a long wait comes down to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from phalanx.comm.ledger import Ledger

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A store that does not answer, its host being gone or cut off, must not hold up the error that is about to be raised.
_READ_LIMIT_S = 3.0


# One operation of a rank: its name, its number, the other rank of a send or recv, and the bytes of its tensor. A plain
# tuple, since one is made for every operation.
Call = tuple[str, int, int | None, int]


class RankStatus(NamedTuple):
    """What a rank published last.

    num_started: collectives of the board's group that it had started. waiting: whether it waited for another rank, in
    the operation that follows; else that is the last it had to do with, `op` empty where there was none. peer: by its
    number in `group`. layer, step: where it was, -1 outside.
    """

    num_started: int
    waiting: bool
    group: str
    op: str
    seq: int
    peer: int | None
    layer: int
    step: int

    def told(self, group: str) -> str:
        """As the end of a sentence about the rank, to one who waits in `group`."""
        where = f"{self.op} #{self.seq}" + ("" if self.group == group else f" of group {self.group!r}")
        if self.peer is not None and self.peer >= 0:
            where += f" with rank {self.peer}" + ("" if self.group == group else " there")
        layer = "" if self.layer < 0 else f" in layer {self.layer}"
        step = "" if self.step < 0 else f" of step {self.step}"
        if self.waiting:
            return f"waiting in {where}{layer}"
        last = f"last seen{layer}{step} after {where}" if self.op else f"last seen{layer}{step} before any transfer"
        return f"not waiting for any rank: busy, stuck or dead; {last}"


class WaitBoard:
    """This rank's notice on the group's store, and the reading of the others'.

    On the fast path it costs two attribute writes: a thread looks in every `tick_s` seconds and publishes what has not
    changed between two looks: a wait, in whichever group of the rank, or that it does something else. The same thread
    learns what the others are called, in good time: a store that a cut link leads to tells nothing any more.
    """

    def __init__(
        self, store: Store | None, group: str, rank: int, size: int, ledger: Ledger, tick_s: float, member: str = ""
    ) -> None:
        """ledger: of all groups of the rank. member: what this rank is called, beside its number."""
        self.waiting: Call | None = None
        self.num_started = 0
        self.group = group
        self.num_arrived: int | None = None  # where that is fewer than were started: a GPU lags behind its thread
        self.replayed: Callable[[], tuple[int, Call | None, int]] | None = None  # `now`, while transfers are replayed
        self._store = store
        self._rank = rank
        self._size = size
        self._ledger = ledger
        self._tick_s = tick_s
        self.members = {rank: member}  # by rank, as far as they are known
        self._closed = threading.Event()
        if store is not None:
            ledger.boards = (*ledger.boards, self)
            threading.Thread(target=self._watch, name=f"phalanx-waits-{rank}", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._ledger.boards = tuple(board for board in self._ledger.boards if board is not self)

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
        seen: RankStatus | None = None
        published: RankStatus | None = None
        told = False
        while not self._closed.wait(self._tick_s):
            now = self._look()
            try:
                if not told:
                    self._store.set(_member_key(self._rank), self.members[self._rank])
                    told = True
                if len(self.members) < self._size:
                    self._read_members(self._store)
                if published is not None and published.waiting and now != published:
                    published = published._replace(waiting=False)  # no longer there
                    self._publish(self._store, published)
                if now == seen and now != published:
                    self._publish(self._store, now)
                    published = now
            except RuntimeError:
                return  # the store is gone, and with it the readers of this board
            seen = now

    def _read_members(self, store: Store) -> None:
        for rank in set(range(self._size)) - self.members.keys():
            if store.check([_member_key(rank)]):
                self.members[rank] = store.get(_member_key(rank)).decode()

    def now(self) -> tuple[int, Call | None, int]:
        """Collectives started, what is waited for, and the layer."""
        if (replayed := self.replayed) is not None:
            return replayed()
        num_arrived = self.num_started if self.num_arrived is None else self.num_arrived
        return num_arrived, self.waiting, self._ledger.layer

    def _look(self) -> RankStatus:
        ledger = self._ledger
        num_arrived, _, here = self.now()
        for board in (self, *ledger.boards):
            _, call, layer = board.now()
            if call is not None:
                return RankStatus(num_arrived, True, board.group, *call[:3], layer, ledger.step)
        last = ledger.newest
        if last is None:
            return RankStatus(num_arrived, False, self.group, "", 0, None, here, ledger.step)
        return RankStatus(num_arrived, False, last.group, last.op, last.seq, last.peer, here, ledger.step)

    def _publish(self, store: Store, status: RankStatus) -> None:
        store.set(_key(self._rank), json.dumps(status))


class Causes(NamedTuple):
    """What a wait comes down to, by numbers in the group. guilty: ranks that wait for nobody, or were never seen to.
    elsewhere: ranks that wait in other groups. Neither: the ranks wait for each other.
    """

    guilty: tuple[int, ...]
    elsewhere: tuple[int, ...]

    def told(self, on_other_machines: Sequence[int]) -> str:
        """As a sentence without its end. on_other_machines: of the ranks that it comes down to, those."""
        link = f", or the link between here and {named(on_other_machines)} is cut" if on_other_machines else ""
        if self.guilty:
            return f"The cause is most likely {named(self.guilty)}, not seen waiting for anybody{link}"
        if self.elsewhere:
            return f"The cause lies in another group, where {named(self.elsewhere)} waits"
        return f"The ranks wait for each other: they do not make the same calls in the same order{link}"


def find_causes(
    missing: Sequence[int], statuses: Mapping[int, RankStatus], group: str, size: int, rank: int, num_started: int
) -> Causes:
    """Follows the waits of the `missing` to the ranks that those wait for in turn, as far as it goes.

    statuses: of the others, as far as they are known. rank, num_started: who asks, which waits itself.
    """
    started = {rank: num_started, **{other: status.num_started for other, status in statuses.items()}}
    following, met = list(missing), {rank}
    guilty, elsewhere = [], []
    while following:
        other = following.pop()
        if other in met:
            continue
        met.add(other)
        status = statuses.get(other)
        if status is None or not status.waiting:
            guilty.append(other)
        elif status.group != group:
            elsewhere.append(other)
        elif status.peer is not None:
            following.append(status.peer)
        else:
            following += [each for each in range(size) if started.get(each, -1) < status.seq]
    return Causes(tuple(sorted(guilty)), tuple(sorted(elsewhere)))


def whereabouts(op: str, seq: int, group: str, status: RankStatus | None, arrived: bool) -> str:
    """What a rank is at that others wait for, as half a sentence. arrived: whether it has started their operation."""
    if status is None:
        return "is not waiting for any rank: busy, stuck or dead"
    if arrived and status.group == group and status.seq == seq and status.peer is None and status.op != op:
        return f"called {status.op} as #{status.seq}: the ranks do not make the same calls"
    return f"{'has started it, ' if arrived else 'is '}{status.told(group)}"


def named(ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks)


def _key(rank: int) -> str:
    return f"waiting/{rank}"


def _member_key(rank: int) -> str:
    return f"member/{rank}"
