"""A server over one model: a page, and interfaces that OpenAI's clients know."""
