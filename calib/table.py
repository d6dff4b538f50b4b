"""The calibration table: which range the input of each linear layer has, as JSON that a person can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.bundle import Bundle
from runtime.errors import CalibrationError
from runtime.manifest import Sha256

TABLE_FILE = "calibration.json"
TABLE_VERSION = 1

Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRange(_Strict):
    """What was observed at the input of one linear layer.

    Attributes:
        range: Largest absolute value that a code stands for; what is larger is cut off there.
        largest: Largest absolute value seen.
        cut_off: Share of the values beyond ``range``, in [0, 1].
        error: Error of the network's outputs with this layer alone quantized, root mean square over that of the
            outputs; None if it was not measured.
        excluded: The layer is not quantized.
    """

    range: Size
    largest: Size
    cut_off: Annotated[float, Field(ge=0, le=1)] = 0.0
    error: Size | None = None
    excluded: bool = False


class ObservedStream(_Strict):
    """A video that was run at one budget.

    Attributes:
        frames: Frames run, those without a prior included.
        without_prior: Frames that ran without one.
    """

    source: str
    token_budget: tuple[int, ...]
    frames: Annotated[int, Field(ge=1)]
    without_prior: Annotated[int, Field(ge=0)]


class CalibrationTable(_Strict):
    """Ranges of all linear layers of one network at one image size.

    Attributes:
        weights_sha256: Of the weights, as in the manifest.
        streams: What was observed.
        layers: By module of the network, in the order of the graph.
    """

    table_version: Literal[1] = TABLE_VERSION
    model: str
    weights_sha256: Sha256
    image_size: tuple[int, int]
    method: Literal["minmax", "entropy", "percentile"]
    percentile: float | None = None
    streams: tuple[ObservedStream, ...]
    layers: dict[str, LayerRange] = Field(min_length=1)

    @property
    def ranges(self) -> dict[str, float]:
        """Ranges of the layers that are quantized; one that saw nothing but zeros is not."""
        return {name: layer.range for name, layer in self.layers.items() if layer.range > 0 and not layer.excluded}

    def with_errors(self, errors: dict[str, float]) -> CalibrationTable:
        """The same with the measured error of layers."""
        return self._with({name: {"error": error} for name, error in errors.items()})

    def excluding(self, names: set[str]) -> CalibrationTable:
        """The same with these layers excluded, and no others."""
        return self._with({name: {"excluded": name in names} for name in self.layers})

    def _with(self, changes: dict[str, dict[str, Any]]) -> CalibrationTable:
        layers = {name: layer.model_copy(update=changes.get(name, {})) for name, layer in self.layers.items()}
        return self.model_copy(update={"layers": layers})

    def check_fits(self, bundle: Bundle, names: list[str]) -> None:
        """Refuse a bundle that the table was not made for.

        Args:
            names: The bundle's linear layers.

        Raises:
            CalibrationError: Other weights, another image size, or other layers.
        """
        manifest = bundle.manifest
        if self.weights_sha256 != manifest.origin.weights_sha256:
            raise CalibrationError(
                f"the table is of {self.model} with weights {self.weights_sha256[:12]}, {bundle.folder} is "
                f"{manifest.origin.model} with weights {manifest.origin.weights_sha256[:12]}. Calibrate this bundle: "
                f"deploy.py calibrate {bundle.folder} --source VIDEO --precision int8"
            )
        if self.image_size != manifest.image_size:
            raise CalibrationError(
                f"the table was made at an image size of {self.image_size[0]} x {self.image_size[1]}, {bundle.folder} "
                f"has {manifest.image_size[0]} x {manifest.image_size[1]}. Calibrate this bundle."
            )
        if set(names) != set(self.layers):
            other = sorted(set(names) ^ set(self.layers))
            raise CalibrationError(
                f"the table and the graph of {bundle.folder} differ in {len(other)} linear layers, the first is "
                f"{other[0]}. Calibrate this bundle."
            )


def read_table(path: Path) -> CalibrationTable:
    """Read a table.

    Raises:
        CalibrationError: It is not there, not JSON, or contradicts itself.
    """
    try:
        return CalibrationTable.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except ValidationError as error:
        lines = "\n".join(f"  {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise CalibrationError(f"{path} is no calibration table:\n{lines}\nCalibrate again.") from error
    except ValueError as error:
        raise CalibrationError(f"{path} is not JSON: {error}. Calibrate again.") from error
