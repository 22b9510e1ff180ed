"""The records of a run: rows, detections, provenance."""
