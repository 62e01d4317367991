"""Certificates and keys: what is made can be used, secrets are their owner's, what cannot be is said in a line."""

import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedrot.app.cli.main import main
from fedrot.core.errors import RunError
from fedrot.running.flower.keys import (
    check_server_keys,
    client_key,
    client_keys,
    make_client_key,
    make_server_keys,
)


def shaken(folder: Path, host: str) -> str:
    """What comes of a TLS handshake with a server that has these files, asked for as `host`."""
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(folder / "server.crt", folder / "server.key")
    outside = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                inside.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, OSError):
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname()) as plain:
                outside.wrap_socket(plain, server_hostname=host).close()
            return "good"
        except ssl.SSLCertVerificationError as problem:
            return str(problem)
        finally:
            thread.join()


def test_a_server_is_known_by_its_names_and_addresses_alone(tmp_path: Path) -> None:
    make_server_keys(tmp_path, ["fl.example.org", "127.0.0.1"])
    check_server_keys(tmp_path)
    assert (tmp_path / "server.key").stat().st_mode & 0o077 == 0
    assert [shaken(tmp_path, host) for host in ("fl.example.org", "127.0.0.1")] == ["good", "good"]
    for_others = [shaken(tmp_path, host) for host in ("other.example.org", "127.0.0.2")]
    assert all("not valid for" in problem for problem in for_others)


def test_the_server_reads_what_clients_made(tmp_path: Path) -> None:
    for name in ("b", "a"):
        private, public = make_client_key(tmp_path, name)
        assert private.stat().st_mode & 0o077 == 0
        assert client_key(private) == name
        assert "PRIVATE" not in public.read_text()
    found = client_keys(tmp_path)
    assert list(found) == ["a", "b"]
    private = serialization.load_ssh_private_key((tmp_path / "a.key").read_bytes(), None)
    assert found["a"] == public_key_to_bytes(private.public_key())  # type: ignore[arg-type]


def broken(folder: Path, what: str) -> None:
    """A folder of clients with something wrong in it."""
    make_client_key(folder, "a")
    if what == "twice":
        (folder / "b.pub").write_bytes((folder / "a.pub").read_bytes())
    elif what == "text":
        (folder / "b.pub").write_text("hello")
    elif what == "name":
        (folder / "a b.pub").write_bytes((folder / "a.pub").read_bytes())
    elif what == "other kind":
        from cryptography.hazmat.primitives.asymmetric import ed25519

        key = ed25519.Ed25519PrivateKey.generate().public_key()
        lines = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        (folder / "b.pub").write_bytes(key.public_bytes(*lines))
    else:
        (folder / "a.pub").unlink()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("twice", "a and b have the same key"),
        ("text", r"b\.pub: not a public key"),
        ("name", "'a b' cannot be a client's name"),
        ("other kind", r"b\.pub: not an ECDSA key"),
        ("none", "holds no client's key"),
    ],
)
def test_a_folder_of_clients_that_cannot_be_is_refused(what: str, words: str, tmp_path: Path) -> None:
    broken(tmp_path, what)
    with pytest.raises(RunError, match=words):
        client_keys(tmp_path)


def test_private_keys_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    private, _ = make_client_key(tmp_path, "a")
    private.chmod(0o644)
    with pytest.raises(RunError, match="others can read this private key; chmod 600"):
        client_key(private)
    private.write_text("hello")
    with pytest.raises(RunError, match="not a private key"):
        client_key(private)
    with pytest.raises(RunError, match="no such file"):
        client_key(tmp_path / "b.key")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("keys", "client", "../a"), "'../a' cannot be a client's name"),
        (("keys", "client", "a"), "a.key: is there already"),
        (("keys",), "the following arguments are required"),
        (("client", "--server", "h", "--key", "keys/a.key", "--data", "none"), "none: no such folder"),
        (("client", "--server", "h", "--key", "keys/a.key", "--data", "."), "keys/ca.crt: no such file"),
        (("client", "--server", "h", "--key", ".", "--data", "."), ".: no such file; fedrot keys client"),
        (("client", "--server", "h", "--key", "keys/a.key", "--data", ".", "--threads", "0"), "--threads must be"),
        (("server",), "the following arguments are required"),
        (
            ("server", "recipe.yaml", "--tls", "tls", "--clients", "keys"),
            "tls/ca.crt: no such file; fedrot keys server",
        ),
    ],
)
def test_bad_calls_are_one_line_and_code_2(
    words: tuple[str, ...],
    says: str,
    recipe_file: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe_file(data={"labels": ["negative", "positive"]})  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    make_client_key(Path("keys"), "a")
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_server_whose_run_is_over_says_so_and_asks_no_site(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have been killed after the last thing was written, and its sites may be gone."""
    path = recipe_file(data={"labels": ["negative", "positive"]}, rounds=1)
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 0
    words = ["server", str(path), "--tls", "none", "--clients", "none", "--out", str(tmp_path / "out")]
    assert main([*words, "--resume"]) == 0
    assert f"adapter  {tmp_path / 'out' / 'adapter'}" in capsys.readouterr().out
    assert main([*words, "--resume", "--rounds", "9"]) == 2
    assert "the run was started with rounds 1" in capsys.readouterr().err
