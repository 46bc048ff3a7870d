"""From prompts to replies on one model: the native door, what the KV cache holds, and the one generation loop."""
