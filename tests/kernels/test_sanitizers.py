"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: random calls on arrays of exactly their size."""

import platform

import pytest

from tests.kernels import sanitize

REASON = None
if platform.system() != "Linux" or sanitize.CXX is None:
    REASON = "needs Linux and GCC"
elif sanitize.runtime_libraries("address,undefined") is None:
    REASON = f"{sanitize.CXX} has no AddressSanitizer runtime"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    return sanitize.build(tmp_path_factory.mktemp("sanitized"))


def test_random_calls_touch_only_their_arrays(extension):
    done = sanitize.drive(extension, "fuzz", 1500, 0)
    assert done.returncode == 0, done.stderr[:4000]
    assert done.stdout == "ran 1500 cases\n"


@pytest.mark.parametrize(
    ("error", "message"), [("overrun", "heap-buffer-overflow"), ("misaligned", "load of misaligned address")]
)
def test_the_sanitizers_notice_what_they_are_there_for(extension, error, message):
    done = sanitize.drive(extension, error)
    assert done.returncode != 0 and "unnoticed" not in done.stdout
    assert message in done.stderr, done.stderr[:4000]
