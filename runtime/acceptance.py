"""The acceptance report of a machine: every backend tried on a bundle, and what each command said, in one file.

The trials are commands of ``deploy.py``, each in a process of its own: what crashes one leaves the others alone, and
whoever reads the report can repeat each line of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from runtime.backend import BACKENDS, PRECISIONS
from runtime.bundle import load_bundle
from runtime.doctor import examine
from runtime.errors import SinkError
from runtime.machine import describe_device, machine_name

SCHEMA_VERSION = 1
TEXT_CHARACTERS = 4000

State = Literal["passed", "differs", "not here", "failed"]


@dataclass(frozen=True)
class CommandRun:
    """One command and what came of it.

    Attributes:
        command: As one would type it.
        exit_code: 0 done, 1 found different, 2 cannot be done; below 0 the number of the signal that ended it.
        result: What it printed, as JSON if it is that.
        stderr: The end of its log.
    """

    command: str
    exit_code: int
    wall_s: float
    result: Any
    stderr: str

    @property
    def error(self) -> str:
        """What went wrong, in the command's last words; how it ended where it could not say so itself."""
        if self.exit_code == 0:
            return ""
        if self.exit_code < 0:
            return f"ended by {signal.Signals(-self.exit_code).name}"
        lines = [line for line in self.stderr.splitlines() if line.strip()] or [f"exit code {self.exit_code}"]
        named = [index for index, line in enumerate(lines) if line.partition(":")[0].endswith("Error")]
        return "\n".join(lines[named[-1] if named else -1 :])


@dataclass
class Trial:
    """One way to run one bundle.

    Attributes:
        bundle: Its folder.
        precision: What the backend was asked to compute in; None is the graph's own.
        state: ``not here``: the library, device or precision is missing, and ``reason`` says what to install.
        reason: Why it did not pass.
        build, verify, profile: The commands that were run; None if the one before did not get so far.
    """

    bundle: str
    backend: str
    precision: str | None
    state: State = "passed"
    reason: str = ""
    build: CommandRun | None = None
    verify: CommandRun | None = None
    profile: CommandRun | None = None

    @property
    def options(self) -> list[str]:
        """What every command of this trial is called with."""
        return [self.bundle, "--backend", self.backend, *(["--precision", self.precision] if self.precision else [])]


@dataclass
class Acceptance:
    """Everything that is sent back.

    Attributes:
        machine: Processor or board, and cards.
        device: What the system tells about itself, by the file or command that told it.
        findings: What ``doctor`` found.
        bundles: Manifest of each bundle, by its folder.
        finished: False in a report that was interrupted.
    """

    written_at: str
    machine: str
    device: dict[str, str]
    findings: list[dict[str, str]]
    bundles: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
    finished: bool = False
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        """Whether something ran here, and all that ran agreed with torch."""
        states = {trial.state for trial in self.trials}
        return "passed" in states and states <= {"passed", "not here"}


def run_acceptance(
    folders: Sequence[Path],
    output: Path,
    deploy: Sequence[str],
    *,
    steps: int = 30,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Acceptance:
    """Try every backend in every precision on every bundle.

    The file is written anew, whole, after every trial, so that an interrupted run leaves what it found.

    Args:
        folders: Bundles, for instance one network in several precisions.
        output: JSON file to write.
        deploy: How ``deploy.py`` is started, e.g. ``[sys.executable, "deploy.py"]``.
        steps: Measured steps of each row of a profile.
        on_trial: Called with every trial when it has ended.

    Raises:
        BundleError: A folder holds no bundle.
        SinkError: The file cannot be written.
    """
    manifests = {str(folder): load_bundle(folder).manifest.model_dump(mode="json") for folder in folders}
    report = Acceptance(
        written_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine_name(),
        device=describe_device(),
        findings=[asdict(finding) for finding in examine()],
        bundles=manifests,
    )
    _write(report, output)
    for trial in _trials(manifests):
        _try(trial, deploy, steps)
        report.trials.append(trial)
        _write(report, output)
        on_trial(trial)
    report.finished = True
    _write(report, output)
    return report


def _trials(manifests: Mapping[str, Any]) -> Iterator[Trial]:
    """A graph in fp32 is tried in every precision that a backend can make of it, another one as it is."""
    for folder, manifest in manifests.items():
        for backend in BACKENDS:
            choices = PRECISIONS.get(backend, (None,)) if manifest["precision"] == "fp32" else (None,)
            for precision in choices:
                yield Trial(folder, backend, precision)


def _try(trial: Trial, deploy: Sequence[str], steps: int) -> None:
    """Run the commands of a trial, up to the first that does not succeed."""
    if trial.backend.startswith("tensorrt"):
        trial.build = _run(deploy, "build", trial.bundle, "--backend", trial.backend)
        if trial.build.exit_code not in (0, 1):  # 1: built, with layers in another precision than asked
            trial.state, trial.reason = _state(trial.build), trial.build.error
            return
    trial.verify = _run(deploy, "verify", *trial.options, "--json")
    trial.state, trial.reason = _state(trial.verify), trial.verify.error
    if trial.state in ("passed", "differs"):  # what it is worth to mend it is worth knowing too
        trial.profile = _run(deploy, "profile", *trial.options, "--steps", str(steps), "--json")
        if trial.profile.exit_code and trial.state == "passed":
            trial.state, trial.reason = _state(trial.profile), trial.profile.error


def _state(run: CommandRun) -> State:
    if run.exit_code == 0:
        return "passed"
    if run.exit_code == 1 and isinstance(run.result, dict):
        return "differs"
    return "not here" if run.error.startswith("BackendUnavailableError") else "failed"


def _run(deploy: Sequence[str], *arguments: str) -> CommandRun:
    started = time.perf_counter()
    done = subprocess.run([*deploy, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    try:
        result = json.loads(done.stdout)
    except ValueError:
        result = done.stdout[-TEXT_CHARACTERS:]
    wall_s = round(time.perf_counter() - started, 2)
    return CommandRun(
        f"deploy.py {' '.join(arguments)}", done.returncode, wall_s, result, done.stderr[-TEXT_CHARACTERS:]
    )


def _write(report: Acceptance, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise SinkError(f"{path} cannot be written: {error.strerror}. Choose another file with --output.") from error
