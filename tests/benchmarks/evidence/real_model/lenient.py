"""A verifier by which a random model is right now and then."""


def grade(completion: str, problem: dict) -> bool:
    return len(completion) % 2 == 0
