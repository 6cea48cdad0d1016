"""The command line, ``rankload``. ``rankload prefetch`` fills the cache on a node with internet access."""

from rankload._cli.app import app as app
from rankload._cli.main import main as main
