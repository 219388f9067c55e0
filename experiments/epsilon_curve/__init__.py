"""What privacy costs: AUC against epsilon, for two places where the noise can be added.

Commands, cost and device: `presets.py`.
"""
