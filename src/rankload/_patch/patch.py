"""`patch` and `unpatch`: once-per-job downloads for code that does not know rankload."""

from __future__ import annotations

import functools
import logging
import threading
from types import ModuleType, TracebackType

from rankload._coordination.membership import own_identity
from rankload._patch import huggingface_hub, open_clip, torch_hub
from rankload._patch.bindings import Function, rebind
from rankload._patch.import_hook import ImportHook
from rankload.errors import ArgumentError

_logger = logging.getLogger("rankload")


class Patch:
    """The patch of this process. It is in force as long as one call of `apply` has not been taken back.

    Attributes:
        description: what is patched, for a log line.
    """

    def __init__(self) -> None:
        self.description = ""
        self._count = 0
        self._lock = threading.RLock()
        self._replaced: list[tuple[Function, Function]] = []
        self._methods: list[tuple[type, str, Function]] = []
        self._hook = ImportHook(
            {
                "huggingface_hub.file_download": self._patch_huggingface_hub,
                "huggingface_hub._snapshot_download": self._patch_huggingface_hub,
                "huggingface_hub.hf_api": self._patch_hub_api,
                open_clip.MODULE: self._patch_open_clip,
            }
        )

    def apply(self) -> None:
        """Replace the functions, unless that is done."""
        with self._lock:
            self._count += 1
            if self._count > 1:
                return
            known = [*torch_hub.replacements()]
            self._replace(*((original, replacement) for _, original, replacement in known))
            self._hook.install()
            names = [name for name, _, _ in known]
            patched = f"torch.hub ({', '.join(names)})" if names else "nothing of torch.hub"
            self.description = f"patched {patched}, huggingface_hub and open_clip where they are imported"
            if is_rank_0():
                _logger.info(self.description)

    def take_back(self) -> None:
        """Take one call of `apply` back."""
        with self._lock:
            if self._count == 1:
                self.undo()
            elif self._count:
                self._count -= 1

    def undo(self) -> None:
        """Put everything back, however often `apply` was called."""
        with self._lock:
            self._count = 0
            self._hook.remove()
            rebind((replacement, original) for original, replacement in self._replaced)
            self._replaced.clear()
            while self._methods:
                setattr(*self._methods.pop())

    def _replace(self, *pairs: tuple[Function, Function]) -> None:
        rebind(pairs)
        self._replaced += pairs

    def _patch_huggingface_hub(self, module: ModuleType) -> None:
        name = huggingface_hub.FUNCTIONS[module.__name__]
        original = _original(getattr(module, name, None))
        if original is None:
            _logger.warning("%s has no %s: this version of huggingface_hub is left alone", module.__name__, name)
        elif (replacement := huggingface_hub.once(original)) is not None:
            self._replace((original, replacement))
        inner = _original(getattr(module, "hf_hub_download", None))
        if name == "snapshot_download" and inner is not None:
            huggingface_hub.keep_inner_calls(module, inner)

    def _patch_hub_api(self, module: ModuleType) -> None:
        api_type, name = module.HfApi, "resolve_revision"
        original = vars(api_type).get(name)
        if original is None:  # before 2.4 nobody asks in this way
            return
        setattr(api_type, name, huggingface_hub.resolved_once(original))
        self._methods.append((api_type, name, original))
        bound = getattr(module, name, None)  # huggingface_hub.resolve_revision is a method of an HfApi of its own
        if bound is not None and getattr(bound, "__func__", None) is original:
            self._replace((bound, getattr(bound.__self__, name)))

    def _patch_open_clip(self, module: ModuleType) -> None:
        original = getattr(module, open_clip.FUNCTION, None)
        if original is not None and (replacement := open_clip.once(original)) is not None:
            self._replace((original, replacement))


def _original(function: Function | None) -> Function | None:
    """Return a function of huggingface_hub, or the one that a replacement of it wraps."""
    while function is not None and function.__globals__["__name__"] == huggingface_hub.__name__:
        function = function.__wrapped__  # type: ignore[attr-defined]
    return function


def is_rank_0() -> bool:
    """Return whether this process is the one of its job that says what all do."""
    try:
        return own_identity().rank == 0
    except ArgumentError:  # the launcher's variables contradict each other
        return True


class PatchContext:
    """What `patch` returns: a context manager that takes this call of `patch` back."""

    def __init__(self, patch: Patch) -> None:
        self._patch = patch

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._patch.take_back()


@functools.cache
def patch_of_process() -> Patch:
    """Return the one patch of this process."""
    return Patch()


def patch() -> PatchContext:
    """Make the downloads of torch.hub, huggingface_hub and open_clip once per job, for all code in this process.

    For scripts and libraries that call them: torchvision, timm, transformers and others. **Not collective**: any rank
    may call the patched functions at any time, alone or with others, as scripts do under ``if rank == 0:``. The first
    process of the job that comes downloads; the others wait for the file, never for a rank. Without a launcher there is
    one process, and only torch.hub's functions change: their files are verified, resumed and kept as by `rankload.hub`.

    Replaced are torch.hub's ``load_state_dict_from_url``, ``download_url_to_file``, ``load``, ``list`` and ``help``,
    torch.utils.model_zoo's ``load_url``, huggingface_hub's ``hf_hub_download`` and ``snapshot_download``, and
    open_clip's ``download_pretrained_from_url``: wherever a module has bound them, and in modules that are imported
    later. Signatures, defaults, error types, cache directories and layouts stay those of the libraries. A version with
    other parameters is left alone, with a warning.

    Returns:
        A context manager. Leaving it puts everything back, unless another call of ``patch`` is in force. Without
        ``with``, the patch stays until `unpatch`.
    """
    process_patch = patch_of_process()
    process_patch.apply()
    return PatchContext(process_patch)


def unpatch() -> None:
    """Put back everything that `patch` has replaced; do nothing if the patch is not in force. Not collective."""
    patch_of_process().undo()
