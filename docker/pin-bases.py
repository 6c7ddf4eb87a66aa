#!/usr/bin/env python3
"""Pin the images of docker/bases.env, or of a file like it, to today's digests of their tags: ``pin-bases.py FILE``.

``NAME=image:tag`` becomes ``NAME=image:tag@sha256:…``. An older digest is replaced. Comments stay. If one image cannot
be looked up, the script writes nothing, prints one line on stderr and exits with 2.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

IMAGE = re.compile(r"^(\w+=)([^\s@#]+)(?:@[^\s#]+)?", re.MULTILINE)
SECONDS = 60
"""Time limit for one request to a registry, in seconds."""


def main(file: Path) -> int:
    """Rewrite ``file`` with today's digests and return the exit code."""
    try:
        pinned = IMAGE.sub(lambda line: f"{line[1]}{line[2]}@{digest(line[2])}", file.read_text())
    except LookupError as error:
        print(f"pin-bases.py: {error}; {file} is unchanged", file=sys.stderr)
        return 2
    file.write_text(pinned)
    print("\n".join(line[0] for line in IMAGE.finditer(pinned)))
    return 0


def digest(image: str) -> str:
    """Return ``sha256:…`` of an image's tag in its registry, for a multi-platform image that of the index.

    Raises:
        LookupError: the registry or Docker does not return a digest.
    """
    # Buildx prints its table for any format that begins with "{{.Manifest", so the format begins with `print`.
    words = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{print .Manifest.Digest}}"]
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LookupError(f"{image} cannot be looked up: {error}") from error
    if done.returncode or not re.fullmatch(r"sha256:[0-9a-f]{64}", done.stdout.strip()):
        raise LookupError(f"{image} cannot be looked up: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
