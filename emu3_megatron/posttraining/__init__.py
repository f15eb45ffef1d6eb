"""Quality fine-tuning, vision-language understanding and DPO."""
