"""Write an archive of ``podman save`` again without what differs from build to build.

That is the id and the host name of the containers in which the image was made, and the ids that follow from them. All
layers stay as they are: ``python3 .ci/image_archive.py FROM TO``.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from typing import IO


def settled(text: bytes) -> bytes:
    """Return the configuration of an image without what differs from build to build."""
    image = json.loads(text)
    for name in ("container", "parent", "id"):
        image.pop(name, None)
    for name in ("config", "container_config"):
        image.get(name, {}).pop("Hostname", None)
    for step in image.get("history", []):
        if step.get("comment", "").startswith("FROM "):
            del step["comment"]
    return json.dumps(image, sort_keys=True).encode()


def main(old: str, new: str) -> None:
    """Copy an archive with one image.

    Args:
        old: The archive as Podman writes it.
        new: The archive to write; "podman load" and "docker load" take it.
    """
    with tarfile.open(old) as source, tarfile.open(new, "w") as target:

        def read(name: str) -> IO[bytes]:
            file = source.extractfile(name)
            assert file is not None, name
            return file

        def write(name: str, size: int, file: IO[bytes]) -> None:
            member = tarfile.TarInfo(name)
            member.size = size
            target.addfile(member, file)

        (image,) = json.load(read("manifest.json"))
        config = settled(read(image["Config"]).read())
        image["Config"] = f"{hashlib.sha256(config).hexdigest()}.json"
        image["RepoTags"].sort()
        write(image["Config"], len(config), io.BytesIO(config))
        for layer in image["Layers"]:
            write(layer, source.getmember(layer).size, read(layer))
        manifest = json.dumps([image], sort_keys=True).encode()
        write("manifest.json", len(manifest), io.BytesIO(manifest))


if __name__ == "__main__":
    main(*sys.argv[1:])
