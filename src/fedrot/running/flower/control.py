"""The control interface of a SuperLink, for its own server alone: both halves of it.

Flower serves it at the port that clients reach. Without accounts, for which it wants a service of its own, whoever
reaches it may stop runs there and strike clients off for good. Here it asks for a token that is made from the server's
secret: `python -m fedrot.running.flower.control SECRET ARGUMENTS` is Flower's SuperLink with these arguments.
"""

import hashlib
import hmac
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import httpx
from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin

from fedrot.running.flower import tether


def command(secret: Path, *arguments: str) -> list[str]:
    """The command line of a SuperLink that is controlled by who has read the file `secret`."""
    return [sys.executable, "-P", "-m", "fedrot.running.flower.control", str(secret), *arguments]


class Showing:
    """Shows the token with every request."""

    def __init__(self, secret: bytes) -> None:
        self._token = _token(secret)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send the request with it."""
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


class Asking(NoOpControlAuthnPlugin):
    """Lets requests through that show the token, under the one account that there is."""

    def __init__(self, secret: bytes) -> None:
        self._token = _token(secret)

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Whether it is there, and the account."""
        shown = str(dict(metadata).get(ACCESS_TOKEN_KEY, ""))
        if not hmac.compare_digest(shown.encode(), self._token.encode()):
            return False, None
        return super().validate_tokens_in_metadata(metadata)


def _token(secret: bytes) -> str:
    """The secret itself never travels."""
    return hmac.new(secret, b"fedrot: control of the SuperLink", hashlib.sha256).hexdigest()


def main() -> None:
    """Run the SuperLink."""
    secret, *words = sys.argv[1:]
    asking = Asking(Path(secret).read_bytes())
    # The package has a function of the module's name.
    flower = import_module("flwr.superlink.cli.flower_superlink")
    # What Flower asks for where it has no accounts. That it does ask for it is tried before clients come in (`link`).
    flower.load_control_authn_plugin = lambda: asking  # type: ignore[attr-defined]
    tether.run(flower.flower_superlink, "flower-superlink", words)


if __name__ == "__main__":
    main()
