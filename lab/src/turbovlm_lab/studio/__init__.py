"""`turbovlm studio`: a page in the browser where one sees what merging does to a model and to its answers."""
