"""The recipe: the YAML file that a user writes, read strictly, with the line of every mistake."""
