"""The generation engine and its tasks."""
