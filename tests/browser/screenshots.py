"""Takes screenshots of a busy server's page, light, dark and on a phone, for README and docs (`make screenshots`)."""

import base64
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import httpx

from benchmarks.lib.browser import open_chromium
from tests.browser.page import Page
from tests.browser.server import ROOT, ServerProcess

FOLDER = ROOT / "docs" / "screenshots"
SHOTS = {"light": (1600, False), "dark": (1600, True), "phone": (390, False)}
MOST = {1600: 2400, 390: 1900}
TRAFFIC_S = 62.0
"""A whole minute, so that the graph of the last minute is full."""


@contextmanager
def busy_server() -> Iterator[ServerProcess]:
    """Start a server with some models in memory, one pinned, one evicted; MiniLM has traffic."""
    server = ServerProcess("--real", "--load", "1.2", "--download", "3")
    server.start()
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for model_id in ("snowflake-arctic-embed-l-v2.0", "Qwen/Qwen3-Embedding-4B", "m3e-base"):
                embed(client, model_id, ["warm"])
            client.post("/admin/models/nomic-embed-text-v1.5/preload", json={"pin": True})
            for model_id in ("bge-m3", "multilingual-e5-large"):
                embed(client, model_id, ["warm"])
        yield server
    finally:
        server.stop()


def embed(client: httpx.Client, model_id: str, texts: list[str]) -> None:
    client.post("/v1/embeddings", json={"model": model_id, "input": texts}).raise_for_status()


def make_traffic(url: str, seconds: float) -> None:
    """Send requests in waves, so that the graph of the last minute is not flat."""
    ends = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=60) as client:
        while (left := ends - time.monotonic()) > 0:
            embed(client, "all-MiniLM-L6-v2", ["The cat sits outside", "A man is playing guitar"])
            time.sleep(0.05 + 0.4 * abs((left / 5) % 2 - 1))


def shoot(page: Page, name: str) -> None:
    """Take the whole page; of a phone's page, the first screens."""
    page.driver.execute_script("scrollTo(0, 0)")
    height = page.driver.execute_script("return document.documentElement.scrollHeight")
    width = SHOTS[name][0]
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, MOST[width]), "scale": 1}
    shot = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    (FOLDER / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with busy_server() as server, tempfile.TemporaryDirectory() as profile:
        driver = open_chromium(Path(profile))
        try:
            page = Page(driver, server.url)
            page.open()
            make_traffic(server.url, TRAFFIC_S)
            page.find("#play-run").click()
            page.find(".heat")
            httpx.post(f"{server.url}/admin/models/gte-multilingual-base/preload", json={"wait": False})
            for name, (width, dark) in SHOTS.items():
                page.emulate(width, dark=dark)
                time.sleep(0.5)
                shoot(page, name)
                click.echo(f"docs/screenshots/{name}.png")
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
