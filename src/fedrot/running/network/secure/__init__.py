"""Secure aggregation between sites: the server learns the sum of the clients' uploads and none of them.

Bonawitz et al., "Practical Secure Aggregation" (CCS 2017), with the sparse graph of Bell et al., "Secure Single-Server
Aggregation with (Poly)Logarithmic Overhead" (CCS 2020), against a server that follows the protocol and is curious. It
is over four requests:

1. train, or answer: the client trains and keeps what it made. It sends two public keys, and the hash of a random seed.
2. share: told all keys, it splits its seed and the private key of its masks among its neighbours, each share encrypted
   to the one that it is for.
3. masked: given the shares that are for it, it sends its numbers with a mask from its seed and one for each neighbour
   whose shares came; of two neighbours one adds their common mask and the other subtracts it.
4. unmask: told whose numbers arrived and whose did not, it gives its shares of the seeds of the former and of the
   private keys of the latter, and never both of one client.

So of a client whose numbers arrived the server can take off its own mask, of one that was lost the masks that it left
in its neighbours' numbers. docs/privacy.md says what that protects, and against whom.
"""

from importlib import import_module

from fedrot.core.errors import RunError

# The kinds of the requests after the one that a sum begins with.
STAGES = ("share", "masked", "unmask")


def require() -> None:
    """Raise `RunError` where the packages that the cryptography is from are not installed."""
    for package in ("flwr", "cryptography", "Crypto"):
        try:
            import_module(package)
        except ModuleNotFoundError:
            raise RunError(
                f"secure.aggregation: between sites it needs the package {package}; pip install 'fedrot[flower]'"
            ) from None
