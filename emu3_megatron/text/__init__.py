"""Text tokenizers behind one protocol."""
