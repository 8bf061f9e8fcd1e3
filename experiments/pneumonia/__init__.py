"""Pneumonia detection with a pruned YOLOv3: `python -m experiments.pneumonia`."""
