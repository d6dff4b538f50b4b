"""TensorRT and TensorRT-RTX: two modules with one API, and the log that keeps what they have to say."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import BackendUnavailableError

logger = logging.getLogger(__name__)

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_INSTALL = {
    "tensorrt": "On a Jetson it comes with JetPack (make the virtual environment with --system-site-packages); "
    "elsewhere: pip install tensorrt-cu13, or tensorrt-cu12 where the driver has CUDA 12.",
    "tensorrt-rtx": "Install it: pip install '.[tensorrt-rtx]'",
}


@dataclass(frozen=True)
class TensorRt:
    """One of the two libraries, loaded.

    Attributes:
        backend: ``tensorrt`` or ``tensorrt-rtx``, as ``--backend`` takes it.
        api: Its module.
        log: An ``ILogger`` of that module with lists ``errors`` and ``warnings``; see :meth:`forget`.
    """

    backend: str
    api: Any
    log: Any

    @property
    def version(self) -> str:
        """The library's version, e.g. ``10.3.0``."""
        return str(self.api.__version__)

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which builds without a GPU and compiles kernels where the engine runs."""
        return self.backend == "tensorrt-rtx"

    def __str__(self) -> str:
        return f"{_TITLES[self.backend]} {self.version}"

    def forget(self) -> None:
        """Empty the log before a call whose messages are to be told."""
        self.log.errors.clear()
        self.log.warnings.clear()

    def reasons(self) -> str:
        """The errors since :meth:`forget`, one a line."""
        return lines(self.log.errors)


def installed_backend() -> str:
    """The backend whose library is installed, TensorRT first.

    Raises:
        BackendUnavailableError: Neither is.
    """
    for backend, module in MODULES.items():
        if importlib.util.find_spec(module) is not None:
            return backend
    cures = " ".join(f"{title}: {_INSTALL[backend]}" for backend, title in _TITLES.items())
    raise BackendUnavailableError(f"neither TensorRT nor TensorRT-RTX is installed. {cures}")


def import_tensorrt(backend: str) -> TensorRt:
    """Load the library behind a backend.

    Raises:
        BackendUnavailableError: There is no such backend, or its library is not installed or does not load.
    """
    if backend not in MODULES:
        raise BackendUnavailableError(f"engines are built for {', '.join(MODULES)}, not for {backend!r}.")
    try:
        api = importlib.import_module(MODULES[backend])
    except (ImportError, OSError) as error:  # OSError: the bindings are there and the libraries are not
        raise BackendUnavailableError(f"{_TITLES[backend]} is not there ({error}). {_INSTALL[backend]}") from error
    return TensorRt(backend, api, _log(api))


def lines(reasons: Sequence[str]) -> str:
    """Reasons, one a line, each only once."""
    return "".join(f"\n  {reason}" for reason in dict.fromkeys(reasons)) or " it gives no reason."


def _log(api: Any) -> Any:
    class Log(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == api.ILogger.WARNING:
                self.warnings.append(message)
            logger.debug("%s", message)

    return Log()
