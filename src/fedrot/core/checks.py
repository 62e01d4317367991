"""What an upload must be before it may touch the global state."""

import math
from collections.abc import Mapping

import torch

from fedrot.core.adapter import Adapter, same_form, same_update
from fedrot.core.drift import DRIFT_KEYS
from fedrot.core.errors import AdapterError, FedrotError
from fedrot.core.methods.base import Upload
from fedrot.core.settings import CheckSettings

# A rotation that arrives is orthogonal to this; it was computed in float64 and may have travelled as float32.
_ORTHOGONAL = 1e-4
# No number of an upload is as large as this, in its tensors or beside them: larger ones would overflow in sums, squares
# and products; those of two factors of rank 4096 stay 2^9 below the largest float32.
TOO_LARGE = 2**53


# What every client reports of its local training.
METRICS = ("loss", "steps", "tokens")
# What an upload says beside its adapter: of the data and their training, and of what became of the factors.
_REPORTS = ("held", "used", "metrics", "seconds")
_TURNS = ("rotation", "layers")


class RejectedUpload(FedrotError):
    """An upload that must not touch the state; the message is the reason."""


def check_upload(
    upload: Upload,
    form: Adapter,
    settings: CheckSettings,
    variate: bool = False,
    reports: bool = True,
    turns: bool = True,
) -> None:
    """Raise `RejectedUpload` with the reason unless the upload has `form`'s names, shapes, dtypes, values below 2^53,
    a sane example count, rotations in SO(r), and a change from `form` (the broadcast) within the norm bound; and, with
    `variate`, a control variate of the same form, without it none. Without `reports` it must hold no counts, losses or
    times, without `turns` no rotations and no drift: they have no noise (privacy.mode local and example).
    """
    _check_tensors(upload.adapter, form, "upload")
    if variate != (upload.variate is not None):
        raise RejectedUpload(f"upload: it has {'no' if variate else 'a'} control variate (local.scaffold)")
    if upload.variate is not None:
        _check_tensors(upload.variate, form, "upload: control variate")
    if settings.max_norm is not None:
        sent = dict(form.tensors())
        change2 = sum(float((t.double() - sent[n].double()).square().sum()) for n, t in upload.adapter.tensors())
        if math.sqrt(change2) > settings.max_norm:
            raise RejectedUpload(
                f"upload: its change has norm {math.sqrt(change2):.3g}, above checks.max_norm {settings.max_norm:g}"
            )
    _check_silence(upload, reports, turns)
    for what, count in (("held", upload.held), ("used", upload.used)):
        if reports and (isinstance(count, bool) or not isinstance(count, int) or not 0 < count < TOO_LARGE):
            raise RejectedUpload(f"upload: examples {what} must be a positive whole number, got {_short(count)}")
    _check_rotation(upload, form)
    _check_reports(upload, form, METRICS if reports else ())


def _check_tensors(adapter: Adapter, form: Adapter, who: str) -> None:
    try:
        same_form(adapter, form, who=who)
        same_update(adapter, form, who=who)
    except AdapterError as problem:
        raise RejectedUpload(str(problem)) from None
    sent = dict(form.tensors())
    for name, tensor in adapter.tensors():
        for what in ("dtype", "device", "layout"):
            if getattr(tensor, what) != getattr(sent[name], what):
                raise RejectedUpload(
                    f"{who}: {name} has {what} {getattr(tensor, what)}, the broadcast has {getattr(sent[name], what)}"
                )
        most = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not math.isfinite(most):
            raise RejectedUpload(f"{who}: {name} holds values that are not finite (NaN or infinite)")
        if most >= TOO_LARGE:
            raise RejectedUpload(f"{who}: {name} holds a value of size {most:.3g}; from 2^53 on products overflow")


def _check_rotation(upload: Upload, form: Adapter) -> None:
    if not upload.rotation:
        return
    if set(upload.rotation) != set(form.layers):
        raise RejectedUpload("upload: its rotations are not those of the adapter's layers")
    for name, pair in form.layers.items():
        if not upload.rotation[name].is_floating_point():
            raise RejectedUpload(f"upload: the rotation of {name} is {upload.rotation[name].dtype}")
        r = upload.rotation[name].double()
        if r.shape != (pair.rank, pair.rank):
            raise RejectedUpload(f"upload: the rotation of {name} has shape {tuple(r.shape)}, not rank {pair.rank}")
        off = (r @ r.mT - torch.eye(pair.rank, dtype=r.dtype, device=r.device)).abs().max()
        if not (float(off) < _ORTHOGONAL and float(torch.linalg.det(r)) > 0):
            raise RejectedUpload(f"upload: the rotation of {name} is not orthogonal with determinant 1")


def _check_silence(upload: Upload, reports: bool, turns: bool) -> None:
    forbidden = (() if reports else _REPORTS) + (() if turns else _TURNS)
    for what in forbidden:
        if getattr(upload, what):
            raise RejectedUpload(f"upload: it says something of the client's data beside its change ({what})")


def _check_reports(upload: Upload, form: Adapter, metrics: tuple[str, ...]) -> None:
    """The numbers beside the tensors end in log and report: all that are expected must be there, and be numbers."""
    reports: list[tuple[str, Mapping[str, float], tuple[str, ...], int]] = [("metrics", upload.metrics, metrics, 53)]
    if upload.layers:
        if set(upload.layers) != set(form.layers):
            raise RejectedUpload("upload: its drift is not that of the adapter's layers")
        # Sums of squares of as many numbers as a layer can have.
        reports += [(f"drift of {name}", found, DRIFT_KEYS, 3 * 53) for name, found in upload.layers.items()]
    for what, found, keys, bits in reports:
        for key in keys:
            value = found.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not -(2**bits) < value < 2**bits:
                raise RejectedUpload(
                    f"upload: {what}: {key} must be a finite number below 2^{bits} in size, got {_short(value)}"
                )
    for phase, seconds in upload.seconds.items():
        if not (isinstance(seconds, (int, float)) and 0 <= seconds < TOO_LARGE):
            raise RejectedUpload(
                f"upload: the seconds of {phase} must be a number that is not negative, got {_short(seconds)}"
            )


def _short(value: object) -> str:
    """A hostile number can have a million digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= TOO_LARGE:
        return "one above 2**53"
    return repr(value)[:40]
