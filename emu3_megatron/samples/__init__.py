"""The built-in sample corpus: a small captioned world."""
