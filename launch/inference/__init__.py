"""A trained model that answers, for the commands that ask it."""
