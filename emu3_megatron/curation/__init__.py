"""Raw media to a clean manifest."""
