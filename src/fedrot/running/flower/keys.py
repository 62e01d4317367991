"""Who is who between sites: a server's certificate and the authority that signed it, and a key for each client.

A client's public key is the file NAME.pub in the server's folder of clients; its name there is the client's name.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedrot.core.errors import RunError

AUTHORITY, CERTIFICATE, KEY = "ca.crt", "server.crt", "server.key"  # in a server's folder of TLS files
_VALID = datetime.timedelta(days=365)


def make_server_keys(folder: Path, hosts: Sequence[str]) -> None:
    """An authority and a certificate for a server under these names and addresses, for a year.

    The authority's own key is thrown away, so nobody can sign another server with it. Raises `RunError` where files are
    there already.
    """
    for name in (AUTHORITY, CERTIFICATE, KEY):
        _refuse_existing(folder / name)
    authority, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = _common_name("fedrot authority")
    root = _certificate(issuer, authority.public_key(), issuer)
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    mine = _certificate(_common_name(hosts[0]), key.public_key(), issuer)
    mine = mine.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in ((AUTHORITY, root), (CERTIFICATE, mine)):
        signed = made.sign(authority, hashes.SHA256())
        (folder / name).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    _write_secret(folder / KEY, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def make_client_key(folder: Path, name: str) -> tuple[Path, Path]:
    """(private, public): NAME.key, which stays at the client's, and NAME.pub, which its server is given.

    Raises `RunError` for a name that cannot be, or files that are there already.
    """
    check_name(name)
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (private, public):
        _refuse_existing(path)
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    _write_secret(private, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    lines = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(*lines) + f" {name}\n".encode())
    return private, public


def client_keys(folder: Path) -> dict[str, bytes]:
    """Each client's public key as Flower's registry holds it, by the client's name. Raises `RunError`."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; put each client's NAME.pub in it (fedrot keys client NAME)")
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.pub")):
        check_name(path.stem)
        try:
            key = serialization.load_ssh_public_key(path.read_bytes())
        except (ValueError, UnsupportedAlgorithm):
            raise RunError(f"{path}: not a public key; fedrot keys client {path.stem} makes one") from None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise RunError(f"{path}: not an ECDSA key; fedrot keys client {path.stem} makes one")
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        found[path.stem] = key.public_bytes(serialization.Encoding.PEM, form)
    if not found:
        raise RunError(f"{folder}: holds no client's key; put each client's NAME.pub in it (fedrot keys client NAME)")
    if len(set(found.values())) < len(found):
        twice = [name for name, key in found.items() if list(found.values()).count(key) > 1]
        raise RunError(f"{folder}: {' and '.join(twice)} have the same key; each client needs its own")
    return found


def client_key(path: Path) -> str:
    """The client's name, by the name of its private key's file, once that is one. Raises `RunError`."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; fedrot keys client NAME makes a client's key") from None
    except (ValueError, UnsupportedAlgorithm):
        raise RunError(f"{path}: not a private key without a passphrase; fedrot keys client NAME makes one") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError(f"{path}: not an ECDSA key; fedrot keys client NAME makes one")
    if path.stat().st_mode & 0o077:
        raise RunError(f"{path}: others can read this private key; chmod 600 it")
    check_name(path.stem)
    return path.stem


def check_server_keys(folder: Path) -> None:
    """Raise `RunError` unless the folder holds a server's TLS files."""
    for name in (AUTHORITY, CERTIFICATE, KEY):
        if not (folder / name).is_file():
            raise RunError(f"{folder / name}: no such file; fedrot keys server --out {folder} makes a set for a trial")


def check_name(name: str) -> None:
    """Raise `RunError` for what cannot be a client's name: it becomes a file's name and a word in logs."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise RunError(f"{name!r} cannot be a client's name; use letters, digits, '.', '_' and '-'")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise RunError(f"{path}: is there already; move it away, or choose another folder by --out")


def _write_secret(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name) -> x509.CertificateBuilder:
    begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)  # clocks of sites differ
    named = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return named.serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(begins + _VALID)


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
