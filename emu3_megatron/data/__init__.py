"""Indexed multimodal datasets, mixtures, packing plans, windows and the loader."""
