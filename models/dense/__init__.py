"""Detectors and segmenters on the maps of any timm model."""
