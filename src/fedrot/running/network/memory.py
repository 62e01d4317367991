"""What a client keeps between rounds, on the disk of its site."""

from collections.abc import Iterator
from pathlib import Path

from fedrot.core.errors import RunError
from fedrot.core.files import flush_folder, read_tensors, tensor_bytes, write_atomic
from fedrot.core.methods.base import ClientState
from fedrot.running.network.messages import Refusal


class Memory:
    """A file a round, of what a client would keep of it: the server says by the next request which of them counts.

    So a round that the server drops, or plays again after it was stopped, changes nothing of what was kept before it.
    The folder is of one run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, round: int | None, who: str) -> ClientState:
        """What was kept of a round; nothing before the first. `Refusal` where it is gone, `RunError` where it cannot be
        read.
        """
        if round is None:
            return {}
        path = self._path(round)
        if not path.exists():
            raise Refusal(
                f"{who}: the server took the upload of round {round} in, and what was kept of it is gone here; bring "
                f"{path.name} of the run's folder there back"
            )
        return read_tensors(path, RunError)

    def hold(self, round: int, state: ClientState, accepted: int | None) -> None:
        """Keep what a round leaves, on disk when this returns, beside what was kept of the last accepted round; what
        other rounds before it left is dropped.
        """
        write_atomic(self._path(round), tensor_bytes(state))
        flush_folder(self._folder)
        for number, path in self._kept():
            if number < round and number != accepted:
                path.unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round:06d}.safetensors"

    def _kept(self) -> Iterator[tuple[int, Path]]:
        for path in sorted(self._folder.glob("round-*.safetensors")):
            if (number := path.stem.removeprefix("round-")).isdecimal():
                yield int(number), path
