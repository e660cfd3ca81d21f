"""onnxruntime-web's files, in the one version that the page is written for and tested with.

They are not part of this repository (the WebAssembly alone has 14 MB): they come out of the npm package, which the user
has (`--web-runtime`) or lets be fetched once (`--download`) into the user's cache.  Wherever they come from, they are those
of the pinned checksums.
"""

from __future__ import annotations

import hashlib
import http.client
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vitrm.errors import UserError, explain_os_error, first_line
from vitrm.export.settings import OnStage
from vitrm.system.cache import cache_folder as users_cache
from vitrm.system.files import atomic_files, atomic_path, sha256_of

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/{PACKAGE}"
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
SHA256: Mapping[str, str] = {  # of the files in the package's folder `dist`
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_LARGEST = 64 << 20  # bytes that are read of a package
_TIMEOUT = 60.0  # seconds without a byte


def find_runtime(given: str | None, *, download: bool, on_stage: OnStage = lambda message: None) -> Path:
    """The folder that holds SCRIPT and WASM, whose checksums have been compared.

    Args:
        given: the npm package as a .tgz, or a folder with its files; None for the cache.
        download: fetch the package where the cache lacks it.
        on_stage: told of the download.

    Raises:
        UserError: where they are not at hand, are of another version or damaged, or cannot be fetched.
    """
    cache = cache_folder()
    if given is not None:
        path = Path(given)
        if path.is_file():
            with _named(path):
                _unpack(path, cache)
            return cache
        for folder in (path / "dist", path / "package" / "dist", path / "node_modules/onnxruntime-web/dist", path):
            if (folder / WASM).is_file():
                check(folder)
                return folder
        raise UserError(
            f"--web-runtime {path} has no {WASM}: name the package of `npm pack onnxruntime-web@{VERSION}`, or its folder"
        )
    if all((cache / name).is_file() for name in SHA256):
        check(cache)
        return cache
    if not download:
        raise UserError(
            f"--web needs onnxruntime-web {VERSION}, which is not here: add --download (33 MB, once), or run "
            f"`npm pack onnxruntime-web@{VERSION}` and add --web-runtime {PACKAGE}"
        )
    on_stage(f"downloading onnxruntime-web {VERSION}")
    _download(cache)
    return cache


def cache_folder() -> Path:
    """The folder of the downloaded files, in the user's cache: one of their version."""
    return users_cache() / f"onnxruntime-web-{VERSION}"


def check(folder: Path) -> None:
    """Raises `UserError` unless the files in `folder` are those of VERSION."""
    for name, expected in SHA256.items():
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise explain_os_error(error, f"reading {folder / name}") from error
        if found != expected:
            raise UserError(
                f"{folder / name} is not that of onnxruntime-web {VERSION} (SHA-256 {found[:12]}…, expected {expected[:12]}…): "
                f"remove it, or name that version's package with --web-runtime"
            )


def _download(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_path(cache / PACKAGE) as temporary, _named(ADDRESS):  # the disk's errors are not the network's
        with urllib.request.urlopen(ADDRESS, timeout=_TIMEOUT) as answer, open(temporary, "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
                if file.tell() > _LARGEST:
                    raise UserError(f"{ADDRESS} has more than {_LARGEST:,} bytes: it is something else")
        _unpack(temporary, cache)
    (cache / PACKAGE).unlink()


def _unpack(package: Path, cache: Path) -> None:
    """Puts the two files of an npm package into the cache, whole and checked."""
    with tarfile.open(package) as tar, atomic_files(cache, list(SHA256)) as folder:
        for name in SHA256:
            member = tar.extractfile(f"package/dist/{name}")  # read as bytes: no path of the package is followed
            if member is None:
                raise UserError(f"{package} has no dist/{name}: expected onnxruntime-web {VERSION}")
            content = member.read(_LARGEST)
            if hashlib.sha256(content).hexdigest() != SHA256[name]:
                raise UserError(f"{package}: dist/{name} is not that of onnxruntime-web {VERSION}: get that version")
            (folder / name).write_bytes(content)


@contextmanager
def _named(source: object) -> Iterator[None]:
    """Turns what goes wrong with a package into a `UserError` that names it."""
    try:
        yield
    except (tarfile.TarError, EOFError, KeyError) as error:
        raise UserError(f"{source} is not the npm package of onnxruntime-web ({first_line(error)})") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise UserError(
            f"{source} could not be fetched ({reason}): try again, or fetch it elsewhere and name it with --web-runtime"
        ) from None
