"""What small updates cost: accuracy against the bytes that a federation sends.

Commands: `presets.py`.
"""
