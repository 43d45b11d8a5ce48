"""Quantizers, one file each, found by its name."""

from kdcompress.quantize.base import Quantizer, find_quantizer, list_quantizers

__all__ = ["Quantizer", "find_quantizer", "list_quantizers"]
