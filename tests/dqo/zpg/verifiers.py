"""Verifiers for the tests, in a module that imports nothing: they are loaded in processes of their own."""


def even(completion, problem):
    """What a random model can answer now and then."""
    return completion[:1] in tuple("02468")


def anything(completion, problem):
    """Right wherever the response ended."""
    return True
