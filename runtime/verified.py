"""What has passed ``verify``: a small record beside the engines of a bundle, which ``run`` looks for."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from runtime.backend import Engine
from runtime.bundle import Bundle
from runtime.machine import machine_name

VERIFIED_FILE = "verified.json"

logger = logging.getLogger(__name__)


def is_verified(bundle: Bundle, engine: Engine) -> bool:
    """Whether this engine has passed on a machine of this make: the same graph or plan, library, device, precision."""
    identity = _identity(bundle, engine)
    return any(identity.items() <= record.items() for record in _records(bundle))


def warn_unless_verified(bundle: Bundle, engine: Engine, backend: str, precision: str | None = None) -> None:
    """Log a warning that names the command to run, if the engine has not passed here.

    Args:
        backend, precision: What it was loaded with.
    """
    if not is_verified(bundle, engine):
        options = f" --backend {backend}" + (f" --precision {precision}" if precision else "")
        logger.warning(
            "%s has not been verified on this machine, its answers may differ from torch. "
            "Run once: deploy.py verify %s%s",
            engine.report,
            bundle.folder,
            options,
        )


def note_verified(bundle: Bundle, engine: Engine, sqnr_db: Mapping[str, float]) -> None:
    """Record that an engine has passed; an older record of the same engine is replaced.

    A bundle that cannot be written to stays without a record, which is logged.

    Args:
        sqnr_db: What it reached, by tensor, decibels; empty if values were compared in another way.
    """
    identity = _identity(bundle, engine)
    others = [record for record in _records(bundle) if not identity.items() <= record.items()]
    reached = {"lowest_sqnr_db": round(min(sqnr_db.values()), 1)} if sqnr_db else {}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        _write(bundle, [*others, {**identity, **reached, "passed_at": now}])
    except OSError as error:
        logger.warning("%s cannot be written, so run will ask for verify again: %s", bundle.folder, error.strerror)


def _identity(bundle: Bundle, engine: Engine) -> dict[str, str]:
    report = engine.report
    return {
        "machine": machine_name(),
        "backend": report.backend,
        "version": report.version,
        "provider": report.provider,
        "precision": report.precision,
        "graph_sha256": bundle.manifest.files[engine.graph.file],
        "plan_sha256": report.plan_sha256,
    }


def _records(bundle: Bundle) -> list[dict[str, Any]]:
    """What the file holds; nothing if it is not there or is no such file."""
    try:
        content = json.loads((bundle.folder / VERIFIED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [record for record in content if isinstance(record, dict)] if isinstance(content, list) else []


def _write(bundle: Bundle, records: list[dict[str, Any]]) -> None:
    """Whole or not at all."""
    partial = bundle.folder / f".{VERIFIED_FILE}.{os.getpid()}"
    try:
        partial.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, bundle.folder / VERIFIED_FILE)
    finally:
        partial.unlink(missing_ok=True)
