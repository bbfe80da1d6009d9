"""Whose address it is, and the pointer that leads plain commands to ours."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows import service_address
from flows.service_address import (
    DEFAULT_URL,
    Address,
    any_free_port,
    find_address,
    is_free,
    pointer_url,
    remove_stale_pointer,
    write_pointer,
)
from prosparse_core.errors import EnvironmentProblem


class Answers(BaseHTTPRequestHandler):
    """Answers /api/health like Prefect, /web/health like some other program, and tells what it was sent."""

    def do_GET(self) -> None:
        self._answer(b"<html>hello</html>" if self.path.startswith("/web") else b"true")

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/refuse"):
            self._answer(b'{"detail": "no such filter"}', code=422)
        else:
            self._answer(json.dumps({"sent": sent, "authorization": self.headers["Authorization"]}).encode())

    def _answer(self, body: bytes, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("URL", "KEY", "AUTH_STRING"):
        monkeypatch.delenv(f"PREFECT_API_{key}", raising=False)
    for key in ("PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect-home"))


def write_profile(tmp_path: Path, **settings: str) -> None:
    lines = [f'{key} = "{value}"' for key, value in settings.items()]
    (tmp_path / "prefect-home").mkdir()
    (tmp_path / "prefect-home/profiles.toml").write_text("\n".join(['active = "mine"', "[profiles.mine]", *lines]))


def test_without_settings_it_is_the_default_and_ours(tmp_path: Path) -> None:
    assert find_address(tmp_path, None) == Address(DEFAULT_URL, owned=True, expected=False)


def test_our_live_server_is_ours_wherever_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "http://127.0.0.1:4311/api"
    assert find_address(tmp_path, ours) == Address(ours, owned=True)
    monkeypatch.setenv("PREFECT_API_URL", ours)  # as in the processes we start
    assert find_address(tmp_path, ours) == Address(ours, owned=True)


def test_environment_beats_file_beats_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_profile(tmp_path, PREFECT_API_URL="https://profile/api", PREFECT_API_KEY="k1")
    assert find_address(tmp_path, None) == Address("https://profile/api", owned=False, authorization="Bearer k1")
    (tmp_path / "prefect.toml").write_text('[api]\nurl = "https://file/api"\n')
    assert find_address(tmp_path, None).url == "https://file/api"
    monkeypatch.setenv("PREFECT_API_URL", "https://variable/api")
    monkeypatch.setenv("PREFECT_API_KEY", "k2")
    assert find_address(tmp_path, "http://127.0.0.1:4311/api") == Address(
        "https://variable/api", owned=False, authorization="Bearer k2"
    )


def test_password_of_a_self_hosted_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "https://mine/api")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:pass")
    expected = "Basic " + base64.b64encode(b"admin:pass").decode()
    assert find_address(tmp_path, None).authorization == expected


def test_a_profile_that_is_not_active_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_profile(tmp_path, PREFECT_API_URL="https://profile/api")
    monkeypatch.setenv("PREFECT_PROFILE", "another")
    assert find_address(tmp_path, None).owned


def test_loopback_is_theirs_when_somebody_listens_and_a_wish_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    assert not find_address(tmp_path, None).owned
    wish = f"http://localhost:{any_free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", wish)
    assert find_address(tmp_path, None) == Address(wish, owned=True, expected=False)


def test_broken_files_are_left_to_prefect(tmp_path: Path) -> None:
    (tmp_path / "prefect.toml").write_text("[api\n")
    assert find_address(tmp_path, None).url == DEFAULT_URL


def test_only_prefect_is_healthy(port: int) -> None:
    assert Address(f"http://127.0.0.1:{port}/api", owned=True).healthy()
    assert not Address(f"http://127.0.0.1:{port}/web", owned=True).healthy()
    assert not Address(f"http://127.0.0.1:{port}/api", owned=True, expected=False).healthy()
    assert not Address(f"http://127.0.0.1:{any_free_port()}/api", owned=True).healthy()


def test_a_call_sends_json_and_credentials_past_any_proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    address = Address(f"http://127.0.0.1:{port}/api/", owned=False, authorization="Bearer k")
    assert address.call("/echo", {"a": [1]}) == {"sent": {"a": [1]}, "authorization": "Bearer k"}


def test_a_refused_call_says_where_and_why(port: int) -> None:
    address = Address(f"http://127.0.0.1:{port}/api", owned=True)
    with pytest.raises(EnvironmentProblem, match=rf"{port}/api/refuse answered 422: .*no such filter"):
        address.call("/refuse", {})
    with pytest.raises(EnvironmentProblem, match="no Prefect server answers"):
        Address(f"http://127.0.0.1:{any_free_port()}/api", owned=True).call("/health")


def test_ports(port: int) -> None:
    assert not is_free(port)
    assert is_free(any_free_port())


def test_pointer_is_written_moved_and_removed_when_nobody_answers(tmp_path: Path, port: int) -> None:
    live, dead = f"http://127.0.0.1:{port}/api", f"http://127.0.0.1:{any_free_port()}/api"
    assert write_pointer(tmp_path, dead) is None
    assert write_pointer(tmp_path, live) is None
    assert pointer_url(tmp_path) == live
    assert [path.name for path in tmp_path.iterdir()] == ["prefect.toml"]
    assert find_address(tmp_path, None) == Address(DEFAULT_URL, owned=True, expected=False)  # no setting of the user's
    remove_stale_pointer(tmp_path)
    assert pointer_url(tmp_path) == live
    write_pointer(tmp_path, dead)
    remove_stale_pointer(tmp_path)
    assert not (tmp_path / "prefect.toml").exists()
    remove_stale_pointer(tmp_path)


def test_a_file_of_the_users_is_never_touched(tmp_path: Path) -> None:
    mine = '[api]\nurl = "http://127.0.0.1:1/api"\n'
    (tmp_path / "prefect.toml").write_text(mine)
    assert "not ours" in (write_pointer(tmp_path, DEFAULT_URL) or "")
    remove_stale_pointer(tmp_path)
    assert (tmp_path / "prefect.toml").read_text() == mine
    assert write_pointer(tmp_path, "http://127.0.0.1:1/api") is None  # it leads there already


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert write_pointer(tmp_path / "file", DEFAULT_URL)
    assert write_pointer(tmp_path / "absent", DEFAULT_URL)


def test_prefect_reads_the_pointer_where_it_says(tmp_path: Path) -> None:
    """The keys are Prefect's: its own settings model must find the address in what we write."""
    from prefect.settings.models.api import APISettings

    write_pointer(tmp_path, "http://127.0.0.1:4311/api")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.delenv("PREFECT_TESTING_TEST_MODE", raising=False)
        assert APISettings().url == "http://127.0.0.1:4311/api"
    assert service_address.DEFAULT_URL.endswith(":4200/api")
