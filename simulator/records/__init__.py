"""What is written down: rows, detections, provenance."""
