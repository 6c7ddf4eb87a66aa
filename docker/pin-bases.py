#!/usr/bin/env python3
"""Pin docker/bases.env, or a file like it, by what its tags mean today: ``pin-bases.py FILE``.

``NAME=image:tag`` becomes ``NAME=image:tag@sha256:…``, or gets a newer digest; comments stay. Where one image cannot be
looked up, nothing is written: one line on stderr, exit code 2.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

IMAGE = re.compile(r"^(\w+=)([^\s@#]+)(?:@[^\s#]+)?", re.MULTILINE)
SECONDS = 60
"""A registry that lets a question lie this long will not answer it."""


def main(file: Path) -> int:
    """Write ``file`` again with today's digests; the exit code."""
    try:
        pinned = IMAGE.sub(lambda line: f"{line[1]}{line[2]}@{digest(line[2])}", file.read_text())
    except LookupError as error:
        print(f"pin-bases.py: {error}; {file} is as it was", file=sys.stderr)
        return 2
    file.write_text(pinned)
    print("\n".join(line[0] for line in IMAGE.finditer(pinned)))
    return 0


def digest(image: str) -> str:
    """``sha256:…`` of an image's tag in its registry: of the index where it has one, so for every platform.

    Raises:
        LookupError: the registry, or Docker, does not say.
    """
    # `print`, because Buildx answers whatever begins with "{{.Manifest" with its table for people.
    words = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{print .Manifest.Digest}}"]
    try:
        asked = subprocess.run(words, check=False, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LookupError(f"{image} cannot be looked up: {error}") from error
    if asked.returncode or not re.fullmatch(r"sha256:[0-9a-f]{64}", asked.stdout.strip()):
        raise LookupError(f"{image} cannot be looked up: {' '.join((asked.stderr or asked.stdout).split())}")
    return asked.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
