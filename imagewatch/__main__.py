"""``python -m imagewatch``."""

from imagewatch.cli import main

main()
