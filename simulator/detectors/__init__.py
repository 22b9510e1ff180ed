"""Detectors of model stealing, one file each."""
