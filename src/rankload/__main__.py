"""``python -m rankload`` is ``rankload``."""

from rankload._cli.app import main

main()
