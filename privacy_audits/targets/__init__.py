"""What is attacked: real runs of privfl whose records are made so that a sum tells who is in it."""
