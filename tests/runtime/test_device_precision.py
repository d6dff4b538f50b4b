"""Which GPU computes in which precision."""

from __future__ import annotations

import pytest

from runtime.bundle import load_bundle
from runtime.device_precision import capability_number, check_device_precision
from runtime.errors import BackendUnavailableError


@pytest.fixture(scope="module")
def manifest(micro_bundle):
    return load_bundle(micro_bundle).manifest


def in_precision(manifest, precision: str, rest: str):
    return manifest.model_copy(update={"precision": precision, "rest_precision": rest})


def test_orin_has_no_fp8(manifest):
    with pytest.raises(BackendUnavailableError, match=r"sm87 \(Jetson Orin\) has no fp8(.|\n)*--precision int8"):
        check_device_precision(in_precision(manifest, "fp8", "fp16"), "sm87")


@pytest.mark.parametrize(
    ("precision", "rest", "has", "has_not"),
    [
        ("fp8", "fp16", ("sm89", "sm90a", "10.0", "sm110", "12.0"), ("sm86", "8.7", "sm75")),
        ("int8", "fp16", ("sm75", "sm87"), ("sm70", "6.1")),
        ("int8", "bf16", ("sm80", "sm87"), ("sm75",)),
        ("bf16", "bf16", ("sm80",), ("sm75",)),
        ("fp32", "fp32", ("sm50", "sm120"), ()),
    ],
)
def test_devices(manifest, precision, rest, has, has_not):
    bundle = in_precision(manifest, precision, rest)
    for capability in has:
        check_device_precision(bundle, capability)
    for capability in has_not:
        with pytest.raises(BackendUnavailableError, match=f"sm{capability_number(capability)}"):
            check_device_precision(bundle, capability)


@pytest.mark.parametrize("text", ["", "orin", "sm", "8", "sm8.7.1"])
def test_what_is_no_capability_is_refused(manifest, text):
    with pytest.raises(BackendUnavailableError, match=r"no compute capability; they are written sm87 or 8\.7"):
        check_device_precision(manifest, text)
