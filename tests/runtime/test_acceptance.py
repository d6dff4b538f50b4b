"""The acceptance report: every way to run a bundle is tried, and whatever happens to one is told of that one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from runtime import acceptance, machine
from runtime.acceptance import CommandRun, run_acceptance
from runtime.backend import BACKENDS, PRECISIONS
from runtime.errors import BundleError, SinkError

# A deploy.py that does as its fourth argument, the backend, is called, and prints what it was called with
FAKE = """
import json, os, signal, sys

def fail(code, message):
    sys.stderr.write(message)
    sys.exit(code)

command, bundle, _, backend, *options = sys.argv[1:]
if backend == "absent":
    fail(2, "a log line\\nBackendUnavailableError: no such device. Install it: pip install absent")
if backend == "crashes":
    os.kill(os.getpid(), signal.SIGSEGV)
if backend == "tensorrt-unbuilt" and command == "build":
    fail(2, "BackendError: TensorRT refuses the graph:\\n  node 3\\n  node 4")
if backend == "unmeasured" and command == "profile":
    fail(2, "StepError: out of memory")
print(json.dumps({"ran": [command, *options]}))
if backend == "tensorrt-mixed" and command == "build":
    sys.exit(1)
if backend == "wrong" and command == "verify":
    fail(1, "ExportMismatchError: it differs")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """``fake("absent", "crashes")``: a deploy.py and a world with these backends; gives how it is started."""

    def make(*backends: str, precisions: dict[str, tuple[str, ...]] | None = None) -> list[str]:
        script = tmp_path / "fake_deploy.py"
        script.write_text(FAKE)
        monkeypatch.setattr(acceptance, "BACKENDS", dict.fromkeys(backends))
        monkeypatch.setattr(acceptance, "PRECISIONS", precisions or {})
        monkeypatch.setattr(acceptance, "examine", lambda: iter(()))
        monkeypatch.setattr(acceptance, "describe_device", lambda: {})
        return [sys.executable, "-S", str(script)]

    return make


def test_every_backend_is_tried_in_every_precision(fake, micro_bundle, tmp_path):
    deploy = fake("one", "two", precisions={"two": ("fp32", "bf16")})
    report = run_acceptance([micro_bundle], tmp_path / "report.json", deploy, steps=7)
    assert [(trial.backend, trial.precision) for trial in report.trials] == [
        ("one", None), ("two", "fp32"), ("two", "bf16")
    ]  # fmt: skip
    last = report.trials[-1]
    assert last.verify.result == {"ran": ["verify", "--precision", "bf16", "--json"]}
    assert last.profile.result == {"ran": ["profile", "--precision", "bf16", "--steps", "7", "--json"]}
    assert last.profile.command == (f"deploy.py profile {micro_bundle} --backend two --precision bf16 --steps 7 --json")
    assert report.passed and last.state == "passed" and last.build is None


def test_file_holds_the_whole_report(fake, micro_bundle, tmp_path):
    path = tmp_path / "report.json"
    report = run_acceptance([micro_bundle], path, fake("one", "absent"))
    content = json.loads(path.read_text())
    assert content == json.loads(json.dumps(asdict(report))) and content["finished"]
    assert content["bundles"][str(micro_bundle)]["presets"]["0.55"] == [42, 32, 26, 20]
    assert [path.name for path in tmp_path.iterdir() if "report" in path.name] == ["report.json"]


def trials(fake, micro_bundle, tmp_path, *backends):
    report = run_acceptance([micro_bundle], tmp_path / "report.json", fake(*backends))
    return report, {trial.backend: trial for trial in report.trials}


def test_what_is_not_here_is_no_failure(fake, micro_bundle, tmp_path):
    report, found = trials(fake, micro_bundle, tmp_path, "absent", "one")
    assert report.passed and found["absent"].state == "not here" and found["absent"].profile is None
    assert found["absent"].reason == "BackendUnavailableError: no such device. Install it: pip install absent"


def test_nothing_here_is_no_success(fake, micro_bundle, tmp_path):
    assert not trials(fake, micro_bundle, tmp_path, "absent")[0].passed


def test_crash_is_told_and_the_others_go_on(fake, micro_bundle, tmp_path):
    report, found = trials(fake, micro_bundle, tmp_path, "crashes", "one")
    assert (found["crashes"].state, found["crashes"].reason) == ("failed", "ended by SIGSEGV")
    assert found["one"].state == "passed" and not report.passed


def test_engine_that_differs_is_measured_all_the_same(fake, micro_bundle, tmp_path):
    report, found = trials(fake, micro_bundle, tmp_path, "wrong")
    assert found["wrong"].state == "differs" and found["wrong"].reason == "ExportMismatchError: it differs"
    assert found["wrong"].verify.result and found["wrong"].profile.exit_code == 0 and not report.passed


def test_engines_are_built_first(fake, micro_bundle, tmp_path):
    _, found = trials(fake, micro_bundle, tmp_path, "tensorrt", "tensorrt-unbuilt", "tensorrt-mixed")
    assert found["tensorrt"].build.result == {"ran": ["build"]} and found["tensorrt"].state == "passed"
    mixed = found["tensorrt-mixed"]  # built, with layers in another precision: that is for verify to judge
    assert mixed.build.exit_code == 1 and mixed.state == "passed"
    unbuilt = found["tensorrt-unbuilt"]
    assert unbuilt.state == "failed" and unbuilt.verify is None
    assert unbuilt.reason == "BackendError: TensorRT refuses the graph:\n  node 3\n  node 4"


def test_profile_that_fails_is_told(fake, micro_bundle, tmp_path):
    _, found = trials(fake, micro_bundle, tmp_path, "unmeasured")
    assert (found["unmeasured"].state, found["unmeasured"].reason) == ("failed", "StepError: out of memory")


def test_interrupted_report_holds_what_was_found(fake, micro_bundle, tmp_path):
    def interrupt(trial) -> None:
        if trial.backend == "two":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_acceptance([micro_bundle], tmp_path / "report.json", fake("one", "two", "three"), on_trial=interrupt)
    content = json.loads((tmp_path / "report.json").read_text())
    assert [trial["backend"] for trial in content["trials"]] == ["one", "two"] and not content["finished"]


def test_file_that_cannot_be_written_ends_it_before_the_first_trial(fake, micro_bundle, tmp_path):
    with pytest.raises(SinkError, match=r"nowhere.report.json cannot be written.*--output"):
        run_acceptance([micro_bundle], tmp_path / "nowhere/report.json", fake("one"), on_trial=pytest.fail)


def test_folder_that_is_no_bundle_ends_it_before_the_first_trial(fake, micro_bundle, tmp_path):
    with pytest.raises(BundleError, match="no bundle"):
        run_acceptance([micro_bundle, tmp_path], tmp_path / "report.json", fake("one"), on_trial=pytest.fail)


@pytest.mark.parametrize(
    ("code", "stderr", "error"),
    [
        (0, "a warning", ""),
        (2, "", "exit code 2"),
        (2, "first\n\nlast\n", "last"),
        (2, "Usage: deploy.py\nNo such command 'build'.\n", "No such command 'build'."),
        (1, "Traceback\nValueError: deep\n", "ValueError: deep"),
        (-9, "a log line", "ended by SIGKILL"),
    ],
)
def test_error_of_a_command(code, stderr, error):
    assert CommandRun("deploy.py verify x", code, 0.1, None, stderr).error == error


def test_device_is_described_by_what_is_there(monkeypatch, tmp_path):
    (tmp_path / "release").write_text("R36 (release)\n")
    monkeypatch.setattr(machine, "_FILES", (tmp_path / "release", tmp_path / "absent"))
    commands = ((sys.executable, "-c", "print('mode 0')"), ("/no/such/program",), (sys.executable, "-c", "exit(1)"))
    monkeypatch.setattr(machine, "_COMMANDS", commands)
    assert machine.describe_device() == {
        str(tmp_path / "release"): "R36 (release)",
        f"{sys.executable} -c print('mode 0')": "mode 0",
    }


@pytest.mark.slow
def test_the_real_commands_on_this_machine(own_bundle, tmp_path, monkeypatch):
    """Everything that is installed here, as its owner would run it; what is not is told with its cure."""
    deploy = [sys.executable, str(Path(__file__).parents[2] / "deploy.py")]
    report = run_acceptance([own_bundle], tmp_path / "report.json", deploy, steps=1)
    assert {trial.backend for trial in report.trials} == set(BACKENDS)
    found = {(trial.backend, trial.precision): trial for trial in report.trials}
    main = found["onnxruntime", None]
    assert main.state == "passed" and main.verify.result["passed"]
    assert list(main.verify.result["budgets"]) == ["0.40", "0.55", "0.70", "1.00"]
    assert [row["name"] for row in main.profile.result["rows"]][:2] == ["dense", "keep 0.40"]
    for (backend, precision), trial in found.items():
        assert precision in (*PRECISIONS.get(backend, ()), None)
        told = ("nstall", "bf16", "no NVIDIA GPU")
        assert trial.state != "not here" or any(words in trial.reason for words in told), trial
    findings = {finding["what"] for finding in report.findings}
    assert {"machine", "backend onnxruntime", "tensorrt"} <= findings


@pytest.fixture
def own_bundle(changed_bundle):
    """A copy: verifying writes a record into it."""
    return changed_bundle()
