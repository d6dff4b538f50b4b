"""torch -> ONNX graph, parity check, bundle, engine plans."""
