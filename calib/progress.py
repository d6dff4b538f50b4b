"""What a calibration that was stopped has done already, in a hidden folder beside its output."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from calib.histogram import Histogram
from calib.observation import Observation
from calib.samples import Sample
from calib.table import ObservedStream

_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, ValidationError)


class Progress:
    """Results by what they were made from; another network, video or setting finds none of them.

    Files are written whole; one that is damaged all the same counts as not there.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f".{output.name}.calibration")

    def observation(self, **made_from: Any) -> Observation | None:
        """What one stream showed, if it was run to its end before."""
        try:
            with np.load(self._path("stream", made_from, ".npz"), allow_pickle=False) as file:
                return _observation({name: file[name] for name in file.files})
        except _DAMAGED:
            return None

    def save_observation(self, observation: Observation, **made_from: Any) -> None:
        """Keep what one stream showed."""
        path = self._path("stream", made_from, ".npz")
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **_arrays(observation))
        os.replace(partial, path)

    def errors(self, **made_from: Any) -> dict[str, float]:
        """Errors of layers that were measured before, by name."""
        try:
            text = self._path("errors", made_from, ".json").read_text(encoding="utf-8")
            return {str(name): float(value) for name, value in json.loads(text).items()}
        except (*_DAMAGED, AttributeError, TypeError):
            return {}

    def save_errors(self, errors: dict[str, float], **made_from: Any) -> None:
        """Keep errors of layers."""
        path = self._path("errors", made_from, ".json")
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(errors), encoding="utf-8")
        os.replace(partial, path)

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, kind: str, made_from: dict[str, Any], suffix: str) -> Path:
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{kind}-{key[:24]}{suffix}"


def _arrays(observation: Observation) -> dict[str, np.ndarray[Any, Any]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "streams": np.array([stream.model_dump_json() for stream in observation.streams]),
        "layers": np.array(list(observation.histograms)),
        "counts": np.array([histogram.counts for histogram in observation.histograms.values()]),
        "reach": np.array([histogram.reach for histogram in observation.histograms.values()]),
        "largest": np.array([histogram.largest for histogram in observation.histograms.values()]),
        "samples": np.array(len(observation.samples)),
    }
    for index, sample in enumerate(observation.samples):
        arrays |= {f"{index}.feed.{name}": np.asarray(value) for name, value in sample.feeds.items()}
        arrays |= {f"{index}.output.{name}": np.asarray(value) for name, value in sample.outputs.items()}
    return arrays


def _observation(arrays: dict[str, np.ndarray[Any, Any]]) -> Observation:
    observation = Observation(streams=[ObservedStream.model_validate_json(text) for text in arrays["streams"]])
    for place, name in enumerate(arrays["layers"]):
        histogram = observation.histograms[str(name)] = Histogram()
        histogram.counts = arrays["counts"][place]
        histogram.reach, histogram.largest = float(arrays["reach"][place]), float(arrays["largest"][place])
    for index in range(int(arrays["samples"])):
        parts = [
            {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
            for prefix in (f"{index}.feed.", f"{index}.output.")
        ]
        observation.samples.append(Sample(*parts))
    return observation
