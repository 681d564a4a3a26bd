"""The exit codes except 0, which is success.

``commands/main`` chooses the code of an error. A command that ends without an error chooses its own, and so does
``submit`` if an error comes after it has dropped prompts. ``__main__`` repeats 70: it must not depend on an import.
"""

from __future__ import annotations

from typing import Final

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 64
EXIT_HELD: Final = 69
EXIT_INTERNAL: Final = 70
EXIT_SPOOL: Final = 74
EXIT_RUNNING: Final = 75
EXIT_CONFIG: Final = 78
EXIT_SIGNAL: Final = 128
"""Plus the number of a signal, as of a shell."""
