"""Whole hypernetworks."""

from pudnet.models.pudnet import PudNet, PudNetConfig

__all__ = ["PudNet", "PudNetConfig"]
