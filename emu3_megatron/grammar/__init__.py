"""The document language: how text, images and video become one token sequence and back."""
