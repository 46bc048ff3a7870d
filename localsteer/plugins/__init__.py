"""localsteer inside programs that load it: `llm` (llm_models.py), clients of MCP (mcp_tools.py), and
lm-evaluation-harness (harness.py). What they share is in steered.py.

Each imports its host at the top, so that none of them is imported by anything but its host.
"""
