"""Everything a device needs: bundles, backends, streams; numpy only, neither torch nor onnx."""
