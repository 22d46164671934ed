"""Credit along a response: scores of tokens as sums of steps, and how well they find what was wrong. numpy alone."""
