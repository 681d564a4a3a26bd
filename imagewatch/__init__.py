"""imagewatch: a watched folder for paid image generation."""

__version__ = "1.0.0"
