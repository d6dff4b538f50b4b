"""What a bundle costs: latency, parts of the network and of the pipeline, the machine's ceilings, its sensors."""
