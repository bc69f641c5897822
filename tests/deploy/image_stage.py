"""Runs one stage of a Dockerfile without Docker: the unmodified steps, in a separate root made of mounts.

The base image is this machine's `/usr` and `/etc`, each below an overlay that takes what the steps write; everything
else begins empty. Must run as root in a mount namespace of its own, so that nothing of this outlives the process.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_FROM_BASE = ("usr", "etc")
_LINKS = ("bin", "sbin", "lib", "lib64")
_KERNEL = ("proc", "sys", "dev")
_PASSED_ON = ("PIP_", "SSL_", "HTTP_", "HTTPS_", "NO_PROXY", "http", "no_proxy")
"""What docker build passes on: how to reach the outside. The rest of this machine's environment stays outside."""


class Stage:
    """One stage. `root`: its file system; `env`, `workdir`, `user` and `shell`: as set by its steps so far."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self._folder = folder
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.workdir, self.user, self.shell = "/", "", ["/bin/sh", "-c"]
        for name in (*_FROM_BASE, *_KERNEL, "tmp", "run", "opt", "var/tmp"):
            (self.root / name).mkdir(parents=True)
        for name in _FROM_BASE:
            self._overlay(name)
        for name in _KERNEL:
            _mount("--rbind", f"/{name}", self.root / name)
        for name in _LINKS:
            if Path("/", name).is_symlink():
                (self.root / name).symlink_to(Path("/", name).readlink())
        (self.root / "tmp").chmod(0o1777)
        self._offer_wheels()
        self._offer_python()

    def run(self, words: Sequence[str], **more: str) -> int:
        """Run a command inside, as the stage's user; return its exit code."""
        return self.start(words, more).wait()

    def start(self, words: Sequence[str], more: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command inside. Users other than root gain no privileges, as with `no-new-privileges`."""
        passed = {name: text for name, text in os.environ.items() if name.startswith(_PASSED_ON)}
        env = [f"{name}={text}" for name, text in {**passed, **self.env, **more}.items()]
        as_user: list[str] = []
        if self.user:
            uid, _, gid = self.user.partition(":")
            as_user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
            as_user += ["--bounding-set=-all", "--inh-caps=-all"]
        return subprocess.Popen(["chroot", str(self.root), *as_user, "env", "-i", "-C", self.workdir, *env, *words])

    def path(self, inside: str) -> Path:
        """Return a stage's path as a path of this machine; a relative one starts at the working directory."""
        return self.root / os.path.normpath(f"{self.workdir}/{inside}" if inside[0] != "/" else inside).lstrip("/")

    def written(self) -> tuple[Path, ...]:
        """Return the folders with the files that the steps wrote."""
        uppers = tuple(self._folder / f"{name}.upper" for name in _FROM_BASE)
        return (*uppers, self.root / "opt/embedyard", self.root / "models")

    def freeze(self, volumes: Sequence[str]) -> None:
        """Make everything read-only except these volumes and an empty `/tmp`."""
        for name in _FROM_BASE:
            _mount("--options", "remount,ro", self.root / name)
        _mount("--rbind", self.root, self.root)
        _mount("--options", "remount,bind,ro", self.root)
        for volume in volumes:
            outside = self._folder / "volumes" / volume.strip("/")
            outside.mkdir(parents=True)
            os.chown(outside, self.path(volume).stat().st_uid, self.path(volume).stat().st_gid)
            _mount("--bind", outside, self.path(volume))
        _mount("--types", "tmpfs", "tmpfs", self.root / "tmp")

    def _overlay(self, name: str) -> None:
        upper, work = self._folder / f"{name}.upper", self._folder / f"{name}.work"
        upper.mkdir()
        work.mkdir()
        options = f"lowerdir=/{name},upperdir={upper},workdir={work}"
        _mount("--types", "overlay", "overlay", "--options", options, self.root / name)

    def _offer_wheels(self) -> None:
        """Mount the folders in which this machine's pip looks for wheels, where it has any."""
        for folder in map(Path, os.environ.get("PIP_FIND_LINKS", "").split()):
            if folder.is_dir():
                self._offer(folder)

    def _offer_python(self) -> None:
        """Provide the base image's `python`: the one that runs this program, which may be outside of `/usr`."""
        program = Path(getattr(sys, "_base_executable", sys.executable))
        if not program.is_relative_to("/usr"):
            self._offer(Path(sys.base_prefix))
        self.env["PATH"] = f"{program.parent}:{self.env['PATH']}"
        name = self.root / "usr/local/bin/python"
        if not (program.parent / "python").exists() and not name.is_symlink():
            name.symlink_to(program)

    def _offer(self, folder: Path) -> None:
        inside = self.root / str(folder).lstrip("/")
        inside.mkdir(parents=True)
        _mount("--bind", "--options", "ro", folder, inside)


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)
