"""The tests; what several modules share is imported by its full name, such as `tests.privacy.zoo.laws`."""
