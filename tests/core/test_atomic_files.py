"""Files that are whole or not there, and tensor files that say what is wrong with them."""

import errno
import os
from pathlib import Path

import pytest
import torch
from core_helpers import refused

from fedrot.core.errors import AdapterError, RunError, choices
from fedrot.core.files import read_tensors, tensor_bytes, write_atomic


def test_folders_are_made_and_content_is_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    for content in (b"one", b"", b"three"):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_whatever_stops_the_write_the_old_file_is_whole_and_alone(tmp_path, monkeypatch, step, problem):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def stop(*_: object) -> None:
        raise problem

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), stop)
    with pytest.raises(type(problem)):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    seen = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(path.read_bytes()), sync(fd)))
    write_atomic(path, b"new and longer")
    assert seen == [b"old"]  # all of the new content is on its way to the disk, none of it in the file


def test_tensors_are_read_as_they_were_written(tmp_path):
    base = torch.randn(4, 6)
    tensors = {"view": base[:, ::2], "turned": base.T, "shared": base, "half": base.half(), "whole": torch.arange(3)}
    path = tmp_path / "x.safetensors"
    write_atomic(path, tensor_bytes(tensors, {"format": "pt"}))
    again = read_tensors(path, RunError)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


def test_the_same_tensors_give_the_same_bytes():
    one, two = torch.ones(2), torch.zeros(3)
    assert tensor_bytes({"a": one, "b": two}) == tensor_bytes({"a": one.clone(), "b": two.clone()})


@pytest.mark.parametrize("error", [AdapterError, RunError])
def test_a_file_that_cannot_be_read_is_named_in_the_caller_s_own_error(tmp_path, error):
    path = tmp_path / "x.safetensors"
    with refused(str(path), "no such file", error=error):
        read_tensors(path, error)
    whole = tensor_bytes({"a": torch.ones(40)})
    for content in (b"", b"junk", whole[:-1], whole[:9], b"\xff" * 64, whole + b"more"):
        path.write_bytes(content)
        with refused(str(path), "damaged", error=error):
            read_tensors(path, error)


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["b"], "b"), (["b", "a"], "a or b"), ({"c", "b", "a"}, "a, b or c"), ([2, 1], "1 or 2")],
)
def test_choices_are_listed_for_the_end_of_a_sentence(names, text):
    assert choices(names) == text
