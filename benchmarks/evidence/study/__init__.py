"""The study of docs/evidence.md: which method earns its place on which data, all tuned alike, in pieces that can be resumed."""
