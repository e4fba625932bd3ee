"""``python -m dltrain.cli`` is ``dltrain``, where only the package has come and no command with it."""

from __future__ import annotations

from .main import main

main()
