"""From prompts to replies on one model: the native door, the KV cache, and the one generation loop."""
