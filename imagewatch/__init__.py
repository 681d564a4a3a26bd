"""imagewatch: a watched folder for paid image generation."""

__version__ = "0.1.0"
