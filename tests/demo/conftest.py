import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# First, so that `demo` is the package there and not this folder, which pytest's own path would offer.
sys.path.insert(0, str(ROOT / "launch"))


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """Where the demo itself keeps the weights, so that they are downloaded once for all runs."""
    return Path(sys.prefix) / "share" / "rankload-demo"


@pytest.fixture(scope="session")
def weights(weights_dir: Path) -> Callable[[str], Path]:
    """The checkpoint of a capacity."""
    import fetch_weights

    return lambda capacity: fetch_weights.fetch(weights_dir, [capacity])[0]


@pytest.fixture
def offline() -> dict[str, str]:
    """An environment in which pip reaches no index: nothing can listen on port 0."""
    unreachable = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:0", "PIP_RETRIES": "0"}
    return {**os.environ, **unreachable}
