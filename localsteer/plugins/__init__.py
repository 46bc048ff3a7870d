"""localsteer inside other programs: `llm` (llm_models.py), clients of MCP (mcp_tools.py), and
lm-evaluation-harness (harness.py). What they share is in steered.py.

Each imports its host at the top, so only its host may import it.
"""
