"""Serves fake engines through the real pool, as `embedyard serve` does, in a process that tests send signals.

    python -m tests.testkit.serve_fake EMBED_SECONDS GRACE_SECONDS [hang]

With `hang`, the device's pulse says that a forward pass hangs as soon as a request runs, and no request ever ends.
"""

import sys
import threading

from msgspec import structs

from engines.device.health import DeviceHealth
from engines.testing.fakes import FakeLoader, fake_host, fake_runtime, fake_specs
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.observability.logs import configure_logging
from router.registry.registry import Registry
from router.server import uvicorn_server as server
from router.server.uvicorn_server import listen, run_server

MODEL = "mini"


def main(embed_s: float, grace_s: float, *, does_hang: bool) -> None:
    configure_logging("json", "info")
    listener = listen("127.0.0.1", 0)
    loader = FakeLoader(embed_s=embed_s)
    runtime = fake_runtime()
    if does_hang:
        runtime = structs.replace(runtime, health=lambda: DeviceHealth(task_s=999.0 if is_busy(loader) else 0.0))
        threading.Thread(target=threading.Event().wait).start()  # as a thread that waits for the device
        server._FORCED_EXIT_MARGIN_S = 1.0
    specs = fake_specs(MODEL)
    backend = LocalBackend([fake_host(MODEL, loader=loader, runtime=runtime)], specs)
    registry = Registry(models=specs, default_model=MODEL)
    app = create_app(Settings(grace_seconds=grace_s), registry, backend)

    def announce() -> None:
        sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}\n")
        sys.stdout.flush()

    run_server(app, listener, announce)


def is_busy(loader: FakeLoader) -> bool:
    """Tell whether a request has ever run."""
    return any(engine.running or engine.cancelled for engine in loader.engines)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), does_hang="hang" in sys.argv)
