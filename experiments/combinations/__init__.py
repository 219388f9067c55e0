"""The study: eight combinations of differential privacy, adversarial training and model compression.

Source: Usynin, Klause, Paetzold, Rueckert, Kaissis, "Can collaborative learning be private, robust and scalable?",
DeCaF 2022, arXiv 2205.02652.

Commands, cost and device: `presets.py`.
"""
