"""The cryptography: Flower's primitives for keys, shares and encryption, `cryptography`'s ChaCha20 for masks.

Flower's generator of masks is not used: it seeds NumPy's Mersenne Twister with 32 bits, which can all be tried. Its
shares are not checked when they are joined; here what is joined must fit what its owner announced.
"""

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat, share_keys_plaintext_separate
from flwr.supercore.primitives.asymmetric import generate_key_pairs

from fedrot.core.secure_sum import Summand
from fedrot.running.network.messages import MessageError

CURVE = ec.SECP384R1()
_POINT, _SCALAR, _SEED, _HASH = 49, 48, 32, 32  # bytes; points are compressed
PUBLIC = 2 * _POINT + _HASH
SEED_SHARE, KEY_SHARE = 52, 68  # bytes of a share: its number, and 16 for each 16 of the padded secret
SEALED = 268  # bytes of both shares of a client, encrypted
_PIECE = 1 << 18  # numbers of a mask made at a time


@dataclass(frozen=True)
class Public:
    """What a client announces: a key by which shares are encrypted to it, one by which it agrees on masks with others,
    and a hash that its seed must have.
    """

    sealing: bytes  # (49,)
    masking: bytes  # (49,)
    promise: bytes  # (32,)

    @classmethod
    def read(cls, data: bytes) -> "Public":
        """From `PUBLIC` bytes. Raises `MessageError` where a key is not a point of the curve."""
        found = cls(data[:_POINT], data[_POINT : 2 * _POINT], data[2 * _POINT :])
        _point(found.sealing)
        _point(found.masking)
        return found

    def packed(self) -> bytes:  # (PUBLIC,)
        """The inverse of `read`."""
        return self.sealing + self.masking + self.promise

    def opens_seed(self, seed: bytes) -> bool:
        """Whether this is the seed that was announced."""
        return _hash(seed) == self.promise

    def opens_key(self, scalar: bytes) -> bool:
        """Whether this is the private key of the masks."""
        try:
            return _encoded(_private(scalar).public_key()) == self.masking
        except ValueError:
            return False


@dataclass(frozen=True)
class Secrets:
    """What a client keeps to itself, made anew for every sum."""

    sealing: ec.EllipticCurvePrivateKey
    masking: ec.EllipticCurvePrivateKey
    seed: bytes  # (32,)

    @classmethod
    def fresh(cls) -> "Secrets":
        """From the operating system's generator."""
        return cls(generate_key_pairs()[0], generate_key_pairs()[0], os.urandom(_SEED))

    def public(self) -> Public:
        """What may be told."""
        return Public(_encoded(self.sealing.public_key()), _encoded(self.masking.public_key()), _hash(self.seed))

    def scalar(self) -> bytes:  # (48,)
        """The private key of the masks as a number."""
        return self.masking.private_numbers().private_value.to_bytes(_SCALAR, "big")

    def seal(self, shares: tuple[bytes, bytes], marks: tuple[int, int], other: Public) -> bytes:  # (SEALED,)
        """The shares of seed and key for another client, encrypted; `marks` are this one's and the other's."""
        return encrypt(generate_shared_key(self.sealing, _point(other.sealing)), _together(shares, marks))

    def unseal(self, sealed: bytes, marks: tuple[int, int], other: Public) -> tuple[bytes, bytes]:
        """The shares that another client encrypted. Raises `MessageError` where they are not from it, not for this one,
        or no shares.
        """
        try:
            plain = decrypt(generate_shared_key(self.sealing, _point(other.sealing)), sealed)
        except InvalidToken:
            raise MessageError("its shares cannot be decrypted") from None
        if len(plain) != 20 + SEED_SHARE + KEY_SHARE:
            raise MessageError(f"its shares have {len(plain)} bytes")
        sender, receiver, *shares = share_keys_plaintext_separate(plain)
        if (sender, receiver) != marks or len(shares[0]) != SEED_SHARE:
            raise MessageError("its shares are of others")
        return shares[0], shares[1]

    def mask_key(self, other: Public) -> bytes:  # (32,)
        """The key of the mask that this client and another one have in common."""
        return common_key(self.scalar(), other)


def common_key(scalar: bytes, other: Public) -> bytes:  # (32,)
    """The key of a mask, from the private key of one of the two clients and what the other announced."""
    return base64.urlsafe_b64decode(generate_shared_key(_private(scalar), _point(other.masking)))


def add_mask(summand: Summand, key: bytes, sign: int) -> None:
    """Add (sign 1) or subtract (-1) the mask of a key, in place: ChaCha20's stream, uniform in what a sum can be. A key
    is of one mask, so the nonce is zero.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    for numbers in (summand.numbers, summand.counts):
        for start in range(0, len(numbers), _PIECE):
            piece = numbers[start : start + _PIECE]
            mask = np.frombuffer(stream.update(bytes(piece.nbytes)), dtype=piece.dtype.newbyteorder("<"))
            (np.add if sign > 0 else np.subtract)(piece, mask, out=piece)


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shamir's shares, numbered from 1 in their first four bytes; any `threshold` of them give the secret."""
    return create_shares(secret, threshold, count)


def numbered(share: bytes) -> int:
    """The number of a share."""
    return int.from_bytes(share[:4], "little")


def joined(shares: Sequence[bytes], threshold: int, fits: Callable[[bytes], bool]) -> bytes | None:
    """The secret, which must fit; None where no `threshold` shares that lie together give it. A single wrong share does
    no harm where there is one more than needed.
    """
    windows = 1 if len(shares) == threshold else len(shares)
    for first in range(windows if len(shares) >= threshold else 0):
        try:
            secret = combine_shares([shares[(first + i) % len(shares)] for i in range(threshold)])
        except ValueError:
            continue
        if fits(secret):
            return secret
    return None


def _together(shares: tuple[bytes, bytes], marks: tuple[int, int]) -> bytes:
    return share_keys_plaintext_concat(*marks, *shares)


def _hash(seed: bytes) -> bytes:
    return hashlib.blake2b(seed, digest_size=_HASH, person=b"fedrot-seed").digest()


def _encoded(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def _point(data: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(CURVE, data)
    except ValueError:
        raise MessageError("a public key is not a point of the curve") from None


def _private(scalar: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(scalar, "big"), CURVE)
