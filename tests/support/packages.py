"""A package index that is a directory of tiny wheels."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

from convert.packages import PackagedFile

VERSION = "1.0.0"


def write_wheel(index: Path, package: str, members: Mapping[str, bytes]) -> Path:
    """Write a wheel that pip takes, with some members."""
    name = package.replace("-", "_")
    path = index / f"{name}-{VERSION}-py3-none-any.whl"
    about = f"{name}-{VERSION}.dist-info"
    own = {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSION}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in {**own, **members}.items():
            archive.writestr(member, content)
    return path


def package_file(index: Path, name: str, content: bytes, parts: int) -> PackagedFile:
    """Split a file over as many packages as it has parts."""
    length = -(-len(content) // parts)
    packages = tuple(f"{name}-part{number}" for number in range(1, parts + 1))
    for number, package in enumerate(packages):
        part = content[number * length : (number + 1) * length]
        write_wheel(index, package, {f"{name}/data/part{number + 1:02}.bin": part})
    checksum = hashlib.sha256(content).hexdigest()
    return PackagedFile(packages, VERSION, "*/data/part*.bin", len(content), checksum)
