"""A verifier for the tests, in a module that imports nothing: it is loaded in processes of its own."""


def even(completion, problem):
    """What a random model can answer now and then."""
    return completion[:1] in tuple("02468")
