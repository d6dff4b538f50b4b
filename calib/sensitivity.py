"""Which layers cost accuracy, and which have to stay unquantized for the whole to be accurate enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from calib.samples import Deviation
from runtime.errors import CalibrationError

Measure = Callable[[Mapping[str, float]], Deviation]  # of the network with these layers quantized, by their ranges


def layer_errors(
    measure: Measure,
    ranges: Mapping[str, float],
    known: Mapping[str, float],
    on_layer: Callable[[dict[str, float]], None],
) -> dict[str, float]:
    """Error of the network's outputs with one layer quantized, for each layer.

    Args:
        known: Errors that need not be measured again.
        on_layer: Called after each layer with all errors so far.
    """
    errors = {name: known[name] for name in ranges if name in known}
    for name, largest in ranges.items():
        if name not in errors:
            errors[name] = measure({name: largest}).error
            on_layer(errors)
    return {name: errors[name] for name in ranges}


def layers_to_exclude(
    measure: Measure, ranges: Mapping[str, float], errors: Mapping[str, float], max_error: float
) -> set[str]:
    """The fewest layers, worst first, without which the error is at most ``max_error``.

    Found by halving, which takes for granted that leaving out one more layer does not make it worse; the result is
    measured itself.

    Raises:
        CalibrationError: It cannot be met.
    """
    worst_first = sorted(ranges, key=lambda name: errors[name], reverse=True)

    def error_without(count: int) -> float:
        out = set(worst_first[:count])
        return measure({name: value for name, value in ranges.items() if name not in out}).error

    few, many = -1, len(worst_first)
    if (least := error_without(many)) > max_error:
        raise CalibrationError(
            f"an error of at most {max_error} cannot be met: with no layer quantized it is {least:.4f}, from what the "
            "rest is computed in. Allow more, or take --rest fp32."
        )
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if error_without(middle) <= max_error else (middle, many)
    if many == len(worst_first):
        raise CalibrationError(
            f"an error of at most {max_error} is met only with no layer quantized at all. Allow more, or export the "
            "checkpoint with --precision fp16."
        )
    return set(worst_first[:many])
