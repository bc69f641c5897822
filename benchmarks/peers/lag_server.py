"""Runs `embedyard serve` and records the lag of its event loop: the real command with one class replaced.

Takes the options of `serve`. When the server stops, it writes the lags to `LAG_FILE`: `[[time, seconds], …]`, time on
the machine's monotonic clock.
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


class LagRecordingServer(router.server.uvicorn_server.DrainingServer):
    """Sleeps for `TICK_S` repeatedly and records how late each sleep ends."""

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
    router.server.uvicorn_server.DrainingServer = LagRecordingServer  # type: ignore[misc]  # the one change to what `serve` runs
    sys.argv = ["embedyard", "serve", *sys.argv[1:]]
    main()
