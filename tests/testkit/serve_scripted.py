"""Serves the scripted backend as `embedyard serve` does; `test_serve.py` sends this process signals.

Model `mini` answers at once, `BAAI/bge-m3` after half a second, `cold` never.
"""

import asyncio
import gc
import os
import sys
from pathlib import Path

from router.app import create_app
from router.config.settings import Settings
from router.observability.logs import configure_logging
from router.server.uvicorn_server import listen, run_server
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import REGISTRY


def main() -> None:
    configure_logging("json", "info")
    listener = listen("127.0.0.1", 0)
    backend = ScriptedBackend("mini", "BAAI/bge-m3", "cold")
    backend.gates["cold"] = asyncio.Event()
    backend.delays_s["BAAI/bge-m3"] = 0.5
    file = Path(os.environ.get("REGISTRY", "registry.yaml"))
    app = create_app(Settings(grace_seconds=5.0, registry=file), REGISTRY, backend)

    def announce() -> None:
        sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}\n")
        sys.stdout.flush()

    run_server(app, listener, announce)
    sys.stdout.write(f"{gc.get_freeze_count()}\n")


if __name__ == "__main__":
    main()
