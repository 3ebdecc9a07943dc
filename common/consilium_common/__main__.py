"""``python -m consilium_common`` is the ``consilium`` command, wherever scripts are installed."""

from consilium_common.cli import main

main()
