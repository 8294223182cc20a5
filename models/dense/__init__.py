"""Detectors and segmenters on the maps of any timm model."""

IGNORED = 255
"""The label of a pixel that no loss and no score counts."""
