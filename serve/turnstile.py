"""Keeps rounds of the event loop short, however many requests come at once."""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """Lets one coroutine pass in each round of the event loop.

    What a request costs before it reaches the engine takes about a millisecond: a hundred that come together would hold
    up everything else for as many. Between rounds the loop looks at its connections, so that others get their turn.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turns = False  # whether somebody has passed in this round

    async def wait(self) -> None:
        """Returns when it is the caller's turn: at once where nobody else has passed in this round."""
        loop = asyncio.get_running_loop()
        if not self._turns:
            self._turns = True
            loop.call_soon(self._next, loop)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # it was cancelled: its client has gone
                turn.set_result(None)
                loop.call_soon(self._next, loop)
                return
        self._turns = False
