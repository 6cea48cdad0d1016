"""``rankload run``: a script or module of the user's, with `rankload.patch` in force."""

from __future__ import annotations

import io
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rankload._patch.patch import is_rank_0, patch, patch_of_process

_USAGE = "usage: python -m rankload run [-m MODULE | SCRIPT] [ARGUMENT...]"


def run(arguments: Sequence[str]) -> None:
    """Run a script or a module as ``__main__``, as Python itself would, with `rankload.patch` in force.

    Args:
        arguments: ``[script, *its arguments]`` or ``["-m", module, *its arguments]``.

    Raises:
        SystemExit: the arguments name nothing to run, or the script exits.
        BaseException: what the script raises.
    """
    if not arguments or arguments[0] in ("-h", "--help") or (arguments[:1] == ["-m"] and len(arguments) < 2):
        asks = bool(arguments) and arguments[0] in ("-h", "--help")
        sys.stderr.write(f"{_USAGE}\n")
        raise SystemExit(0 if asks else 2)
    patch()
    if is_rank_0():  # logging is the script's to configure, so this line does not go through it
        sys.stderr.write(f"rankload: {patch_of_process().description}\n")
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        _run_script(arguments[0])


def _run_script(name: str) -> None:
    file_name = os.path.join(os.getcwd(), name)  # noqa: PTH118, PTH109 - not normalised, as Python's own __file__
    sys.path[0] = str(Path(name).resolve().parent)
    try:
        with io.open_code(file_name) as file:
            code = compile(file.read(), name, "exec")
    except OSError as error:
        sys.stderr.write(f"rankload: cannot open file {name!r}: {error.strerror}\n")
        raise SystemExit(2) from None
    # a new module, which stays: threads and pickles may use it after the script's last line
    main = ModuleType("__main__")
    main.__dict__.update(__file__=file_name, __builtins__=__builtins__)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)  # noqa: S102 - it is what the user asks for
