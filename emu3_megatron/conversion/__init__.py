"""Weight maps and converters to and from Hugging Face."""
