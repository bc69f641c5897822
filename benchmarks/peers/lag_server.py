"""`embedyard serve` with a clock on its event loop: the real command, and one class of it that also looks at the time.

Takes the options of `serve`. `LAG_FILE` names where the lags go when the server stops: `[[time, seconds], …]`, time on
the monotonic clock of the machine.
"""

import asyncio
import json
import os
import socket
import sys
import time
from pathlib import Path

import router.server.uvicorn_server
from router.cli.main import main

TICK_S = 0.005


class Clocked(router.server.uvicorn_server.DrainingServer):
    """Asks to be woken every few milliseconds, and notes how late it was."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._lags: list[tuple[float, float]] = []
        self._clock = asyncio.create_task(self._tick())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._clock.cancel()
        await super().shutdown(sockets)
        Path(os.environ["LAG_FILE"]).write_text(json.dumps(self._lags))  # noqa: ASYNC240  # nothing is served any more

    async def _tick(self) -> None:
        while True:
            asked = time.monotonic()
            await asyncio.sleep(TICK_S)
            woken = time.monotonic()
            self._lags.append((woken, max(0.0, woken - asked - TICK_S)))


if __name__ == "__main__":
    router.server.uvicorn_server.DrainingServer = Clocked  # type: ignore[misc]  # the one change to what `serve` runs
    sys.argv = ["embedyard", "serve", *sys.argv[1:]]
    main()
