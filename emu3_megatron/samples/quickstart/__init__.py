"""The quickstart: the whole path from raw media to a trained model, its samples, their check and a report."""
