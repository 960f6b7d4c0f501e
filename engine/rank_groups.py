"""The groups that one rank is in, and its links to the stages before and after its own."""

from __future__ import annotations

import socket
import zlib
from collections.abc import Sequence

import torch

from phalanx.comm.communicator import Communicator
from phalanx.comm.create import create_communicator
from phalanx.comm.ledger import Ledger
from phalanx.comm.link import link_bytes_per_s
from phalanx.comm.rendezvous import connect_store, local_address, parse_rendezvous
from phalanx.engine.feedback import TokenReceiver, TokenSender
from phalanx.engine.messages import RankSpec
from phalanx.engine.runner import Links
from phalanx.parallel.handover import HandOver
from phalanx.parallel.layout import RankPlace
from phalanx.parallel.shared_head import HeadAsker, HeadHelper


class RankGroups:
    """Making them is the rendezvous: it ends when the ranks of every group have come, or raises CommError.

    comms: all of them. stage: that of the ranks of the stage. everyone: that of all ranks of the replica. links: to
    other stages. members: by the name of a group, its ranks of the replica, in the order of their numbers in it.
    choices: what was chosen, and why.
    """

    def __init__(self, spec: RankSpec, place: RankPlace, ledger: Ledger) -> None:
        """ledger: in which the transfers of all groups are booked."""
        self._spec = spec
        self._place = place
        self._ledger = ledger
        self._store = connect_store(spec.comm.store, timeout_s=spec.comm.timeout_s) if self._several else None
        self.comms: list[Communicator] = []
        self.members: dict[str, tuple[int, ...]] = {}
        self.links = Links()
        try:
            self.stage = self._connect(f"stage{place.stage}", spec.layout.stage_ranks(place.stage))
            self.everyone = self.stage
            self.choices = {"comm": f"{self.stage.backend}: {self.stage.reason}"}
            if len(spec.layout.stages) > 1:
                self.links = self._link()
        except BaseException:
            self.close()
            raise

    def num_here(self) -> int:
        """Ranks of the replica on this machine. All ranks of the replica ask together."""
        own = torch.tensor([zlib.crc32(socket.gethostname().encode())], dtype=torch.int64)
        return int((self.everyone.all_gather(own) == own).sum())

    def link_bytes_per_s(self) -> float:
        """Of the network interface to the other ranks; 0.0 where there is none, or it does not say."""
        comm = self._spec.comm
        if not self._several:
            return 0.0
        return link_bytes_per_s(local_address(parse_rendezvous(comm.store).host, comm.interface)) or 0.0

    def close(self) -> None:
        if self.links.head_helper is not None:
            self.links.head_helper.close()
        for comm in self.comms:
            comm.close()
        self.comms.clear()

    @property
    def _several(self) -> bool:
        return self._spec.layout.num_ranks > 1

    def _connect(self, group: str, ranks: Sequence[int]) -> Communicator:
        comm = self._join(group, ranks, self._ledger, self._spec.comm.timeout_s)
        self.comms.append(comm)
        return comm

    def _join(self, group: str, ranks: Sequence[int], ledger: Ledger, timeout_s: float) -> Communicator:
        spec, rank = self._spec, self._place.rank
        self.members[group] = tuple(ranks)
        return create_communicator(
            spec.comm.backend,
            rank=ranks.index(rank),
            size=len(ranks),
            rendezvous=self._store,
            group=group,
            device=spec.device,
            interface=spec.comm.interface,
            timeout_s=timeout_s,
            ledger=ledger,
            member=f"rank {rank} of the replica, on {socket.gethostname()}",
        )

    def _join_aside(self, group: str, ranks: Sequence[int]) -> Communicator:
        """For a thread that waits for whatever the steps of other stages take: it is never the first to lose patience,
        nor is what it waits for what the rank waits for.
        """
        ledger = Ledger()
        self._ledger.follow(ledger)
        return self._join(group, ranks, ledger, len(self._spec.layout.stages) * self._spec.comm.timeout_s)

    def _link(self) -> Links:
        layout, number = self._spec.layout, self._place.stage
        stage, ranks = layout.stages[number], layout.stage_ranks(number)
        before = after = tokens_in = tokens_out = head_helper = head_asker = None
        pipeline = self._connect("pipeline", range(layout.num_ranks))
        self.everyone = pipeline
        self.choices["comm between stages"] = f"{pipeline.backend}: {pipeline.reason}"
        if not stage.first:
            before = self._border(pipeline, layout.stage_ranks(number - 1), ranks)
        if not stage.last:
            after = self._border(pipeline, ranks, layout.stage_ranks(number + 1))
        if stage.first or stage.last:
            # A group of its own: tokens go back while hidden states go forward.
            last, first = layout.stage_ranks(len(layout.stages) - 1), layout.stage_ranks(0)
            ends = self._connect("tokens", (*last, *first))
            senders, receivers = range(len(last)), range(len(last), ends.size)
            if stage.first:
                tokens_in = TokenReceiver(ends, senders, receivers, len(layout.stages) + 1)
            else:
                tokens_out = TokenSender(ends, senders, receivers)
            if layout.shares_head:
                part, members = self._place.tensor_rank, (*last, *first)
                if stage.first:
                    head_helper = HeadHelper(self._join_aside("head", members), part)
                else:
                    head_asker = HeadAsker(
                        self._connect("head", members), len(last) + part, layout.stages[0].head[part].size
                    )
        return Links(before, after, tokens_in, tokens_out, head_helper, head_asker)

    def _border(self, pipeline: Communicator, senders: range, receivers: range) -> HandOver:
        scheme = self._spec.comm.compress
        border = HandOver(pipeline, senders, receivers, self.stage, scheme)
        if scheme != "none":
            stage = self._place.stage - (pipeline.rank in receivers)
            num_links = len(senders) * len(receivers)
            self.choices[f"compression after stage {stage}"] = (
                f"{scheme}: on {border.num_compressed} of {num_links} links, those between machines"
            )
        return border
