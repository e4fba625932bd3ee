"""``python -m dltrain`` is ``dltrain``, where the command itself is not at hand."""

from .cli.main import main

main()
