"""Video in and out: sources, letterboxing, threaded reading, overlays and sinks."""
