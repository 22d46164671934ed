"""A verifier for models that answer at random: it reads the digits of an answer."""

from dqo.grading.grade import Grade


def digits(completion: str, problem: dict) -> Grade:
    """Right when the completion's digits sum to an even number; unreadable without digits."""
    found = [c for c in completion if c.isdigit()]
    if not found:
        return Grade(0.0, False)
    total = sum(map(int, found))
    return Grade(float(total % 2 == 0), True, str(total % 4))
