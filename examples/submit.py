"""Drop a prompt, wait for the result, print the paths of the images. Needs only the standard library.

python submit.py ROOT "PROMPT" [IMAGE]…

ROOT contains inbox, outbox and errors. Exits with code 0 if there is an image, with 1 if there is an error file, and
with 69 if neither appeared in time; the prompt is then still processed. With 64 nothing was dropped.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import tomllib
import uuid
from pathlib import Path
from typing import Any


def drop(root: Path, text: str, images: list[Path], **options: object) -> str:
    """Put a prompt and copies of its images into the inbox; return its name."""
    inbox, name = root / "inbox", uuid.uuid4().hex[:12]  # a unique name
    hidden = inbox / f".{name}.tmp"
    names = [f"{name}.in{number}{image.suffix}" for number, image in enumerate(images, 1)]
    for image, final in zip(images, names, strict=True):
        shutil.copyfile(image, hidden)
        hidden.rename(inbox / final)
    front = "".join(f"{key} = {toml(value)}\n" for key, value in {**options, "input_images": names}.items())
    hidden.write_text(f"+++\n{front}+++\n{text}\n", encoding="utf-8")
    hidden.rename(inbox / f"{name}.prompt.txt")
    return name


def toml(value: object) -> str:
    """Write a string, a number or a list of strings. TOML is like JSON here, except for surrogate pairs and DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def wait(root: Path, name: str, seconds: float = 900) -> tuple[Path, dict[str, Any]] | None:
    """Return the path of the receipt or error file and its content, or None if it takes longer.

    To check twice a second works on every file system; a share has no change events.
    """
    pause = threading.Event()
    for _ in range(int(seconds * 2)):
        for path in (root / "outbox" / f"{name}.receipt.toml", root / "errors" / f"{name}.error.toml"):
            if path.exists():  # it appears complete, after all other files
                return path, tomllib.loads(path.read_text(encoding="utf-8"))
        pause.wait(0.5)
    return None


def main(root: str, text: str, *images: str) -> int:
    """Drop one prompt and print its result."""
    if unnamed := [image for image in images if not Path(image).suffix]:
        print(f"{unnamed[0]}: its name must end in .png, .jpg, .jpeg or .webp", file=sys.stderr)
        return 64
    name = drop(Path(root), text, [Path(image) for image in images])
    over = wait(Path(root), name)
    if over is None:
        print(f"{name} is not finished yet; do not drop it again", file=sys.stderr)
        return 69
    path, result = over
    if path.name.endswith(".error.toml"):
        print(f"{result['message']} (charged: {result['charged']})\n{result['next']}", file=sys.stderr)
        return 1
    for image in result["images"]:
        print(path.parent / image["file"])
    print(f"{result.get('credits_charged', 'an unknown number of')} credits", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
