"""The environments in ``environments/``, recorded on a SLURM cluster (see the README there)."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "environments"


def recorded(name: str) -> dict[str, str]:
    """Return the variables of one process."""
    lines = (_FOLDER / f"{name}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)
