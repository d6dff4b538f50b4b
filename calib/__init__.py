"""Calibration of quantized graphs; empty until INT8 and FP8 arrive."""
