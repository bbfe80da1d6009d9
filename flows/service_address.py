"""Where the Prefect API is, whose it is, and how a plain ``prefect`` command is led to it.

An address the user gives (``PREFECT_API_URL``, a ``prefect.toml`` of their own, their active profile) is theirs: used,
never started, stopped or reconfigured. Except a loopback address where nobody listens: that is a wish, and ours to
start. Without one the address is that of the server we started, or the default.

The lead is the *pointer*: ``prefect.toml`` with the address in the run folder, there while our server is up.
"""

from __future__ import annotations

import json
import os
import socket
import tomllib
import urllib.request
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from prosparse_core.errors import EnvironmentProblem

DEFAULT_URL = "http://127.0.0.1:4200/api"
MARK = "# Written by `prosparse up`, removed by `prosparse down`: leads a plain `prefect` typed here to its server.\n"


@dataclass(frozen=True)
class Address:
    """An API address. ``owned``: ours to start and stop. ``expected``: somebody should answer there."""

    url: str
    owned: bool
    expected: bool = True
    authorization: str | None = None

    def call(self, path: str, payload: dict[str, Any] | None = None, timeout_s: float = 10.0) -> Any:
        """GET, or POST with a payload; the decoded answer. EnvironmentProblem when there is none, or an error."""
        headers = {"Content-Type": "application/json"}
        if self.authorization:
            headers["Authorization"] = self.authorization
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, body, headers)
        # A proxy from the environment must not get between us and this machine.
        handlers = [urllib.request.ProxyHandler({})] if self.is_loopback() else []
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as answer:
                return json.loads(answer.read() or b"null")
        except HTTPError as problem:
            said = problem.read(500).decode(errors="replace")
            raise EnvironmentProblem(f"{request.full_url} answered {problem.code}: {said}") from problem
        except (OSError, HTTPException, ValueError) as problem:  # ValueError: an answer that is not JSON
            raise EnvironmentProblem(f"no Prefect server answers at {request.full_url}: {problem}") from problem

    def healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether a Prefect server answers, and not merely something on that port."""
        try:
            return self.expected and self.call("/health", timeout_s=timeout_s) is True
        except EnvironmentProblem:
            return False

    def is_loopback(self) -> bool:
        return urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")

    def port(self) -> int:
        return urlsplit(self.url).port or 80


def find_address(folder: Path, server_url: str | None) -> Address:
    """The user's address if they have one, else ``server_url`` (of our live server), else the default."""
    theirs = user_settings(folder)
    url = theirs.get("PREFECT_API_URL")
    if url is None or url == server_url:
        return Address(server_url or DEFAULT_URL, owned=True, expected=server_url is not None)
    wish = Address(url, owned=True, expected=False)
    if wish.is_loopback() and is_free(wish.port()):
        return wish
    authorization = None
    if key := theirs.get("PREFECT_API_KEY"):
        authorization = f"Bearer {key}"
    elif secret := theirs.get("PREFECT_API_AUTH_STRING"):
        authorization = f"Basic {b64encode(secret.encode()).decode()}"
    return Address(url, owned=False, authorization=authorization)


def user_settings(folder: Path) -> dict[str, str]:
    """Address and credentials as a plain ``prefect`` in ``folder`` would find them, our pointer aside."""
    keys = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING")
    prefect_home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    profiles = _read_toml(Path(os.environ.get("PREFECT_PROFILES_PATH") or prefect_home / "profiles.toml"))
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    found = dict(profiles.get("profiles", {}).get(active, {}))
    if pointer_url(folder) is None:
        table = _read_toml(folder / "prefect.toml").get("api", {})
        found |= {key: table[name] for key in keys if (name := key.removeprefix("PREFECT_API_").lower()) in table}
    found |= {key: os.environ[key] for key in keys if os.environ.get(key)}
    return {key: str(found[key]) for key in keys if key in found}


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def any_free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pointer_url(folder: Path) -> str | None:
    """The address in the pointer; None when there is no ``prefect.toml`` or it is the user's own."""
    with suppress(OSError):
        text = (folder / "prefect.toml").read_text(encoding="utf-8")
        if text.startswith(MARK):
            return str(tomllib.loads(text)["api"]["url"])
    return None


def write_pointer(folder: Path, url: str) -> str | None:
    """Lead plain commands in ``folder`` to ``url``. A file of the user's stays as it is. Returns why it failed."""
    path = folder / "prefect.toml"
    if _read_toml(path).get("api", {}).get("url") == url:
        return None
    if path.exists() and pointer_url(folder) is None:
        return f"{path} is not ours to change"
    try:
        scratch = path.with_name(f".prefect.toml.{os.getpid()}")
        scratch.write_text(f'{MARK}[api]\nurl = "{url}"\n', encoding="utf-8")
        scratch.replace(path)
    except OSError as problem:
        return str(problem)
    return None


def remove_stale_pointer(folder: Path) -> None:
    """Remove the pointer unless a server still answers where it leads; never a file of the user's."""
    url = pointer_url(folder)
    if url and not Address(url, owned=True).healthy():
        (folder / "prefect.toml").unlink(missing_ok=True)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        return {}  # absent; or broken, which Prefect itself reports better
