"""What an attacker can measure of the study's privacy, beside what it claims.

    python -m experiments.run audit            # digits
    python -m experiments.run audit --dataset pneumonia_mnist --trials 4000

For every combination with privacy: a whole federated training with canaries, each in the data by a fair coin, watched
by the server ("one run": Steinke, Nasr, Jagielski 2023, arXiv 2305.08846), and one step of the trained model, again and
again, with and without its worst record, watched by somebody who knows everything else ("one step": Nasr et al. 2023,
arXiv 2302.07956). A lower bound above its claim is a violation, and the exit status is 1.
"""
