"""The pages' scripts come from npm: checked against the lock, only what is wanted, only once."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from tools import vendor_assets

ROOT = Path(__file__).resolve().parents[2]
FILES = {"thing": (("dist/a.js", "dist/*.woff"), "dist/", "assets/offline/thing")}
CONTENT = {"dist/a.js": b"a", "dist/b.woff": b"b", "dist/c.js": b"c"}


def archive(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in content.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def integrity(data: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


class Npm:
    """Hands out one archive, and counts how often it is asked."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked = data, []

    def pack(self, npm: str, spec: str, folder: Path) -> Path:
        self.asked.append(spec)
        path = folder / "thing.tgz"
        path.write_bytes(self.data)
        return path


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """A repository whose lock knows one package, and an npm that has it."""
    monkeypatch.setattr(vendor_assets, "FILES", FILES)
    monkeypatch.setattr(vendor_assets.shutil, "which", lambda name, **where: "/usr/bin/npm")

    def prepare(content: dict[str, bytes], recorded: str | None = None) -> Npm:
        data = archive(content)
        entry = {"version": "1.2.3", "integrity": recorded or integrity(data)}
        lock = {"packages": {"node_modules/thing": entry}}
        (tmp_path / "package-lock.json").write_text(json.dumps(lock))
        npm = Npm(data)
        monkeypatch.setattr(vendor_assets, "_pack", npm.pack)
        return npm

    return prepare


def test_only_what_is_wanted_is_kept_and_only_once(tmp_path, fetch):
    npm = fetch(CONTENT)
    old = tmp_path / "assets/offline/thing/old.js"
    old.parent.mkdir(parents=True)
    old.write_text("of another version")
    assert vendor_assets.ensure(tmp_path) is True
    kept = {p.name: p.read_bytes() for p in (tmp_path / "assets/offline/thing").iterdir()}
    assert kept == {"a.js": b"a", "b.woff": b"b"}
    assert vendor_assets.ensure(tmp_path) is False and npm.asked == ["thing@1.2.3"]
    npm = fetch({**CONTENT, "dist/a.js": b"new"})
    assert vendor_assets.ensure(tmp_path) is True and npm.asked
    assert (tmp_path / "assets/offline/thing/a.js").read_bytes() == b"new"


def test_an_archive_that_is_not_the_recorded_one_is_refused(tmp_path, fetch):
    fetch(CONTENT, recorded=integrity(b"something else"))
    with pytest.raises(vendor_assets.VendorError, match="thing: the archive's sha512 is"):
        vendor_assets.ensure(tmp_path)
    assert not (tmp_path / "assets").exists()


def test_a_package_without_an_expected_file_is_refused_each_time(tmp_path, fetch):
    fetch({"dist/b.woff": b"b"})
    for _ in range(2):
        with pytest.raises(vendor_assets.VendorError, match=r"holds no file for \['dist/a.js'\]"):
            vendor_assets.ensure(tmp_path)


def test_no_file_leaves_its_folder(tmp_path, fetch):
    fetch({**CONTENT, "dist/../../../b.woff": b"x"})
    with pytest.raises(vendor_assets.VendorError, match="unsafe path"):
        vendor_assets.ensure(tmp_path)


def test_a_missing_npm_is_told_with_what_to_do(tmp_path, fetch, monkeypatch):
    fetch(CONTENT)
    monkeypatch.setattr(vendor_assets.shutil, "which", lambda name, **where: None)
    with pytest.raises(vendor_assets.VendorError, match="Install Node"):
        vendor_assets.ensure(tmp_path)


def test_main_says_what_is_wrong_and_fails(monkeypatch, capsys):
    def fail() -> bool:
        raise vendor_assets.VendorError("no npm")

    monkeypatch.setattr(vendor_assets, "ensure", fail)
    assert vendor_assets.main() == 1 and "no npm" in capsys.readouterr().err


def test_every_package_is_locked_at_one_version():
    wanted = json.loads((ROOT / "package.json").read_text())
    versions = wanted["dependencies"] | wanted["devDependencies"]
    locked = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    assert set(vendor_assets.FILES) == set(versions)
    for name, version in versions.items():
        entry = locked[f"node_modules/{name}"]
        assert entry["version"] == version and entry["integrity"].startswith("sha512-")
