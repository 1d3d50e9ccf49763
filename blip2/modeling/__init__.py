"""The model: image encoder, Q-Former, language models, and their configs."""
