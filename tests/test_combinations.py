import itertools

from tests.combinations import pairwise


def test_every_two_values_of_two_axes_meet_in_few_rows():
    axes = ["abc", range(4), [True, False], ["one"]]
    rows = pairwise(*axes)
    for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(first, second))
    assert len(rows) <= 14 and len(set(rows)) == len(rows)  # of 24
