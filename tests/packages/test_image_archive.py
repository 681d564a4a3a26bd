"""Two builds of the same image give the same archive."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

SCRIPT = Path(__file__).parents[2] / ".ci" / "image_archive.py"
LAYER = b"the files of a layer"


def saved(path: Path, build: str) -> Path:
    """Write what Podman saves of an image whose build has this name in the place of random ones."""
    config = {
        "container": build,
        "parent": f"sha256:{build}",
        "config": {"Hostname": build, "User": "1000:1000", "Healthcheck": {"Test": ["CMD", "imagewatch", "status"]}},
        "container_config": {"Hostname": build},
        "history": [{"created_by": "ADD base.tar /", "comment": f"FROM {build}"}],
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(LAYER).hexdigest()}"]},
    }
    manifest = [{"Config": f"{build}.json", "RepoTags": ["b:1", "a:1"], "Layers": ["layer.tar"]}]
    files: Mapping[str, bytes] = {
        f"{build}.json": json.dumps(config).encode(),
        f"{build}/json": b"{}",
        "layer.tar": LAYER,
        "manifest.json": json.dumps(manifest).encode(),
    }
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_it_has_the_layers_and_settings_of_the_image_and_nothing_of_its_build(tmp_path: Path) -> None:
    written = []
    for build in ("first", "second"):
        new = tmp_path / f"{build}.new"
        subprocess.run([sys.executable, SCRIPT, saved(tmp_path / build, build), new], check=True)
        written.append(new.read_bytes())
    assert written[0] == written[1]
    with tarfile.open(tmp_path / "first.new") as archive:
        content = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    ((image,),) = (json.loads(content["manifest.json"]),)
    assert [content[name] for name in image["Layers"]] == [LAYER]
    assert image["Config"] == f"{hashlib.sha256(content[image['Config']]).hexdigest()}.json"
    settings = json.loads(content[image["Config"]])
    assert settings["config"] == {"User": "1000:1000", "Healthcheck": {"Test": ["CMD", "imagewatch", "status"]}}
    assert settings["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(LAYER).hexdigest()}"]
    assert settings["history"] == [{"created_by": "ADD base.tar /"}]
