"""Other attacks on the models that a study left: nothing is trained again.

python -m experiments.run attack --models results/combinations-pneumonia_mnist-cpu
"""
