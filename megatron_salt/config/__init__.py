"""Settings: dataclasses, command line, the DeepSpeed JSON, and what all of them must satisfy."""
