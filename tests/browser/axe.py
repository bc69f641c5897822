"""Checks accessibility with axe-core, which is fetched from npm and used by tests only."""

import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.browser.page import Page

PACKAGE = "axe-core@4.14.1"


def axe_source(cache: Path) -> str:
    """Return axe-core's script, which is fetched once."""
    script = cache / "axe.min.js"
    if not script.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("axe-core comes from npm, which is not installed")
        cache.mkdir(exist_ok=True)
        (cache / ".gitignore").write_text("*\n")
        done = subprocess.run(
            [npm, "pack", PACKAGE, "--silent"], cwd=cache, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"npm could not fetch {PACKAGE}")
        with tarfile.open(cache / done.stdout.strip()) as archive:
            member = archive.extractfile("package/axe.min.js")
            assert member is not None
            script.write_bytes(member.read())
    return script.read_text()


def serious_issues(page: Page, source: str) -> list[str]:
    """Return serious and critical issues: rule and elements. The debugger injects axe, so the CSP stays unchanged."""
    page.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": source})
    found: Any = page.driver.execute_async_script(
        "const done = arguments[arguments.length - 1]; axe.run().then((result) => done(result.violations))"
    )
    return [
        f"{issue['id']}: {issue['help']} at {[node['target'] for node in issue['nodes']]}"
        for issue in found
        if issue["impact"] in ("serious", "critical")
    ]
