"""Runs the load balancers of `deploy/`, unmodified except for names, ports and certificates."""

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
NAME = "embeddings.example.com"
NODES = ("10.0.0.11:6008", "10.0.0.12:6008")
"""The servers that the examples name."""


class Proxy(Struct, frozen=True):
    """A running load balancer: its URLs, and the TLS context that accepts its certificate."""

    url: str
    plain_url: str
    trust: ssl.SSLContext | bool = True


@contextmanager
def nginx(folder: Path, nodes: Sequence[str]) -> Iterator[Proxy]:
    """Run Debian's nginx, with the file of `deploy/nginx` in its `http` block and a self-signed certificate."""
    plain, tls = free_port(), free_port()
    key, certificate = make_certificate(folder)
    put_in = {
        "listen 80;": f"listen 127.0.0.1:{plain};",
        "listen 443 ssl": f"listen 127.0.0.1:{tls} ssl",
        f"/etc/nginx/tls/{NAME}.crt": str(certificate),
        f"/etc/nginx/tls/{NAME}.key": str(key),
        **dict(zip(NODES, nodes, strict=True)),
    }
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in KINDS)
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}{filled(DEPLOY / 'nginx' / 'embedyard.conf', put_in)}}}\n"
    )
    command = ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    with running(command, folder, tls):
        trust = ssl.create_default_context(cafile=certificate)
        trust.check_hostname = False  # requests go to its address
        yield Proxy(f"https://127.0.0.1:{tls}", f"http://127.0.0.1:{plain}", trust)


KINDS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
"""What nginx keeps temporary files for."""


@contextmanager
def caddy(folder: Path, nodes: Sequence[str]) -> Iterator[Proxy]:
    """Run Debian's caddy, without TLS, as its certificates come from the internet."""
    port = free_port()
    put_in = {f"{NAME} {{": f"http://127.0.0.1:{port} {{", **dict(zip(NODES, nodes, strict=True))}
    put_in |= {"\tgrace_period 10s": "\tgrace_period 1s\n\tadmin off\n\tauto_https off"}
    (folder / "Caddyfile").write_text(filled(DEPLOY / "caddy" / "Caddyfile", put_in))
    command = ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    with running(command, folder, port):
        url = f"http://127.0.0.1:{port}"
        yield Proxy(url, url)


def filled(file: Path, put_in: dict[str, str]) -> str:
    """Return the example with its placeholders replaced; each must occur."""
    text = file.read_text()
    for placeholder, own in put_in.items():
        assert placeholder in text, f"{file.name} has no {placeholder!r} any more"
        text = text.replace(placeholder, own)
    return text


@contextmanager
def running(command: Sequence[str], folder: Path, port: int) -> Iterator[None]:
    """Run a process until the block ends, which starts when the process listens."""
    with (folder / "log").open("w+") as log:
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder)}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while not is_listening(port):
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.01)
            yield
        finally:
            process.terminate()
            process.wait(10)


def is_listening(port: int) -> bool:
    """Tell whether a port accepts connections."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a key and a self-signed certificate for the examples' name."""
    key, certificate = folder / "tls.key", folder / "tls.crt"
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    names = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME},IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *options, *names, *files], check=True, capture_output=True)
    return key, certificate


def is_here(program: str) -> bool:
    """Tell whether a program is installed."""
    return shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is not None
