"""One job from its claim to its result file."""
