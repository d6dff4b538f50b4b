"""Ranges from a stream, calibration table, quantized graphs, layer sensitivity."""
