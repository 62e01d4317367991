"""`fedrot keys server --host HOST ... | client NAME ...`."""

from collections.abc import Sequence
from pathlib import Path

from fedrot.app.cli.parser import CommandParser

DESCRIPTION = """\
Make the keys of a run between sites.
  fedrot keys server   an authority, and a certificate for the server that it signed, for a trial; where there is an
                       authority already, have it sign a certificate instead: ca.crt, server.crt and server.key
  fedrot keys client   a client's key pair: NAME.key stays with the client, NAME.pub goes to the server"""


def main(words: Sequence[str]) -> int:
    """Write the files, and say which are whose."""
    parser = CommandParser(prog="fedrot keys", description=DESCRIPTION)
    kinds = parser.add_subparsers(dest="kind", required=True)
    server = kinds.add_parser("server", help="an authority and a server's certificate")
    server.add_argument("--host", nargs="+", default=["127.0.0.1"], help="names and addresses by which it is reached")
    server.add_argument("--out", type=Path, default=Path("tls"), help="folder (default: tls)")
    client = kinds.add_parser("client", help="key pairs of clients")
    client.add_argument("names", nargs="+", metavar="NAME", help="the client's name")
    client.add_argument("--out", type=Path, default=Path("keys"), help="folder (default: keys)")
    call = parser.parse_args(list(words))
    from fedrot.running.flower.keys import AUTHORITY, CERTIFICATE, KEY, make_client_key, make_server_keys

    if call.kind == "server":
        make_server_keys(call.out, call.host)
        print(f"{call.out / AUTHORITY}   for every client")
        print(f"{call.out / CERTIFICATE}, {call.out / KEY}   for the server alone")
        return 0
    for name in call.names:
        private, public = make_client_key(call.out, name)
        print(f"{private}   for {name} alone")
        print(f"{public}   for the server's folder of clients")
    return 0
