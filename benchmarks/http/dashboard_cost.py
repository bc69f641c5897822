"""Measures what an open dashboard costs the server: cores with it and without it, in alternating rounds.

Idle: no requests. Busy: a fixed number of requests a second, which cost the same with and without the page. Needs
Chromium and its driver (`make browser`).

    python -m benchmarks.http.dashboard_cost
    python -m benchmarks.http.dashboard_cost --rounds 1 --seconds 10
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.lib.browser import open_chromium
from benchmarks.lib.machine import ROOT, Watch, warn_if_busy
from benchmarks.lib.measure import with_progress
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.servers import Server, own, serving
from router import loadgen as load
from router.loadgen.http_client import encode

if TYPE_CHECKING:
    from selenium import webdriver

MODEL = "all-MiniLM-L6-v2"
SETTLE_S = 4.0
"""Wait after opening, until the page has its files and the buffered events."""


def cores(server: Server, work: Callable[[], None]) -> float:
    """Return the cores that the server uses while `work` runs."""
    before_s, began_s = server.core_s, time.perf_counter()
    work()
    return (server.core_s - before_s) / (time.perf_counter() - began_s)


def turns(
    server: Server, driver: "webdriver.Chrome", work: Callable[[], None], rounds: int
) -> tuple[list[float], list[float]]:
    """Return the cores used without and with the page, one sample of each a round."""
    without, beside = [], []
    for _ in with_progress(range(rounds), "round"):
        driver.get("about:blank")
        time.sleep(1.0)
        without.append(cores(server, work))
        driver.get(server.target.url)
        wait_for_models(driver)
        time.sleep(SETTLE_S)
        beside.append(cores(server, work))
    return without, beside


def wait_for_models(driver: "webdriver.Chrome") -> None:
    """Wait until the page shows the models of the registry."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(driver, 20, 0.05).until(lambda shown: shown.find_elements(By.CSS_SELECTOR, ".model[data-model]"))


def run(rounds: int, seconds: float, per_s: float) -> Report:
    """Measure with the shipped registry: sixteen models, one of them in memory."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as profile, serving(own(ROOT / "registry.yaml", MODEL)) as server:
        requests = [encode(server.target, ["The cat sits outside"])]

        def busy() -> None:
            load.run(lambda: load.opened(server.target, requests, per_s, until=load.after_s(seconds)))

        driver = open_chromium(Path(profile))
        try:
            found = {
                "idle": turns(server, driver, lambda: time.sleep(seconds), rounds),
                f"{per_s:g} requests/s": turns(server, driver, busy, rounds),
            }
        finally:
            driver.quit()
    return Report(
        name="page-cost",
        title="Cores of the server, without the dashboard and with it open in a browser",
        machine=watch.machine,
        settings={"rounds": rounds, "seconds": seconds, "requests_per_s": per_s},
        header=("load", "without", "with", "the page adds", "per cent of a core"),
        rows=[row(name, *each) for name, each in found.items()],
        samples={name: {"without": each[0], "with": each[1]} for name, each in found.items()},
        notes=("medians of rounds; the page adds the median of the rounds' differences",),
    )


def row(name: str, without: Sequence[float], beside: Sequence[float]) -> tuple[str, ...]:
    """Return one row of the table."""
    added = statistics.median(after - before for before, after in zip(without, beside, strict=True))
    shown = (statistics.median(without), statistics.median(beside), added)
    return (name, *(f"{each:.4f}" for each in shown), f"{100 * added:.2f}")


def main() -> None:
    """Print the table and save it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.dashboard_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn")
    parser.add_argument("--per-second", type=float, default=5.0, help="requests a second while busy")
    add_save_option(parser)
    asked = parser.parse_args()
    publish(run(asked.rounds, asked.seconds, asked.per_second), asked.results)


if __name__ == "__main__":
    main()
