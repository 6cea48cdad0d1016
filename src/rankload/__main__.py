"""``python -m rankload`` is ``rankload``."""

from rankload._cli import main

main()
