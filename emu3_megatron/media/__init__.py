"""Decoding, preprocessing and encoding of images and video."""
