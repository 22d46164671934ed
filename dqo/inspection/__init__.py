"""Credit that one can see: what a finished run says of each token of stored responses, in a terminal and as a page."""
